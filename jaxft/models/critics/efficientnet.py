"""EfficientNet-Lite0, a small frozen ImageNet network: features for image metrics and losses."""

from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.nn.conv import REPLICATED_KERNEL
from jaxft.weights.rules import Rule

BATCH_NORM_EPS = 1e-3  # of every norm, as in TensorFlow's EfficientNets
IMAGE_SIZE = 224  # pixels a side of the images that it was trained on
STEM_WIDTH, HEAD_WIDTH = 32, 1280


class Stage(NamedTuple):
    """Blocks of one width: their number, kernel size, first stride, expansion, output channels."""

    blocks: int
    size: int
    stride: int
    expansion: int
    width: int


# Tan & Le 2019, arXiv:1905.11946, table 1. "Lite" has no squeeze-and-excitation, and has ReLU6.
STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
# The last block at each resolution (1/2, 1/4, ... 1/32 of the image) and its channels.
TAPS = {0: 16, 2: 24, 4: 40, 10: 112, 15: 320}


class SameConv(nnx.Module):
    """A convolution without bias, padded as TensorFlow's "same". `groups` = inputs is depthwise.

    It is replicated on all devices and has no LoRA slot, because it is never trained.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        size: int,
        *,
        key: PRNGKeyArray,
        stride: int = 1,
        groups: int = 1,
    ):
        shape = (size, size, inputs // groups, outputs)
        std = (2 / (size * size * inputs // groups)) ** 0.5
        kernel = std * jax.random.normal(key, shape)
        self.kernel = nnx.Param(kernel, axes=REPLICATED_KERNEL, inputs=3)
        self.stride, self.groups = stride, groups

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        return jax.lax.conv_general_dilated(
            x,
            self.kernel[...].astype(x.dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=self.groups,
        )


class FrozenNorm(nnx.Module):
    """Batch norm with its stored statistics: (x - mean) / sqrt(var + eps) * scale + bias.

    Its factor and shift are computed in fp32.
    Source: Ioffe & Szegedy 2015, arXiv:1502.03167, inference form.
    """

    def __init__(self, channels: int):
        self.scale = nnx.Param(jnp.ones((channels,)), axes=("norm",))
        self.bias = nnx.Param(jnp.zeros((channels,)), axes=("norm",))
        self.mean = nnx.Param(jnp.zeros((channels,)), axes=("norm",))
        self.var = nnx.Param(jnp.ones((channels,)), axes=("norm",))

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        wide = [p[...].astype(jnp.float32) for p in (self.scale, self.bias, self.mean, self.var)]
        scale, bias, mean, var = wide
        factor = scale * jax.lax.rsqrt(var + BATCH_NORM_EPS)
        return x * factor.astype(x.dtype) + (bias - mean * factor).astype(x.dtype)


class InvertedBottleneck(nnx.Module):
    """Widen, convolve each channel, narrow. Plus x, where neither size nor width changes."""

    def __init__(self, inputs: int, stage: Stage, stride: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        wide = inputs * stage.expansion
        expands = stage.expansion > 1
        self.expand_conv = nnx.data(SameConv(inputs, wide, 1, key=keys[0]) if expands else None)
        self.bn0 = nnx.data(FrozenNorm(wide) if expands else None)
        self.depthwise_conv = SameConv(
            wide, wide, stage.size, key=keys[1], stride=stride, groups=wide
        )
        self.bn1 = FrozenNorm(wide)
        self.project_conv = SameConv(wide, stage.width, 1, key=keys[2])
        self.bn2 = FrozenNorm(stage.width)
        self.residual = stride == 1 and inputs == stage.width

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        y = x
        if self.expand_conv is not None and self.bn0 is not None:
            y = jax.nn.relu6(self.bn0(self.expand_conv(y)))
        y = jax.nn.relu6(self.bn1(self.depthwise_conv(y)))
        y = self.bn2(self.project_conv(y))
        return x + y if self.residual else y


class EfficientNetLite0(nnx.Module):
    """The whole network without its classifier. It computes in the dtype of its input.

    Images are [B, Y, X, 3] in [-1, 1], of any size.
    """

    name: ClassVar[str] = "effnet-lite0"

    def __init__(self, *, key: PRNGKeyArray):
        keys = iter(jax.random.split(key, 2 + sum(stage.blocks for stage in STAGES)))
        self.conv_stem = SameConv(3, STEM_WIDTH, 3, key=next(keys), stride=2)
        self.bn0 = FrozenNorm(STEM_WIDTH)
        blocks, width = [], STEM_WIDTH
        for stage in STAGES:
            for i in range(stage.blocks):
                stride = stage.stride if i == 0 else 1
                blocks.append(InvertedBottleneck(width, stage, stride, key=next(keys)))
                width = stage.width
        self.blocks = nnx.List(blocks)
        self.conv_head = SameConv(width, HEAD_WIDTH, 1, key=next(keys))
        self.bn1 = FrozenNorm(HEAD_WIDTH)

    def stages(self, images: Float[Array, "B Y X C"]) -> tuple[Float[Array, "B _ _ _"], ...]:
        """Return the last block's output at each of five resolutions, 1/2 to 1/32 of the image.

        The images are not resized.
        """
        x = (images * 127.5 + 0.5) / 128  # [-1, 1] to 0...255, then (x - 127) / 128
        x = jax.nn.relu6(self.bn0(self.conv_stem(x)))
        found = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in TAPS:
                found.append(x)
        return tuple(found)

    def heads(self) -> tuple[Float[Array, "C"], ...]:
        """Return the weights of channels in a perceptual distance: 1 / channels, for each stage."""
        return tuple(jnp.full((width,), 1 / width) for width in TAPS.values())

    def features(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        """Return the map before the classifier's pooling, 1/32 of the image, with 1280 channels."""
        return jax.nn.relu6(self.bn1(self.conv_head(self.stages(images)[-1])))

    def pooled(self, images: Float[Array, "B Y X C"]) -> Float[Array, "B F"]:
        """Return features [B, 1280] of images, resized to the size that it was trained on."""
        return jnp.mean(self.features(resized(images)), axis=(1, 2))  # [B, 1280]


def resized(images: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 C"]:
    """Return images at 224x224: bilinear with half-pixel centres, antialiased where they shrink.

    It is torch's interpolate(antialias=True), without its rounding of bytes to whole grey levels.
    Images that are not square are squeezed and not cropped.
    """
    size = (images.shape[0], IMAGE_SIZE, IMAGE_SIZE, images.shape[-1])
    return jax.image.resize(images, size, "bilinear", antialias=True)


_CONV = "o i y x -> y x i o"
_NORM = {"weight": "scale", "bias": "bias", "running_mean": "mean", "running_var": "var"}
RULES = (
    Rule("_conv_{pq}.weight", "conv_{pq}.kernel", _CONV),
    Rule("_blocks.{n}._{pq}_conv.weight", "blocks.{n}.{pq}_conv.kernel", _CONV),
    *(Rule(f"_bn{{k}}.{old}", f"bn{{k}}.{new}") for old, new in _NORM.items()),
    *(Rule(f"_blocks.{{n}}._bn{{k}}.{old}", f"blocks.{{n}}.bn{{k}}.{new}")
      for old, new in _NORM.items()),
)  # fmt: skip
SIZES: dict[str, int] = {}  # the layouts name no dim
IGNORE = (r"_fc\..*", r".*\.num_batches_tracked")  # the classifier, and a counter of training
