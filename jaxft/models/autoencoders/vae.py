"""AutoencoderKL of SD 1.x, 2.x, SDXL and the 16-channel models, and AutoencoderKLFlux2.

They are images to latents and back.
"""

from collections.abc import Iterable
from itertools import zip_longest
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.params import CONSTANT_ROLE
from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.autoencoders.vq_config import VQConfig
from jaxft.models.registry import Architecture
from jaxft.nn.conv import (
    BOTTOM_RIGHT,
    REPLICATED_KERNEL,
    Conv,
    Downsample,
    ResnetBlock,
    Upsample,
    dense,
    runner,
)
from jaxft.nn.norm import GroupNorm
from jaxft.weights.rules import Rule

VAE_EPS = 1e-6  # of every norm. No config.json has it


# The sizes of an encoder and its decoder. `down_attends` and `up_attends` mark, in the order of the
# blocks, those with attention after each resnet. `moments` counts the channels of the encoder.
Levels = VAEConfig | VQConfig


class Moments(NamedTuple):
    """The posterior of images, in fp32. Its mode is `mean`. A cache of latents holds it."""

    mean: Float[Array, "B Y X C"]
    logvar: Float[Array, "B Y X C"]


def sample(moments: Moments, keys: PRNGKeyArray) -> Float[Array, "B Y X C"]:
    """Return mean + std * noise, unscaled latents.

    keys: one a row, so that the noise of a row does not depend on its batch.
    """
    shape = moments.mean.shape[1:]
    noise = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)  # [B, Y, X, C]
    return moments.mean + jnp.exp(0.5 * moments.logvar) * noise


class PixelAttention(nnx.Module):
    """Residual block x + attention(norm(x)) over all pixels, with one head as wide as x."""

    def __init__(self, width: int, groups: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.group_norm = GroupNorm(width, groups=groups, eps=VAE_EPS)
        self.to_q = dense(width, width, key=keys[0])
        self.to_k = dense(width, width, key=keys[1])
        self.to_v = dense(width, width, key=keys[2])
        self.to_out = dense(width, width, key=keys[3])

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        batch, _, _, width = x.shape
        pixels = self.group_norm(x).reshape(batch, -1, 1, width)  # [B, Y X, 1, C]
        q, k, v = self.to_q(pixels), self.to_k(pixels), self.to_v(pixels)  # [B, Y X, 1, C]
        return x + self.to_out(attention(q, k, v, causal=False)).reshape(x.shape)  # [B, Y, X, C]


class VAEMidBlock(nnx.Module):
    """Two resnets, with attention between them if `cfg.mid_attention`."""

    def __init__(self, cfg: Levels, *, key: PRNGKeyArray):
        first, second, third = jax.random.split(key, 3)
        width = cfg.widths[-1]
        self.resnets = nnx.List([_resnet(cfg, width, width, key=k) for k in (first, second)])
        attentions = [PixelAttention(width, cfg.groups, key=third)] if cfg.mid_attention else []
        self.attentions = nnx.List(attentions)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        return _in_turn(self.resnets, self.attentions, x)


class VAEDownBlock(nnx.Module):
    """Resnets, with attention after each if the level has it. All but the last level downsample."""

    def __init__(self, cfg: Levels, level: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 2 * cfg.layers + 1)
        before, width = cfg.widths[max(level - 1, 0)], cfg.widths[level]
        inputs = [before] + [width] * (cfg.layers - 1)  # channels of each resnet
        self.resnets = nnx.List(
            [_resnet(cfg, one, width, key=k) for one, k in zip(inputs, keys, strict=False)]
        )
        rest = keys[cfg.layers + 1 :] if cfg.down_attends[level] else ()
        self.attentions = nnx.List([PixelAttention(width, cfg.groups, key=k) for k in rest])
        last = level == len(cfg.widths) - 1
        down = [] if last else [Downsample(width, BOTTOM_RIGHT, key=keys[cfg.layers])]
        self.downsamplers = nnx.List(down)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        x = _in_turn(self.resnets, self.attentions, x)
        for layer in self.downsamplers:
            x = layer(x)
        return x


class VAEUpBlock(nnx.Module):
    """Resnets, one more than on the way down, with attention after each if the level has it.

    All but the first level upsample.
    """

    def __init__(self, cfg: Levels, level: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 2 * cfg.layers + 3)
        before, width = cfg.widths[min(level + 1, len(cfg.widths) - 1)], cfg.widths[level]
        inputs = [before] + [width] * cfg.layers  # channels of each resnet
        self.resnets = nnx.List(
            [_resnet(cfg, one, width, key=k) for one, k in zip(inputs, keys, strict=False)]
        )
        # The config lists up blocks in their order, which begins with the smallest images.
        rest = keys[cfg.layers + 2 :] if cfg.up_attends[-1 - level] else ()
        self.attentions = nnx.List([PixelAttention(width, cfg.groups, key=k) for k in rest])
        up = [] if level == 0 else [Upsample(width, key=keys[cfg.layers + 1])]
        self.upsamplers = nnx.List(up)

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        x = _in_turn(self.resnets, self.attentions, x)
        for layer in self.upsamplers:
            x = layer(x)
        return x


class VAEEncoder(nnx.Module):
    """Images to the input of the quant convolution: moments, or the latents of a VQ tokenizer."""

    def __init__(self, cfg: Levels, *, key: PRNGKeyArray):
        keys = jax.random.split(key, len(cfg.widths) + 3)
        first, last = cfg.widths[0], cfg.widths[-1]
        self.conv_in = Conv(cfg.in_channels, first, 3, key=keys[0], padding=1)
        levels = range(len(cfg.widths))
        self.down_blocks = nnx.List([VAEDownBlock(cfg, i, key=keys[i + 3]) for i in levels])
        self.mid_block = VAEMidBlock(cfg, key=keys[1])
        self.conv_norm_out = GroupNorm(last, groups=cfg.groups, eps=VAE_EPS)
        self.conv_out = Conv(last, cfg.moments, 3, key=keys[2], padding=1, axes=REPLICATED_KERNEL)

    def __call__(
        self, x: Float[Array, "B Y X C"], remat: str = "none"
    ) -> Float[Array, "B Y2 X2 F"]:
        x, run = _pinned(self.conv_in(x)), runner(remat)
        for block in (*self.down_blocks, self.mid_block):
            x = run(block, x)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)))


