"""UNet2DConditionModel of Stable Diffusion 1.x, 2.x and SDXL, over NHWC latents."""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.kernels.elementwise import recomputed
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.registry import Architecture
from jaxft.nn.conv import (
    ALL_SIDES,
    REPLICATED_KERNEL,
    Conv,
    Downsample,
    ResnetBlock,
    Upsample,
    dense,
    runner,
    spread,
)
from jaxft.nn.embedding import TimeEmbedding, timestep_embedding
from jaxft.nn.linear import Linear
from jaxft.nn.norm import GroupNorm, LayerNorm
from jaxft.weights.rules import Rule


class Added(NamedTuple):
    """SDXL's inputs of the time embedding: pooled text, and original size, crop, target size."""

    text_embeds: Float[Array, "B D"]
    time_ids: Float[Array, "B 6"]


class Shared(NamedTuple):
    """The inputs that all blocks of one call share. `run` calls a module under the remat policy."""

    time: Float[Array, "B D"]
    context: Float[Array, "B S D"]
    keys: PRNGKeyArray | None
    run: Callable[..., Array]


class UNetAttention(nnx.Module):
    """Multi-head attention from image tokens to themselves or to the context. q, k, v: no bias."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, key: PRNGKeyArray):
        q, k, v, out = jax.random.split(key, 4)
        axes, text, std = ("embed", "heads"), (context_dim,), spread(context_dim)
        self.heads = heads
        self.to_q = Linear((dim,), (dim,), axes, key=q, std=spread(dim))
        self.to_k = Linear(text, (dim,), axes, key=k, std=std)
        self.to_v = Linear(text, (dim,), axes, key=v, std=std)
        self.to_out = Linear((dim,), (dim,), axes[::-1], key=out, bias=True, std=spread(dim))

    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        q, k, v = self.to_q(x, keys), self.to_k(context, keys), self.to_v(context, keys)
        q, k, v = (a.reshape(*a.shape[:2], self.heads, -1) for a in (q, k, v))  # [B, T|S, N, H]
        out = attention(q, k, v, causal=False).reshape(x.shape)  # [B, T, D]
        return self.to_out(out, keys)


class FeedForward(nnx.Module):
    """GEGLU: value * gelu(gate), the value first and the gelu exact (arXiv:2002.05202)."""

    def __init__(self, dim: int, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        inner, std = 4 * dim, spread(4 * dim)
        self.proj = dense(dim, 2 * inner, key=first)
        self.out = Linear((inner,), (dim,), ("mlp", "embed"), key=second, bias=True, std=std)

    def __call__(
        self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        value, gate = jnp.split(self.proj(x, keys), 2, axis=-1)  # [B, T, F] each
        return self.out(recomputed(_geglu)(value, gate), keys)


def _geglu(value: Array, gate: Array) -> Array:
    return value * jax.nn.gelu(gate, approximate=False)


class TransformerBlock(nnx.Module):
    """Pre-norm residual block: self-attention, cross-attention, GEGLU."""

    def __init__(self, dim: int, context_dim: int, heads: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        self.norm1 = LayerNorm(dim, eps=1e-5)
        self.attn1 = UNetAttention(dim, dim, heads, key=keys[0])
        self.norm2 = LayerNorm(dim, eps=1e-5)
        self.attn2 = UNetAttention(dim, context_dim, heads, key=keys[1])
        self.norm3 = LayerNorm(dim, eps=1e-5)
        self.ff = FeedForward(dim, key=keys[2])

    def __call__(
        self, x: Float[Array, "B T D"], context: Float[Array, "B S E"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed, keys)
        x = x + self.attn2(self.norm2(x), context, keys)
        return x + self.ff(self.norm3(x), keys)


class Transformer2D(nnx.Module):
    """A stack of transformer blocks, run by a scan with all pixels as tokens, added to its input.

    proj_in and proj_out are matrices here. In the file they are linear layers or 1x1 convolutions
    (see `rules`). The eps of its norm is 1e-6, unlike all others.
    """

    def __init__(self, cfg: UNetConfig, level: int, *, key: PRNGKeyArray):
        dim, depth = cfg.channels[level], cfg.depths[level]
        first, second, third = jax.random.split(key, 3)
        self.norm = GroupNorm(dim, groups=cfg.groups, eps=1e-6)
        self.proj_in = dense(dim, dim, key=first)
        self.transformer_blocks = jax.vmap(
            lambda key: TransformerBlock(dim, cfg.context_dims[level], cfg.heads[level], key=key)
        )(jax.random.split(second, depth))  # leaves [depth, ...]
        self.proj_out = dense(dim, dim, key=third)
        self.depth = depth

    def __call__(self, x: Float[Array, "B Y X C"], shared: Shared) -> Float[Array, "B Y X C"]:
        tokens = self.norm(x).reshape(x.shape[0], -1, x.shape[-1])  # [B, Y X, C]
        tokens = self.proj_in(tokens, shared.keys)

        def body(tokens: Array, layer: tuple[TransformerBlock, Array]) -> tuple[Array, None]:
            block, index = layer
            keys = shared.keys
            if keys is not None:
                # The layers of a scan share the keys, but not their dropout masks.
                keys = jax.vmap(jax.random.fold_in, (0, None))(keys, index)
            return shared.run(block, tokens, shared.context, keys), None

        layers = (self.transformer_blocks, jnp.arange(self.depth))
        # A loop around one block would only copy its weights: 0 unrolls the scan.
        tokens, _ = jax.lax.scan(body, tokens, layers, unroll=int(self.depth > 1))
        return x + self.proj_out(tokens, shared.keys).reshape(x.shape)  # [B, Y, X, C]


class DownBlock(nnx.Module):
    """One level on the way down. Returns its output, and the skips for the way up."""

    def __init__(self, cfg: UNetConfig, level: int, *, key: PRNGKeyArray):
        keys, width = _stream(key), cfg.channels[level]
        count, last = cfg.layers[level], level == len(cfg.channels) - 1
        # Input channels of the resnets. The first one gets the output of the level before.
        inputs = [cfg.channels[max(level - 1, 0)], *[width] * (count - 1)]
        self.resnets = nnx.List([_resnet(cfg, n, width, next(keys)) for n in inputs])
        attending = range(count if cfg.down_attends[level] else 0)
        self.attentions = nnx.List([Transformer2D(cfg, level, key=next(keys)) for _ in attending])
        samplers = [] if last else [Downsample(width, ALL_SIDES, key=next(keys))]
        self.downsamplers = nnx.List(samplers)

    def __call__(
        self, x: Float[Array, "B Y X C"], shared: Shared
    ) -> tuple[Float[Array, "B Y2 X2 F"], list[Array]]:
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = shared.run(resnet, x, shared.time, shared.keys)
            if self.attentions:
                x = self.attentions[i](x, shared)
            skips.append(x)
        for sampler in self.downsamplers:
            x = sampler(x, shared.keys)
            skips.append(x)
        return x, skips


class MidBlock(nnx.Module):
    """The level of the smallest images: a resnet, then attention and a resnet."""

    def __init__(self, cfg: UNetConfig, *, key: PRNGKeyArray):
        keys, width = _stream(key), cfg.channels[-1]
        self.resnets = nnx.List([_resnet(cfg, width, width, next(keys)) for _ in range(2)])
        self.attentions = nnx.List([Transformer2D(cfg, -1, key=next(keys))])

    def __call__(self, x: Float[Array, "B Y X C"], shared: Shared) -> Float[Array, "B Y X C"]:
        x = shared.run(self.resnets[0], x, shared.time, shared.keys)
        x = self.attentions[0](x, shared)
        return shared.run(self.resnets[1], x, shared.time, shared.keys)


class UpBlock(nnx.Module):
    """One level on the way up. Every resnet takes one skip, beginning with the last one made."""

    def __init__(self, cfg: UNetConfig, level: int, *, key: PRNGKeyArray):
        keys, width = _stream(key), cfg.channels[level]
        count, top = cfg.layers[level] + 1, len(cfg.channels) - 1
        # The input of a resnet is the output before it, concatenated with a skip. The last skip of
        # a level was the input of the same level on the way down.
        before = [cfg.channels[min(level + 1, top)], *[width] * (count - 1)]
        skips = [*[width] * (count - 1), cfg.channels[max(level - 1, 0)]]
        inputs = [x + skip for x, skip in zip(before, skips, strict=True)]
        self.resnets = nnx.List([_resnet(cfg, n, width, next(keys)) for n in inputs])
        # The config lists up blocks in their order, which begins with the smallest images.
        attending = range(count if cfg.up_attends[top - level] else 0)
        self.attentions = nnx.List([Transformer2D(cfg, level, key=next(keys)) for _ in attending])
        self.upsamplers = nnx.List([Upsample(width, key=next(keys))] if level else [])

    def __call__(
        self, x: Float[Array, "B Y X C"], skips: list[Array], shared: Shared
    ) -> Float[Array, "B Y2 X2 F"]:
        """Pop the level's skips off the list. The size of the next skip is that of the result."""
        for i, resnet in enumerate(self.resnets):
            x = jnp.concatenate([x, skips.pop()], axis=-1)  # [B, Y, X, C + skip's C]
            x = shared.run(resnet, x, shared.time, shared.keys)
            if self.attentions:
                x = self.attentions[i](x, shared)
        for sampler in self.upsamplers:
            _, height, breadth, _ = skips[-1].shape
            x = sampler(x, (height, breadth), shared.keys)
        return x


