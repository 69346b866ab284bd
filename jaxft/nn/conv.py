"""Convolutions over NHWC images, with the LoRA slot, and the blocks that UNets and VAEs share."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import saves_attention
from jaxft.kernels.conv import Padding, convolve
from jaxft.kernels.elementwise import recomputed
from jaxft.nn.linear import Adapter, Linear, dora_gain, dropout, kronecker
from jaxft.nn.norm import GroupNorm

# Logical axes of a kernel [y, x, in, out]: one channel dim over fsdp, or none where it is 3 or 4.
SHARDED_KERNEL = (None, None, None, "embed")
REPLICATED_KERNEL = (None, None, None, None)

# Padding of a stride-2 convolution: the UNet pads all sides, the VAE bottom and right alone.
ALL_SIDES: Padding = ((1, 1), (1, 1))
BOTTOM_RIGHT: Padding = ((0, 1), (0, 1))

# Policies for what a block's forward pass saves for the backward pass. It recomputes the rest.
CONV_REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_from_both_policies(
            jax.checkpoint_policies.save_only_these_names("conv"), saves_attention
        ),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Conv(nnx.Module):
    """Convolution y = x * W + b (cross-correlation), and with an adapter + scale * (x * A) B.

    x [B, Y, X, in] -> y [B, Y2, X2, out]. W [size, size, in, out]. `padding` is ((top, bottom),
    (left, right)), or one number for all sides. The adapter's A [size, size, in, r] is a
    convolution of the same stride and padding, and its B [r, out] is a 1x1 convolution, as in PEFT
    and kohya. With DoRA it is m / |W + scale * A B| * (x * W + scale * (x * A) B) + b, as in
    `Linear`. W is initialised as in torch's Conv2d. b is zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        size: int,
        *,
        key: PRNGKeyArray,
        stride: int = 1,
        padding: int | Padding = 0,
        bias: bool = True,
        axes: tuple[str | None, ...] = SHARDED_KERNEL,
    ):
        shape = (size, size, in_channels, out_channels)
        bound = (size * size * in_channels) ** -0.5
        kernel = jax.random.uniform(key, shape, minval=-bound, maxval=bound)
        self.inputs = 3
        self.kernel = nnx.Param(kernel, axes=axes, inputs=self.inputs)
        zeros = jnp.zeros((out_channels,))
        self.bias = nnx.data(nnx.Param(zeros, axes=(None,)) if bias else None)
        self.lora_a = nnx.data(None)
        self.lora_b = nnx.data(None)
        self.lora_k = nnx.data(None)
        self.lora_m = nnx.data(None)
        self.adapter = Adapter(1.0)
        self.stride = stride
        sides = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        self.padding: Padding = sides

    def __call__(
        self, x: Float[Array, "B Y X C"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "B Y2 X2 F"]:
        """Return y in x's dtype.

        keys: one PRNG key for each row of x, for the dropout of the adapter. None: no dropout.
        """
        # The name lets a remat policy save convolutions. Policies for matrix products do not.
        y = checkpoint_name(self.convolve(x, self.kernel[...]), "conv")
        if self.lora_a is not None and self.lora_b is not None:
            inner = x
            if keys is not None and self.adapter.dropout > 0:
                inner = dropout(x, keys, self.adapter)
            b = self.lora_b[...].astype(x.dtype)
            if self.lora_k is not None:
                update = self._kronecker(inner, b)
            else:
                low = self.convolve(inner, self.lora_a[...])  # [B, Y2, X2, r]
                update = jnp.tensordot(low, b, 1)  # [B, Y2, X2, out]
            update = self.adapter.scale * update
            if self.lora_m is not None:
                adapter = self.lora_m[...], self.lora_a[...], self.lora_b[...]
                gain = dora_gain(self.kernel[...], *adapter, self.adapter.scale, self.inputs)
                whole = y if inner is x else self.convolve(inner, self.kernel[...])
                update = (gain - 1).astype(x.dtype) * whole + gain.astype(x.dtype) * update
            y = y + update
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y

    def _kronecker(
        self, x: Float[Array, "B Y X C"], b: Float[Array, "R O"]
    ) -> Float[Array, "B Y2 X2 F"]:
        """Return the update of LoKr: each block of channels is a row of its own for A."""
        assert self.lora_a is not None and self.lora_k is not None
        rows, y, across, _ = x.shape
        blocks = jnp.moveaxis(x.reshape(rows, y, across, len(self.lora_k[...]), -1), 3, 1)
        low = self.convolve(blocks.reshape(-1, *blocks.shape[2:]), self.lora_a[...])
        low = low.reshape(rows, -1, *low.shape[1:])  # [B, Q, Y2, X2, r]
        return kronecker(jnp.moveaxis(low, 1, 3), self.lora_k[...], b)  # [B, Y2, X2, out]

    def convolve(
        self, x: Float[Array, "B Y X C"], kernel: Float[Array, "size size C F"]
    ) -> Float[Array, "B Y2 X2 F"]:
        """Return x convolved with a kernel, with this layer's stride and padding, without bias."""
        # The kernel is gathered here. Otherwise XLA (jax 0.10) shards channels over the axis of the
        # batch, and then mixes up rows of the batch in the loop over micro-batches.
        kernel = constrain(kernel.astype(x.dtype), *REPLICATED_KERNEL)
        return convolve(x, kernel, self.stride, self.padding)


class Downsample(nnx.Module):
    """3x3 convolution of stride 2, which halves height and width.

    With padding ALL_SIDES odd sizes are rounded up, with BOTTOM_RIGHT down.
    """

    def __init__(self, channels: int, padding: Padding, *, key: PRNGKeyArray):
        self.conv = Conv(channels, channels, 3, key=key, stride=2, padding=padding)

    def __call__(
        self, x: Float[Array, "B Y X C"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "B Y2 X2 C"]:
        return self.conv(x, keys)


class Upsample(nnx.Module):
    """Nearest-neighbour upsampling to twice the size, followed by a 3x3 convolution.

    size: (Y, X) to crop to before the convolution, for odd sizes.
    """

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        self.conv = Conv(channels, channels, 3, key=key, padding=1)

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        size: tuple[int, int] | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "B Y2 X2 C"]:
        b, y, width, c = x.shape
        x = jnp.broadcast_to(x[:, :, None, :, None], (b, y, 2, width, 2, c))  # [B, Y, 2, X, 2, C]
        x = x.reshape(b, 2 * y, 2 * width, c)  # [B, 2 Y, 2 X, C]
        return self.conv(x if size is None else x[:, : size[0], : size[1]], keys)


class ResnetBlock(nnx.Module):
    """Residual block x + conv(silu(norm(conv(silu(norm(x))) + time))).

    If input and output channels differ, the first term is a 1x1 convolution of x. `time_dim` is the
    width of the time embedding, an argument of __call__. It is None in a VAE, which has none.
    Source: diffusers' ResnetBlock2D. The names are the same.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        key: PRNGKeyArray,
        groups: int,
        eps: float,
        time_dim: int | None = None,
    ):
        keys = jax.random.split(key, 4)
        self.norm1 = GroupNorm(in_channels, groups=groups, eps=eps)
        self.conv1 = Conv(in_channels, out_channels, 3, key=keys[0], padding=1)
        time = None if time_dim is None else dense(time_dim, out_channels, key=keys[1])
        self.time_emb_proj = nnx.data(time)
        self.norm2 = GroupNorm(out_channels, groups=groups, eps=eps)
        self.conv2 = Conv(out_channels, out_channels, 3, key=keys[2], padding=1)
        same = in_channels == out_channels
        self.conv_shortcut = nnx.data(
            None if same else Conv(in_channels, out_channels, 1, key=keys[3])
        )

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        time: Float[Array, "B D"] | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "B Y X F"]:
        h = self.conv1(recomputed(partial(_activated, self.norm1))(x), keys)
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time), keys)[:, None, None]  # [B, 1, 1, F]
        h = self.conv2(recomputed(partial(_activated, self.norm2))(h), keys)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x, keys)) + h


def _activated(norm: GroupNorm, x: Array) -> Array:
    return jax.nn.silu(norm(x))


def runner(remat: str) -> Callable[..., Any]:
    """Return a function that calls a block on activations under the remat policy `remat`.

    All arrays of the result are constrained to the sharding of the batch.
    Raises: UserError if `remat` is neither "none" nor a key of CONV_REMAT.
    """
    if remat != "none" and remat not in CONV_REMAT:
        known = ", ".join(("auto", "none", *CONV_REMAT))
        raise UserError(f"remat={remat!r} is not for convolutions; choose one of {known}")

    def pinned(x: Array) -> Array:
        return constrain(x, "batch", *[None] * (x.ndim - 1))

    def run(block: Callable[..., Any], x: Any, *rest: Any) -> Any:
        return jax.tree.map(pinned, block(x, *rest))

    return run if remat == "none" else jax.checkpoint(run, policy=CONV_REMAT[remat])


def dense(inputs: int, outputs: int, *, key: PRNGKeyArray, bias: bool = True) -> Linear:
    """Return a projection [in, out] with torch's initial spread. fsdp shards its input dim."""
    return Linear((inputs,), (outputs,), ("embed", "mlp"), key=key, bias=bias, std=spread(inputs))


def spread(inputs: int) -> float:
    """Return the standard deviation of torch's initial weights, uniform in +-1 / sqrt(inputs)."""
    return (3 * inputs) ** -0.5