class VAEDecoder(nnx.Module):
    """Latents after the post-quant convolution to images."""

    def __init__(self, cfg: Levels, *, key: PRNGKeyArray):
        keys = jax.random.split(key, len(cfg.widths) + 3)
        first, last = cfg.widths[0], cfg.widths[-1]
        self.conv_in = Conv(cfg.latent_channels, last, 3, key=keys[0], padding=1)
        self.mid_block = VAEMidBlock(cfg, key=keys[1])
        levels = reversed(range(len(cfg.widths)))
        self.up_blocks = nnx.List([VAEUpBlock(cfg, i, key=keys[i + 3]) for i in levels])
        self.conv_norm_out = GroupNorm(first, groups=cfg.groups, eps=VAE_EPS)
        self.conv_out = Conv(
            first, cfg.out_channels, 3, key=keys[2], padding=1, axes=REPLICATED_KERNEL
        )

    def __call__(self, x: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        return self.conv_out(self.features(x))

    def features(
        self, x: Float[Array, "B Y X C"], remat: str = "none"
    ) -> Float[Array, "B Y2 X2 F"]:
        """Return the input of the last convolution, `conv_out`."""
        x, run = _pinned(self.conv_in(x)), runner(remat)
        for block in (self.mid_block, *self.up_blocks):
            x = run(block, x)
        return jax.nn.silu(self.conv_norm_out(x))


class LatentStatistics(nnx.Module):
    """Mean and variance of each channel and place of 2 x 2 latents, by which FLUX.2 scales them.

    In torch it is a batch norm of the 4 C channels of patches, in the order channel, row, column.
    It never trains.
    """

    def __init__(self, channels: int, eps: float):
        self.mean = nnx.Param(jnp.zeros((4 * channels,)), axes=("norm",), role=CONSTANT_ROLE)
        self.var = nnx.Param(jnp.ones((4 * channels,)), axes=("norm",), role=CONSTANT_ROLE)
        self.eps = eps

    def normalise(self, latents: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Return (z - mean) / sqrt(variance + eps) of latents with even Y and X, in fp32."""
        mean, std = self._by_place()
        return ((_cells(latents) - mean) / std).reshape(latents.shape)  # [B, Y, X, C]

    def restore(self, latents: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Return the inverse of `normalise`."""
        mean, std = self._by_place()
        return (_cells(latents) * std + mean).reshape(latents.shape)  # [B, Y, X, C]

    def _by_place(self) -> tuple[Float[Array, "2 1 2 C"], Float[Array, "2 1 2 C"]]:
        std = jnp.sqrt(self.var[...].astype(jnp.float32) + self.eps)
        both = (self.mean[...].astype(jnp.float32), std)
        mean, std = (x.reshape(-1, 2, 2).transpose(1, 2, 0) for x in both)  # [2, 2, C]
        return mean[:, None], std[:, None]


def _cells(latents: Float[Array, "B Y X C"]) -> Float[Array, "B y 2 x 2 C"]:
    b, y, x, c = latents.shape
    return latents.reshape(b, y // 2, 2, x // 2, 2, c).astype(jnp.float32)  # [B, Y/2, 2, X/2, 2, C]


class VAE(nnx.Module):
    """The whole autoencoder. It computes in the dtype of its input.

    remat: a key of conv.CONV_REMAT, for the blocks of encoder and decoder, or "none".
    """

    def __init__(self, cfg: VAEConfig, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.cfg = cfg
        self.encoder = VAEEncoder(cfg, key=keys[0])
        self.decoder = VAEDecoder(cfg, key=keys[1])
        both, one = 2 * cfg.latent_channels, cfg.latent_channels  # both moments, or latents
        quant = Conv(both, both, 1, key=keys[2], axes=REPLICATED_KERNEL) if cfg.quant_conv else None
        self.quant_conv = nnx.data(quant)
        post = (
            Conv(one, one, 1, key=keys[3], axes=REPLICATED_KERNEL) if cfg.post_quant_conv else None
        )
        self.post_quant_conv = nnx.data(post)
        own = None if cfg.norm_eps is None else LatentStatistics(one, cfg.norm_eps)
        self.bn = nnx.data(own)

    def scale(self, latents: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Return latents scaled for the diffusion model."""
        return self.cfg.scale(latents) if self.bn is None else self.bn.normalise(latents)

    def unscale(self, latents: Float[Array, "B Y X C"]) -> Float[Array, "B Y X C"]:
        """Return latents for the decoder: the inverse of `scale`."""
        return self.cfg.unscale(latents) if self.bn is None else self.bn.restore(latents)

    def encode(self, images: Float[Array, "B Y X C"], remat: str = "none") -> Moments:
        """Return fp32 moments of images [B, Y, X, 3] in [-1, 1], `cfg.factor` times smaller."""
        x = self.encoder(images, remat)
        x = x if self.quant_conv is None else self.quant_conv(x)
        mean, logvar = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, Y2, X2, C]
        # At a limit the gradient is 1, as in torch's clamp. That of jnp.clip would be 1 / 2.
        inside = (logvar >= -30.0) & (logvar <= 20.0)
        return Moments(mean, jnp.where(inside, logvar, jnp.clip(logvar, -30.0, 20.0)))

    def decode(self, latents: Float[Array, "B Y X C"]) -> Float[Array, "B Y2 X2 F"]:
        """Return the images of unscaled latents (`unscale`), mostly within [-1, 1]."""
        return self.decoder.conv_out(self.features(latents))

    def features(
        self, latents: Float[Array, "B Y X C"], remat: str = "none"
    ) -> Float[Array, "B Y2 X2 F"]:
        """Return the input of `decoder.conv_out`."""
        x = latents if self.post_quant_conv is None else self.post_quant_conv(latents)
        return self.decoder.features(x, remat)


def _resnet(cfg: Levels, inputs: int, outputs: int, *, key: PRNGKeyArray) -> ResnetBlock:
    return ResnetBlock(inputs, outputs, key=key, groups=cfg.groups, eps=VAE_EPS)


def _in_turn(
    resnets: Iterable[ResnetBlock], attentions: Iterable[PixelAttention], x: Float[Array, "B Y X C"]
) -> Float[Array, "B Y X F"]:
    """Apply the resnets, each followed by its attention if there is one."""
    for resnet, attend in zip_longest(resnets, attentions):
        x = resnet(x)
        x = x if attend is None else attend(x)
    return x


def _pinned(x: Array) -> Array:
    return constrain(x, "batch", None, None, None)


def sizes(cfg: VAEConfig) -> dict[str, int]:
    """Return the dims that RULES' layouts name: none."""
    return {}


_CONV, _DENSE, _DENSE_OF_CONV = "o i y x -> y x i o", "o i -> i o", "o i 1 1 -> i o"
# Names of attention's projections in diffusers before 0.12, and in the hub's SD 1 and 2 even today.
_OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out"}
# A tensor has only one rule whose path is a parameter of the model, although several keys match.
RULES = (
    Rule("{p}.to_out.0.weight", "{p}.to_out.kernel", _DENSE),
    Rule("{p}.to_out.0.bias", "{p}.to_out.bias"),
    Rule("{p}.to_{pq}.weight", "{p}.to_{pq}.kernel", _DENSE),
    *(Rule(f"{{p}}.{old}.weight", f"{{p}}.{new}.kernel", _DENSE) for old, new in _OLD.items()),
    Rule("bn.running_mean", "bn.mean"),
    Rule("bn.running_var", "bn.var"),
    Rule("{p}_conv.weight", "{p}_conv.kernel", _CONV),
    Rule("{p}.conv.weight", "{p}.conv.kernel", _CONV),
    Rule("{p}.conv{m}.weight", "{p}.conv{m}.kernel", _CONV),
    Rule("{p}.conv_{pq}.weight", "{p}.conv_{pq}.kernel", _CONV),
    Rule("{p}.weight", "{p}.scale"),
    Rule("{p}.bias", "{p}.bias"),
    *(Rule(f"{{p}}.{old}.bias", f"{{p}}.{new}.bias") for old, new in _OLD.items()),
)

VAE_IGNORE = (r"bn\.num_batches_tracked",)  # a counter of torch's batch norm

ARCHITECTURE = Architecture(
    family="autoencoder",
    class_name=lambda config: "AutoencoderKL",
    config=VAEConfig.from_hf,
    module=VAE,
    rules=lambda cfg: RULES,
    sizes=sizes,
)


def ldm_rules(up: tuple[int, ...]) -> tuple[Rule, ...]:
    """Return the weight table for the names of taming-transformers.

    up: the number of the file's `decoder.up.N` for each up block. Taming and LDM count from the
    image, and others from the latents. The projections of attention are 1x1 convolutions.
    """
    mid = "{p}.mid."
    attns = [(f"{mid}attn_1", "{p}.mid_block.attentions.0")]
    attns.append(("encoder.down.{m}.attn.{n}", "encoder.down_blocks.{m}.attentions.{n}"))
    blocks = [(f"{mid}block_{i + 1}", f"{{p}}.mid_block.resnets.{i}") for i in range(2)]
    blocks.append(("encoder.down.{m}.block.{n}", "encoder.down_blocks.{m}.resnets.{n}"))
    convs = [("{p}_conv", "{p}_conv"), ("{p}.conv_in", "{p}.conv_in"), ("{p}.conv_out",) * 2]
    convs.append(
        ("encoder.down.{m}.downsample.conv", "encoder.down_blocks.{m}.downsamplers.0.conv")
    )
    for i, level in enumerate(up):
        theirs, ours = f"decoder.up.{level}.", f"decoder.up_blocks.{i}."
        blocks.append((theirs + "block.{n}", ours + "resnets.{n}"))
        attns.append((theirs + "attn.{n}", ours + "attentions.{n}"))
        convs.append((theirs + "upsample.conv", ours + "upsamplers.0.conv"))
    # A block is a resnet: two convolutions, two norms, and a 1x1 convolution as its shortcut.
    for theirs, ours in blocks:
        convs.append((theirs + ".conv{k}", ours + ".conv{k}"))
        convs.append((theirs + ".nin_shortcut", ours + ".conv_shortcut"))
    norms = [(theirs + ".norm{k}", ours + ".norm{k}") for theirs, ours in blocks]
    norms += [("{p}.norm_out", "{p}.conv_norm_out")]
    norms += [(f"{theirs}.norm", f"{ours}.group_norm") for theirs, ours in attns]
    names = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out"}
    dense = [(f"{theirs}.{a}", f"{ours}.{b}") for theirs, ours in attns for a, b in names.items()]
    kinds = ((convs, "kernel", _CONV), (dense, "kernel", _DENSE_OF_CONV), (norms, "scale", ""))
    return tuple(
        rule
        for stems, leaf, layout in kinds
        for theirs, ours in stems
        for rule in (
            Rule(theirs + ".weight", f"{ours}.{leaf}", layout),
            Rule(theirs + ".bias", ours + ".bias"),
        )
    )
