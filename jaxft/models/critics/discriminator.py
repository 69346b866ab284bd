"""PatchGAN, a discriminator: one logit for each patch of an image, high for real ones."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.nn.conv import REPLICATED_KERNEL, Conv
from jaxft.nn.norm import GroupNorm

WIDTHS = (64, 128, 256, 512)  # pix2pix's three strided layers and one more
GROUPS = 32
STD = 0.02
LEAST = 32  # pixels a side, which give two logits a side


class PatchGAN(nnx.Module):
    """The discriminator that taming-transformers trains autoencoders against.

    Images have to be at least LEAST pixels a side. It has group norm instead of taming's batch
    norm, so that rows are independent, and results depend neither on the mesh nor on micro-batches.
    Source: Isola et al. 2017, arXiv:1611.07004.
    """

    def __init__(self, *, key: PRNGKeyArray):
        keys = jax.random.split(key, len(WIDTHS) + 1)
        inputs = (3, *WIDTHS[:-1])
        strides = (2,) * (len(WIDTHS) - 1) + (1,)
        self.convs = nnx.List(
            [
                _conv(one, width, stride, bias=i == 0, key=keys[i])
                for i, (one, width, stride) in enumerate(zip(inputs, WIDTHS, strides, strict=True))
            ]
        )
        self.norms = nnx.List([GroupNorm(width, groups=GROUPS, eps=1e-5) for width in WIDTHS[1:]])
        self.conv_out = _conv(WIDTHS[-1], 1, 1, bias=True, key=keys[-1], axes=REPLICATED_KERNEL)

    def __call__(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2"]:
        """Return one fp32 logit for each patch of 70 pixels. A logit above 0 means real."""
        x = jax.nn.leaky_relu(self.convs[0](images), 0.2)
        for conv, norm in zip(self.convs[1:], self.norms, strict=True):
            x = jax.nn.leaky_relu(norm(conv(x)), 0.2)
        return self.conv_out(x)[..., 0].astype(jnp.float32)  # [B, Y2, X2]


def _conv(
    inputs: int,
    outputs: int,
    stride: int,
    *,
    bias: bool,
    key: PRNGKeyArray,
    axes: tuple[str | None, ...] = (None, None, None, "embed"),
) -> Conv:
    conv = Conv(inputs, outputs, 4, key=key, stride=stride, padding=1, bias=bias, axes=axes)
    # The initialisation of pix2pix, instead of that of torch's Conv2d.
    conv.kernel[...] = STD * jax.random.normal(key, conv.kernel.shape)
    return conv
