"""The frozen network of a perceptual distance: the demo's EfficientNet, or LPIPS's VGG16."""

from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.demo import demo_path
from jaxft.models.critics import efficientnet
from jaxft.models.critics.efficientnet import EfficientNetLite0
from jaxft.nn.conv import REPLICATED_KERNEL, Conv
from jaxft.weights.files.tensor_files import TensorFiles, Tensors
from jaxft.weights.rules import Rule
from jaxft.weights.transfer import Part

DEMO = "demo:efficientnet-lite0"
LPIPS_EPS = 1e-10  # of LPIPS's normalisation

# Channels of VGG16's 13 convolutions, by slices of LPIPS, which end with the ReLU before a pooling.
SLICES = ((64, 64), (128, 128), (256,) * 3, (512,) * 3, (512,) * 3)
# LPIPS's scaling layer: ImageNet's mean and deviation of images within [-1, 1].
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Network(Protocol):
    """Images in [-1, 1] to feature maps. `heads` holds the weights of the channels of each map."""

    name: ClassVar[str]  # the name of the metric

    def stages(self, images: Float[Array, "B Y X C"]) -> tuple[Float[Array, "B Y2 X2 F"], ...]: ...
    def heads(self) -> tuple[Float[Array, "F"], ...]: ...


class LpipsVGG16(nnx.Module):
    """VGG16 (Simonyan & Zisserman 2015) to its last ReLU, with LPIPS v0.1's linear heads."""

    name: ClassVar[str] = "lpips-vgg16"

    def __init__(self, *, key: PRNGKeyArray):
        convs, inputs = [], 3
        for width in (width for widths in SLICES for width in widths):
            key, own = jax.random.split(key)
            convs.append(Conv(inputs, width, 3, key=own, padding=1, axes=REPLICATED_KERNEL))
            inputs = width
        self.convs = nnx.List(convs)
        uniform = [jnp.full((widths[-1],), 1 / widths[-1]) for widths in SLICES]
        self.lins = nnx.List([nnx.Param(head, axes=("norm",)) for head in uniform])

    def stages(self, images: Float[Array, "B Y X C"]) -> tuple[Float[Array, "B Y2 X2 F"], ...]:
        """Return relu1_2, relu2_2, relu3_3, relu4_3 and relu5_3.

        Their sizes are 1 to 1/16 of the image, rounded down.
        Raises: UserError for images of fewer than 16 pixels a side: the last map would be empty.
        """
        if min(images.shape[1:3]) < 16:
            raise UserError(
                f"{self.name} of images of {images.shape[1]}x{images.shape[2]} pixels: expected"
                f" at least 16x16; use larger images or perceptual={DEMO}"
            )
        x = (images - jnp.array(SHIFT, images.dtype)) / jnp.array(SCALE, images.dtype)
        found, convs = [], iter(self.convs)
        for i, widths in enumerate(SLICES):
            x = nnx.max_pool(x, (2, 2), (2, 2)) if i else x
            for _ in widths:
                x = jax.nn.relu(next(convs)(x))
            found.append(x)
        return tuple(found)

    def heads(self) -> tuple[Float[Array, "F"], ...]:
        """Return the learned weights of LPIPS, 1x1 convolutions to one channel."""
        return tuple(head[...].astype(jnp.float32) for head in self.lins)


def distance(
    network: Network, x: Float[Array, "B Y X C"], y: Float[Array, "B Y X C"]
) -> Float[Array, "B"]:
    """Return the perceptual distance [B] of each pair of images in [-1, 1], in fp32.

    Channels are scaled to unit length. Squared differences are multiplied by the head, averaged
    over the pixels, and summed over the stages. With LpipsVGG16 it is LPIPS v0.1. With any other
    network it should be reported as `network.name`.

    Raises: UserError unless the images have 3 channels.
    Source: Zhang et al. 2018, arXiv:1801.03924, equation 1.
    """
    for images in (x, y):
        if images.shape[-1] != 3:
            raise UserError(
                f"{network.name}: images have {images.shape[-1]} channels, expected 3 (RGB);"
                " convert them, or set the perceptual weight to 0"
            )
    total = jnp.zeros((x.shape[0],), jnp.float32)
    wide = (network.stages(images.astype(jnp.float32)) for images in (x, y))
    for a, b, head in zip(*wide, network.heads(), strict=True):
        different = jnp.square(_unit(a) - _unit(b))  # [B, Y, X, C]
        total += jnp.mean(jnp.sum(different * head, axis=-1), axis=(1, 2))  # [B]
    return total


