"""Flux2Transformer2DModel of FLUX.2 klein, over NHWC latents.

It is FLUX.1 without biases and pooled text. All blocks of a kind share one modulation, MLPs are
gated, and a block of the whole sequence has one projection at its beginning and one at its end.
Source: black-forest-labs/flux2, src/flux2/model.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.models.denoisers.flux.flux import TIMES, pack, unpack
from jaxft.models.denoisers.flux.flux2_config import Flux2Config
from jaxft.models.denoisers.flux.flux_config import PATCH
from jaxft.models.denoisers.joint import (
    Modulation,
    Rotation,
    StreamProjections,
    Tokens,
    add_mlp,
    check_sides,
    linear_rules,
    scan_blocks,
)
from jaxft.models.registry import Architecture
from jaxft.nn.conv import dense, runner, spread
from jaxft.nn.embedding import TimeEmbedding, timestep_embedding
from jaxft.nn.gated import gated
from jaxft.nn.linear import Linear
from jaxft.nn.norm import RMSNorm, adaptive_layer_norm
from jaxft.nn.rope import grid_cos_sin, rotate_neighbours
from jaxft.weights.rules import Rule

Chunks = list[Float[Array, "B D"]]  # shifts, scales and gates


class FusedMLP(nnx.Module):
    """silu(first half) * second half of one projection, then another. There are no biases."""

    def __init__(self, dim: int, width: int, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        self.linear_in = dense(dim, 2 * width, key=first, bias=False)
        self.linear_out = Linear((width,), (dim,), ("mlp", "embed"), key=second, std=spread(width))

    def __call__(
        self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        gate, up = jnp.split(self.linear_in(x, keys), 2, axis=-1)  # [B, T, F] each
        return self.linear_out(gated(gate, up, "silu"), keys)


class SharedModulationBlock(nnx.Module):
    """Joint attention of image and text, and an MLP for each of the two."""

    def __init__(self, cfg: Flux2Config, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 4)
        self.attn = StreamProjections(cfg, key=keys[0], bias=False, eps=cfg.eps)
        self.attn_context = StreamProjections(cfg, key=keys[1], bias=False, eps=cfg.eps)
        self.ff = FusedMLP(cfg.dim, cfg.mlp_dim, key=keys[2])
        self.ff_context = FusedMLP(cfg.dim, cfg.mlp_dim, key=keys[3])
        self.eps = cfg.eps

    def __call__(
        self,
        tokens: Tokens,
        modulations: tuple[Chunks, Chunks],
        keys: PRNGKeyArray | None,
        ropes: tuple[Rotation, Rotation],
    ) -> Tokens:
        """Return the tokens of the image and of the text.

        modulations, ropes: those of the image, and of the text.
        """
        streams, heads = (self.attn, self.attn_context), []
        for stream, x, (shift, scale, *_), rope in zip(
            streams, tokens, modulations, ropes, strict=True
        ):
            heads.append(stream(adaptive_layer_norm(x, shift, scale, self.eps), keys, rope))
        q, k, v = (jnp.concatenate(pair, axis=1) for pair in zip(*heads, strict=True))
        made = attention(q, k, v, causal=False)  # [B, T + S, N, H]
        x, text = tokens
        count, (image, words) = x.shape[1], modulations
        x = x + image[2][:, None] * self.attn.output(made[:, :count], keys)
        text = text + words[2][:, None] * self.attn_context.output(made[:, count:], keys)
        x = add_mlp(self.ff, x, image[3:], self.eps, keys)
        return x, add_mlp(self.ff_context, text, words[3:], self.eps, keys)


class ParallelBlock(nnx.Module):
    """Attention of image and text in one sequence, and an MLP beside it.

    One projection makes queries, keys, values and both halves of the MLP. Another takes the heads
    and the MLP's product.
    """

    def __init__(self, cfg: Flux2Config, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        dim, width, self.heads, self.eps = cfg.dim, cfg.mlp_dim, cfg.heads, cfg.eps
        self.to_qkv_mlp_proj = dense(dim, 3 * dim + 2 * width, key=first, bias=False)
        both = dim + width
        self.to_out = Linear((both,), (dim,), ("mlp", "embed"), key=second, std=spread(both))
        self.norm_q, self.norm_k = (RMSNorm(cfg.head_dim, eps=cfg.eps) for _ in range(2))

    def __call__(
        self,
        x: Float[Array, "B T D"],
        modulation: Chunks,
        keys: PRNGKeyArray | None,
        rope: Rotation,
    ) -> Float[Array, "B T D"]:
        """Return the tokens. rope: the rotation of all T places."""
        shift, scale, gate = modulation
        normed = adaptive_layer_norm(x, shift, scale, self.eps)
        made, dim = self.to_qkv_mlp_proj(normed, keys), x.shape[-1]  # [B, T, 3 D + 2 F]
        width = (made.shape[-1] - 3 * dim) // 2
        ends = np.cumsum([dim, dim, dim, width])
        *projected, first, second = jnp.split(made, ends, axis=-1)
        q, k, v = (one.reshape(*x.shape[:2], self.heads, -1) for one in projected)  # [B, T, N, H]
        q, k = (rotate_neighbours(one, *rope) for one in (self.norm_q(q), self.norm_k(k)))
        heads = attention(q, k, v, causal=False).reshape(x.shape)  # [B, T, D]
        both = jnp.concatenate([heads, gated(first, second, "silu")], axis=-1)  # [B, T, D + F]
        return x + gate[:, None] * self.to_out(both, keys)


class Flux2Transformer(nnx.Module):
    """Noisy latents, their sigmas and the embedded text to the model's velocity.

    Blocks are stacked, leaves [layers, ...]: SharedModulationBlocks in `doubles`, ParallelBlocks in
    `singles`.
    """

    def __init__(self, cfg: Flux2Config, *, key: PRNGKeyArray):
        dim, keys = cfg.dim, jax.random.split(key, 10)
        self.cfg = cfg
        packed = cfg.in_channels * PATCH**2
        self.x_embedder = Linear((packed,), (dim,), (None, "mlp"), key=keys[0], std=spread(packed))
        self.time_embedding = TimeEmbedding(cfg.time_dim, dim, key=keys[1], bias=False)
        self.context_embedder = dense(cfg.context_dim, dim, key=keys[2], bias=False)
        self.image_modulation = Modulation(dim, 6, key=keys[3], bias=False)
        self.text_modulation = Modulation(dim, 6, key=keys[4], bias=False)
        self.single_modulation = Modulation(dim, 3, key=keys[5], bias=False)
        doubles = jax.random.split(keys[6], cfg.num_layers)
        self.doubles = jax.vmap(lambda key: SharedModulationBlock(cfg, key=key))(doubles)
        singles = jax.random.split(keys[7], cfg.num_single)
        self.singles = jax.vmap(lambda key: ParallelBlock(cfg, key=key))(singles)
        self.norm_out = Modulation(dim, 2, key=keys[8], bias=False)
        self.proj_out = dense(dim, packed, key=keys[9], bias=False)

    def __call__(
        self,
        latents: Float[Array, "B Y X C"],
        sigma: Float[Array, " B"],
        context: Float[Array, "B S D"],
        *,
        dtype: Any = None,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
    ) -> Float[Array, "B Y X C"]:
        """Return the prediction in `dtype`: the velocity noise - latents.

        latents: of any even Y and X. sigma: in 0 ... 1. context: text embeddings of `context_dim`
        channels, of which all S are keys of attention. dtype: of the computation, by default that
        of the latents. keys: one a row, for the dropout of adapters. remat: a key of
        conv.CONV_REMAT, or "none".
        Raises: UserError for odd sizes.
        """
        dtype, run, cfg = latents.dtype if dtype is None else dtype, runner(remat), self.cfg
        y, x = latents.shape[1:3]
        check_sides(y, x, PATCH)
        sinusoids = timestep_embedding(TIMES * sigma, cfg.time_dim).astype(dtype)
        time = jax.nn.silu(self.time_embedding(sinusoids, keys))
        time = constrain(time, "batch", None)  # [B, D]
        tokens = self.x_embedder(pack(latents.astype(dtype)), keys)  # [B, T, D]
        text = self.context_embedder(context.astype(dtype), keys)  # [B, S, D]
        tokens, text = (constrain(one, "batch", "length", None) for one in (tokens, text))
        ropes = rotations(cfg, (y // PATCH, x // PATCH), text.shape[1])
        shared = self.image_modulation(time, keys), self.text_modulation(time, keys)
        numbers = range(cfg.num_layers)
        pair = scan_blocks(self.doubles, numbers, (tokens, text), shared, keys, run, ropes)
        whole = jnp.concatenate(pair, axis=1)  # [B, T + S, D]
        rope = jax.tree.map(lambda *both: jnp.concatenate(both), *ropes)
        numbers = range(len(numbers), len(numbers) + cfg.num_single)
        single = self.single_modulation(time, keys)
        whole = scan_blocks(self.singles, numbers, whole, single, keys, run, rope)
        scale, shift = self.norm_out(time, keys)
        normed = adaptive_layer_norm(whole[:, : tokens.shape[1]], shift, scale, cfg.eps)
        return unpack(self.proj_out(normed, keys), y, x)


def rotations(cfg: Flux2Config, grid: tuple[int, int], size: int) -> tuple[Rotation, Rotation]:
    """Return the rotations of an image's tokens, and of `size` tokens of text.

    A token of the image has the place (0, row, column, 0), token i of the text (0, 0, 0, i). grid:
    the image's rows and columns.
    """
    image = np.indices((1, *grid, 1)).reshape(4, -1).T  # [T, 4]
    text = np.indices((1, 1, 1, size)).reshape(4, -1).T  # [S, 4]
    turned = (grid_cos_sin(places, cfg.axes, cfg.theta) for places in (image, text))
    first, second = ((jnp.asarray(cos), jnp.asarray(sin)) for cos, sin in turned)
    return first, second


def rules(cfg: Flux2Config) -> tuple[Rule, ...]:
    """Return the weight table of a diffusers transformer/ folder."""
    del cfg
    return RULES


def _weight(key: str, path: str) -> Rule:
    """Return the rule of a projection, of which none here has a bias."""
    return linear_rules(key, path)[0]


_D, _S = "transformer_blocks.{i}.", "single_transformer_blocks.{i}.attn."
RULES = (
    _weight("x_embedder", "x_embedder"),
    _weight("context_embedder", "context_embedder"),
    _weight("time_guidance_embed.timestep_embedder.linear_{m}", "time_embedding.linear_{m}"),
    _weight("double_stream_modulation_img.linear", "image_modulation.linear"),
    _weight("double_stream_modulation_txt.linear", "text_modulation.linear"),
    _weight("single_stream_modulation.linear", "single_modulation.linear"),
    _weight(_D + "attn.to_q", "doubles.attn.to_q"),
    _weight(_D + "attn.to_k", "doubles.attn.to_k"),
    _weight(_D + "attn.to_v", "doubles.attn.to_v"),
    _weight(_D + "attn.to_out.0", "doubles.attn.to_out"),
    _weight(_D + "attn.add_q_proj", "doubles.attn_context.to_q"),
    _weight(_D + "attn.add_k_proj", "doubles.attn_context.to_k"),
    _weight(_D + "attn.add_v_proj", "doubles.attn_context.to_v"),
    _weight(_D + "attn.to_add_out", "doubles.attn_context.to_out"),
    Rule(_D + "attn.norm_q.weight", "doubles.attn.norm_q.scale"),
    Rule(_D + "attn.norm_k.weight", "doubles.attn.norm_k.scale"),
    Rule(_D + "attn.norm_added_q.weight", "doubles.attn_context.norm_q.scale"),
    Rule(_D + "attn.norm_added_k.weight", "doubles.attn_context.norm_k.scale"),
    _weight(_D + "ff.linear_in", "doubles.ff.linear_in"),
    _weight(_D + "ff.linear_out", "doubles.ff.linear_out"),
    _weight(_D + "ff_context.linear_in", "doubles.ff_context.linear_in"),
    _weight(_D + "ff_context.linear_out", "doubles.ff_context.linear_out"),
    _weight(_S + "to_qkv_mlp_proj", "singles.to_qkv_mlp_proj"),
    _weight(_S + "to_out", "singles.to_out"),
    Rule(_S + "norm_q.weight", "singles.norm_q.scale"),
    Rule(_S + "norm_k.weight", "singles.norm_k.scale"),
    _weight("norm_out.linear", "norm_out.linear"),
    _weight("proj_out", "proj_out"),
)

ARCHITECTURE = Architecture(
    family="denoiser",
    class_name=lambda config: "Flux2Transformer2DModel",
    config=Flux2Config.from_hf,
    module=Flux2Transformer,
    rules=rules,
)