class UNet(nnx.Module):
    """Noisy latents, their timesteps and the embedded text to the model's prediction."""

    def __init__(self, cfg: UNetConfig, *, key: PRNGKeyArray):
        keys, width = _stream(key), cfg.channels[0]
        levels = range(len(cfg.channels))
        self.cfg = cfg
        self.conv_in = Conv(
            cfg.in_channels, width, 3, key=next(keys), padding=1, axes=REPLICATED_KERNEL
        )
        self.time_embedding = TimeEmbedding(width, cfg.time_dim, key=next(keys))
        added = cfg.added_dim and TimeEmbedding(cfg.added_dim, cfg.time_dim, key=next(keys))
        self.add_embedding = nnx.data(added or None)
        self.down_blocks = nnx.List([DownBlock(cfg, i, key=next(keys)) for i in levels])
        self.mid_block = MidBlock(cfg, key=next(keys))
        self.up_blocks = nnx.List([UpBlock(cfg, i, key=next(keys)) for i in reversed(levels)])
        self.conv_norm_out = GroupNorm(width, groups=cfg.groups, eps=cfg.eps)
        self.conv_out = Conv(
            width, cfg.out_channels, 3, key=next(keys), padding=1, axes=REPLICATED_KERNEL
        )

    def __call__(
        self,
        latents: Float[Array, "B Y X C"],
        timesteps: Float[Array, " B"],
        context: Float[Array, "B S D"],
        added: Added | None = None,
        *,
        dtype: Any = None,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
    ) -> Float[Array, "B Y X F"]:
        """Return the prediction in `dtype`: epsilon or v, by the schedule that it was trained with.

        latents: of any Y and X. Levels round odd sizes up, and the way up crops them again.
        timesteps: integers or fractions in 0 ... 999. added: for SDXL, and only for SDXL. dtype: of
        the computation, by default that of the latents. keys: one a row, for the dropout of
        adapters. remat: a key of conv.CONV_REMAT, or "none".
        Raises: ValueError for `added` that does not fit the model.
        """
        dtype = latents.dtype if dtype is None else dtype
        run = runner(remat)
        time = self._time(timesteps, added, dtype, keys)
        shared = Shared(time, context.astype(dtype), keys, run)
        x = constrain(self.conv_in(latents.astype(dtype), keys), "batch", None, None, None)
        skips = [x]
        for block in self.down_blocks:
            x, made = block(x, shared)
            skips += made
        x = self.mid_block(x, shared)
        for block in self.up_blocks:
            x = block(x, skips, shared)
        return self.conv_out(jax.nn.silu(self.conv_norm_out(x)), keys)  # [B, Y, X, F]

    def _time(
        self, timesteps: Array, added: Added | None, dtype: Any, keys: PRNGKeyArray | None
    ) -> Array:
        cfg = self.cfg
        if (added is None) != (self.add_embedding is None):
            wants = "no" if added else "text_embeds and time_ids as"
            raise ValueError(f"this UNet takes {wants} `added` (addition_embed_type text_time)")

        def embed(numbers: Array, dim: int) -> Array:
            return timestep_embedding(
                numbers, dim, cos_first=cfg.cos_first, freq_shift=cfg.freq_shift
            )

        time = self.time_embedding(embed(timesteps, cfg.channels[0]).astype(dtype), keys)  # [B, D]
        if added is not None and self.add_embedding is not None and cfg.added_time_dim:
            text, ids = added
            ids = embed(ids, cfg.added_time_dim).reshape(len(ids), -1)  # [B, 6 added_time_dim]
            both = jnp.concatenate([text.astype(dtype), ids.astype(dtype)], axis=-1)  # [B, F]
            time = time + self.add_embedding(both, keys)
        return time