def _unit(x: Array) -> Array:
    """Return x / (|x| + eps) over the channels. Pixels without features, and their gradients: 0."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    present = square > 0
    length = jnp.sqrt(jnp.where(present, square, 1.0))  # sqrt has no gradient at 0
    return jnp.where(present, x / (length + LPIPS_EPS), 0.0)


class PerceptualNetwork(NamedTuple):
    """The module class of a perceptual network, and the checkpoint that fills it."""

    name: str
    module: type[EfficientNetLite0] | type[LpipsVGG16]
    where: str
    tensors: Tensors
    rules: tuple[Rule, ...]
    sizes: dict[str, int]
    ignore: tuple[str, ...]

    def part(self, prefix: str = "perceptual.") -> Part:
        """Return the part that fills the parameters under `prefix`. It is not exported."""
        where = f"{self.where} (read as {self.name})"
        return Part(prefix, where, self.tensors, self.rules, self.sizes, self.ignore)


def open_perceptual(spec: str) -> PerceptualNetwork:
    """Open `demo:efficientnet-lite0`, or a safetensors file or folder of one of the two networks.

    The network is recognised by its tensors, and all of them are checked.
    Raises: UserError if the file is missing or belongs to another network.
    """
    path = demo_path(spec, "perceptual") or Path(spec).expanduser()
    if not path.exists():
        raise UserError(
            f"perceptual={spec!r}: no such file or folder; expected {DEMO}, or safetensors of VGG16"
            " with LPIPS's heads"
        )
    tensors = TensorFiles.open(path)
    opened = _recognised(spec, tensors)
    template = jax.eval_shape(lambda: opened.module(key=jax.random.key(0)))
    opened.part("").entries(describe(template))
    return opened


def _recognised(spec: str, tensors: Tensors) -> PerceptualNetwork:
    keys = set(tensors.keys())
    if "_conv_stem.weight" in keys:
        rules, sizes, ignore = efficientnet.RULES, efficientnet.SIZES, efficientnet.IGNORE
        return PerceptualNetwork(
            EfficientNetLite0.name, EfficientNetLite0, spec, tensors, rules, sizes, ignore
        )
    for first, rules in VGG_RULES.items():
        if first in keys:
            # The state dict of the lpips package has each head under two names.
            twice = (r"lins\..*",) if "lin0.model.1.weight" in keys else ()
            ignore = (r"classifier\..*", r"scaling_layer\..*", *twice)
            return PerceptualNetwork(LpipsVGG16.name, LpipsVGG16, spec, tensors, rules, {}, ignore)
    some = ", ".join(sorted(keys)[:3]) or "no tensor"
    raise UserError(
        f"perceptual={spec!r} is of another network: expected {' or '.join(VGG_RULES)} (VGG16,"
        " beside lin0.model.1.weight) or _conv_stem.weight"
        f" (EfficientNet-Lite0), found {some}; use {DEMO}"
    )


def _vgg_rules(stem: str) -> tuple[Rule, ...]:
    """Return VGG16's table by torchvision's numbers of layers, which count ReLU and pooling too.

    stem: the beginning of the keys, in which `{slice}` is the number of the slice.
    """
    rules, layer, conv = [], 0, 0
    for k, widths in enumerate(SLICES):
        if k > 0:
            layer += 1  # the pooling
        for _ in widths:
            theirs = f"{stem.format(slice=k + 1)}.{layer}"
            rules.append(Rule(f"{theirs}.weight", f"convs.{conv}.kernel", "o i y x -> y x i o"))
            rules.append(Rule(f"{theirs}.bias", f"convs.{conv}.bias"))
            layer, conv = layer + 2, conv + 1
    return tuple(rules)


_HEADS = tuple(
    Rule(f"{stem}.model.1.weight", "lins.{k}", "1 c 1 1 -> c") for stem in ("lin{k}", "lins.{k}")
)
# Tables by the key of the first convolution: torchvision's layout, and that of the lpips package.
VGG_RULES = {
    "features.0.weight": (*_vgg_rules("features"), *_HEADS),
    "net.slice1.0.weight": (*_vgg_rules("net.slice{slice}"), *_HEADS),
}
