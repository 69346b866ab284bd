"""Convolutions over NHWC images, with the LoRA slot, and the blocks that UNets and VAEs share."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.sharding import constrain
from jaxft.nn.linear import Adapter, Linear, dropout
from jaxft.nn.norm import GroupNorm

Padding = tuple[tuple[int, int], tuple[int, int]]

# Logical axes of a kernel (y, x, in, out): one channel dim over fsdp, or none where it is 3 or 4.
SHARDED = (None, None, None, "embed")
WHOLE = (None, None, None, None)

# From so many channels on, XLA:CPU is faster with a matrix product than with its own convolution:
# two times at 640 channels, mostly in the gradients; at 64 it is three times slower.
WIDE = 128

# What a stride-2 convolution pads: the UNet's on all sides, the VAE's bottom and right alone.
ALL_SIDES: Padding = ((1, 1), (1, 1))
BOTTOM_RIGHT: Padding = ((0, 1), (0, 1))

# What the backward pass finds of a block's forward pass; the rest is computed again.
REMAT = {
    "dots": jax.checkpoint_policies.save_from_both_policies(
        jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
        jax.checkpoint_policies.save_only_these_names("conv"),
    ),
    "full": jax.checkpoint_policies.nothing_saveable,
}


class Conv(nnx.Module):
    """y = x * W + b (cross-correlation); with an adapter also + scale * (x * A) B.

    Shapes: x (B, Y, X, in) -> (B, Y', X', out). `padding` is ((top, bottom), (left, right)), or one
    number for all sides. The adapter's A is a convolution of the same size, stride and padding to
    r channels, its B a 1x1 one, as PEFT and kohya have it. Initialised as torch's Conv2d, but for
    the bias, which is zero.
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
        axes: tuple[str | None, ...] = SHARDED,
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
        self.adapter = Adapter(1.0)
        self.stride = stride
        sides = ((padding, padding), (padding, padding)) if isinstance(padding, int) else padding
        self.padding: Padding = sides

    def __call__(
        self, x: Float[Array, "B Y X C"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "B Y2 X2 F"]:
        """`keys`, one a row of x, turn the adapter's dropout on; without them there is none."""
        # By this name a remat policy can keep what no policy for matrix products would.
        y = checkpoint_name(self.convolve(x, self.kernel[...]), "conv")
        if self.lora_a is not None and self.lora_b is not None:
            y = y + self._adapted(x, self.lora_a[...], self.lora_b[...], keys)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y

    def convolve(self, x: Array, kernel: Array) -> Array:
        """x with another kernel, at this layer's stride and padding; no bias."""
        wide = x.shape[-1] >= WIDE and jax.default_backend() == "cpu"
        convolve = _by_columns if wide else _direct
        # Gathered where it is used: left to itself XLA (jax 0.10) shards the channels over the axis
        # that the batch lies on, and in the loop over micro-batches then mixes up the batch's rows.
        kernel = constrain(kernel.astype(x.dtype), *WHOLE)
        return convolve(x, kernel, self.stride, self.padding)

    def _adapted(self, x: Array, a: Array, b: Array, keys: PRNGKeyArray | None) -> Array:
        if keys is not None and self.adapter.dropout > 0:
            x = dropout(x, keys, self.adapter)
        return self.adapter.scale * jnp.tensordot(self.convolve(x, a), b.astype(x.dtype), 1)


def _direct(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    layout = ("NHWC", "HWIO", "NHWC")
    strides = (stride, stride)
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)


def _by_columns(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """One matrix product with what the kernel sees at each place (im2col)."""
    size, out = kernel.shape[0], kernel.shape[-1]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    y, width = ((side - size) // stride + 1 for side in padded.shape[1:3])
    taps = [
        padded[:, i : i + stride * (y - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    columns = jnp.concatenate(taps, axis=-1)
    return jnp.tensordot(columns, kernel.reshape(-1, out), 1)


class Downsample(nnx.Module):
    """Half the size by a 3x3 convolution of stride 2; ALL_SIDES rounds up, BOTTOM_RIGHT down."""

    def __init__(self, channels: int, padding: Padding, *, key: PRNGKeyArray):
        self.conv = Conv(channels, channels, 3, key=key, stride=2, padding=padding)

    def __call__(
        self, x: Float[Array, "B Y X C"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "B Y2 X2 C"]:
        return self.conv(x, keys)


class Upsample(nnx.Module):
    """Twice the size by repetition, cut to `size` (Y, X) where that is odd; then a 3x3 conv."""

    def __init__(self, channels: int, *, key: PRNGKeyArray):
        self.conv = Conv(channels, channels, 3, key=key, padding=1)

    def __call__(
        self,
        x: Float[Array, "B Y X C"],
        size: tuple[int, int] | None = None,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "B Y2 X2 C"]:
        x = upsample_nearest(x)
        return self.conv(x if size is None else x[:, : size[0], : size[1]], keys)


def upsample_nearest(x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 C"]:
    """Every pixel twice in both directions."""
    b, y, width, c = x.shape
    twice = jnp.broadcast_to(x[:, :, None, :, None], (b, y, 2, width, 2, c))
    return twice.reshape(b, 2 * y, 2 * width, c)


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x))) + time))); a 1x1 conv on x where the widths differ.

    `time_dim` is the width of the time embedding that __call__ takes; None (the VAE's) is none.
    diffusers' ResnetBlock2D, whose names it carries.
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
        h = self.conv1(jax.nn.silu(self.norm1(x)), keys)
        if self.time_emb_proj is not None and time is not None:
            h = h + self.time_emb_proj(jax.nn.silu(time), keys)[:, None, None]
        h = self.conv2(jax.nn.silu(self.norm2(h)), keys)
        return (x if self.conv_shortcut is None else self.conv_shortcut(x, keys)) + h


def runner(remat: str) -> Callable[..., Array]:
    """Calls a block on activations, keeping for the backward pass what `remat` names.

    UserError where that is neither "none" nor of REMAT.
    """
    if remat != "none" and remat not in REMAT:
        known = ", ".join(("auto", "none", *REMAT))
        raise UserError(f"remat={remat!r} is not for convolutions; choose one of {known}")

    def run(block: Callable[..., Array], x: Array, *rest: Any) -> Array:
        return constrain(block(x, *rest), "batch", *[None] * (x.ndim - 1))

    return run if remat == "none" else jax.checkpoint(run, policy=REMAT[remat])


def dense(inputs: int, outputs: int, *, key: PRNGKeyArray, bias: bool = True) -> Linear:
    """A plain (in) -> (out) projection, fsdp over its input, with the spread of torch's Linear."""
    return Linear((inputs,), (outputs,), ("embed", "mlp"), key=key, bias=bias, std=spread(inputs))


def spread(inputs: int) -> float:
    """The standard deviation of torch's initial weights, uniform within 1 / sqrt(inputs)."""
    return (3 * inputs) ** -0.5