def _resnet(cfg: UNetConfig, inputs: int, outputs: int, key: PRNGKeyArray) -> ResnetBlock:
    return ResnetBlock(
        inputs, outputs, key=key, groups=cfg.groups, eps=cfg.eps, time_dim=cfg.time_dim
    )


def _stream(key: PRNGKeyArray) -> Iterator[PRNGKeyArray]:
    while True:
        key, one = jax.random.split(key)
        yield one


def rules(cfg: UNetConfig) -> tuple[Rule, ...]:
    """Return the weight table of a diffusers unet/ folder. 1x1 convolutions become matrices."""
    layout = _DENSE if cfg.linear_projection else "o i 1 1 -> i o"
    return (*RULES, Rule("{p}.proj_{pq}.weight", "{p}.proj_{pq}.kernel", layout))


_CONV, _DENSE = "o i y x -> y x i o", "o i -> i o"
_T, _J = "{p}.transformer_blocks.{i}.", "{p}.transformer_blocks."
# A tensor has only one rule whose path is a parameter of the model, although several keys match.
RULES = (
    Rule("{p}.weight", "{p}.scale"),
    Rule("{p}.bias", "{p}.bias"),
    Rule("conv_{p}.weight", "conv_{p}.kernel", _CONV),
    Rule("{p}.conv.weight", "{p}.conv.kernel", _CONV),
    Rule("{p}.conv{m}.weight", "{p}.conv{m}.kernel", _CONV),
    Rule("{p}.conv_shortcut.weight", "{p}.conv_shortcut.kernel", _CONV),
    Rule("{p}.time_emb_proj.weight", "{p}.time_emb_proj.kernel", _DENSE),
    Rule("{p}_embedding.linear_{m}.weight", "{p}_embedding.linear_{m}.kernel", _DENSE),
    Rule(_T + "norm{m}.weight", _J + "norm{m}.scale"),
    Rule(_T + "norm{m}.bias", _J + "norm{m}.bias"),
    Rule(_T + "attn{m}.to_out.0.weight", _J + "attn{m}.to_out.kernel", _DENSE),
    Rule(_T + "attn{m}.to_out.0.bias", _J + "attn{m}.to_out.bias"),
    Rule(_T + "attn{m}.to_{pq}.weight", _J + "attn{m}.to_{pq}.kernel", _DENSE),
    Rule(_T + "ff.net.0.proj.weight", _J + "ff.proj.kernel", _DENSE),
    Rule(_T + "ff.net.0.proj.bias", _J + "ff.proj.bias"),
    Rule(_T + "ff.net.2.weight", _J + "ff.out.kernel", _DENSE),
    Rule(_T + "ff.net.2.bias", _J + "ff.out.bias"),
)

ARCHITECTURE = Architecture(
    family="denoiser",
    class_name=lambda config: "UNet2DConditionModel",
    config=UNetConfig.from_hf,
    module=UNet,
    rules=rules,
)
