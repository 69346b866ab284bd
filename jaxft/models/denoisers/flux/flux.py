"""FluxTransformer2DModel of FLUX.1 dev and schnell, over NHWC latents.

Its first blocks are those of MMDiT, with rotated positions. In the others, image and text are one
sequence with the same projections, and attention and MLP are computed side by side.
Source: black-forest-labs/flux, src/flux/model.py.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.models.denoisers.flux.flux_config import PATCH, FluxConfig
from jaxft.models.denoisers.joint import (
    JOINT_BLOCK_RULES,
    JOINT_EPS,
    TIME_DIM,
    JointBlock,
    Modulation,
    Rotation,
    StreamProjections,
    check_sides,
    gelu,
    linear_rules,
    scan_blocks,
)
from jaxft.models.registry import Architecture
from jaxft.nn.conv import dense, runner, spread
from jaxft.nn.embedding import TimeEmbedding, timestep_embedding
from jaxft.nn.linear import Linear
from jaxft.nn.norm import adaptive_layer_norm
from jaxft.nn.rope import grid_cos_sin
from jaxft.weights.rules import Rule

TIMES = 1000.0  # of sigma and guidance, before their sinusoids
FLUX_THETA = 10000.0  # of the rotation. No config.json has it


class SingleBlock(nnx.Module):
    """Attention of image and text in one sequence, and an MLP beside it, with one output."""

    def __init__(self, cfg: FluxConfig, *, key: PRNGKeyArray):
        dim, keys = cfg.dim, jax.random.split(key, 4)
        self.norm = Modulation(dim, 3, key=keys[0])
        self.attn = StreamProjections(cfg, key=keys[1], out=False)
        self.proj_mlp = dense(dim, 4 * dim, key=keys[2])
        std = spread(5 * dim)
        self.proj_out = Linear(
            (5 * dim,), (dim,), ("mlp", "embed"), key=keys[3], bias=True, std=std
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        time: Float[Array, "B D"],
        keys: PRNGKeyArray | None,
        rope: Rotation,
    ) -> Float[Array, "B T D"]:
        """Return the tokens. time: after its silu. rope: the rotation of all T places."""
        shift, scale, gate = self.norm(time, keys)
        normed = adaptive_layer_norm(x, shift, scale, JOINT_EPS)
        q, k, v = self.attn(normed, keys, rope)
        heads = attention(q, k, v, causal=False).reshape(x.shape)  # [B, T, D]
        both = jnp.concatenate([heads, gelu(self.proj_mlp(normed, keys))], axis=-1)  # [B, T, 5 D]
        return x + gate[:, None] * self.proj_out(both, keys)


class FluxTransformer(nnx.Module):
    """Noisy latents, their sigmas and the embedded text to the model's velocity.

    Blocks are stacked, leaves [layers, ...]: JointBlocks in `doubles`, SingleBlocks in `singles`.
    """

    def __init__(self, cfg: FluxConfig, *, key: PRNGKeyArray):
        dim, keys = cfg.dim, jax.random.split(key, 9)
        self.cfg = cfg
        packed = cfg.in_channels * PATCH**2
        self.x_embedder = Linear(
            (packed,), (dim,), (None, "mlp"), key=keys[0], bias=True, std=spread(packed)
        )
        self.time_embedding = TimeEmbedding(TIME_DIM, dim, key=keys[1])
        self.text_embedding = TimeEmbedding(cfg.pooled_dim, dim, key=keys[2])
        guidance = TimeEmbedding(TIME_DIM, dim, key=keys[3]) if cfg.guidance else None
        self.guidance_embedding = nnx.data(guidance)
        self.context_embedder = dense(cfg.context_dim, dim, key=keys[4])
        doubles = jax.random.split(keys[5], cfg.num_layers)
        self.doubles = jax.vmap(lambda key: JointBlock(cfg, key=key))(doubles)
        singles = jax.random.split(keys[6], cfg.num_single)
        self.singles = jax.vmap(lambda key: SingleBlock(cfg, key=key))(singles)
        self.norm_out = Modulation(dim, 2, key=keys[7])
        self.proj_out = dense(dim, packed, key=keys[8])

    def __call__(
        self,
        latents: Float[Array, "B Y X C"],
        sigma: Float[Array, " B"],
        context: Float[Array, "B S D"],
        pooled: Float[Array, "B P"],
        guidance: Float[Array, " B"] | None = None,
        *,
        dtype: Any = None,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
    ) -> Float[Array, "B Y X C"]:
        """Return the prediction in `dtype`: the velocity noise - latents.

        latents: of any even Y and X. sigma: in 0 ... 1. context: text embeddings of `context_dim`
        channels, of which all S are keys of attention. pooled: of `pooled_dim` channels. guidance:
        the scale of guidance, for a model that takes one. dtype: of the computation, by default
        that of the latents. keys: one a row, for the dropout of adapters. remat: a key of
        conv.CONV_REMAT, or "none".
        Raises: UserError for odd sizes.
        """
        dtype, run = latents.dtype if dtype is None else dtype, runner(remat)
        y, x = latents.shape[1:3]
        check_sides(y, x, PATCH)
        time = jax.nn.silu(self.time(sigma, pooled, guidance, dtype, keys))
        time = constrain(time, "batch", None)  # [B, D], as all blocks read it
        tokens = self.x_embedder(pack(latents.astype(dtype)), keys)  # [B, T, D]
        text = self.context_embedder(context.astype(dtype), keys)  # [B, S, D]
        tokens, text = (constrain(one, "batch", "length", None) for one in (tokens, text))
        cos, sin = rotation(self.cfg, y // PATCH, x // PATCH)
        rope = jnp.asarray(cos), jnp.asarray(sin)
        numbers = range(self.cfg.num_layers)
        pair = scan_blocks(self.doubles, numbers, (tokens, text), time, keys, run, rope)
        whole = jnp.concatenate(pair, axis=1)  # [B, T + S, D]
        # All places of text are 0, which is no rotation.
        blank = ((0, text.shape[1]), (0, 0))
        rope = jnp.pad(rope[0], blank, constant_values=1.0), jnp.pad(rope[1], blank)
        numbers = range(len(numbers), len(numbers) + self.cfg.num_single)
        whole = scan_blocks(self.singles, numbers, whole, time, keys, run, rope)
        scale, shift = self.norm_out(time, keys)
        normed = adaptive_layer_norm(whole[:, : tokens.shape[1]], shift, scale, JOINT_EPS)
        return unpack(self.proj_out(normed, keys), y, x)

    def time(
        self,
        sigma: Float[Array, " B"],
        pooled: Float[Array, "B P"],
        guidance: Float[Array, " B"] | None,
        dtype: Any,
        keys: PRNGKeyArray | None,
    ) -> Float[Array, "B D"]:
        """Return the embedding of sigma, pooled text and, for a model that takes it, guidance."""

        def sinusoids(numbers: Array) -> Array:
            return timestep_embedding(TIMES * numbers, TIME_DIM).astype(dtype)  # [B, TIME_DIM]

        time = self.time_embedding(sinusoids(sigma), keys)
        if self.guidance_embedding is not None:
            assert guidance is not None
            time = time + self.guidance_embedding(sinusoids(guidance), keys)
        return time + self.text_embedding(pooled.astype(dtype), keys)


def pack(latents: Float[Array, "B Y X C"]) -> Float[Array, "B T K"]:
    """Return tokens of 2 x 2 latents. Each holds channel after channel, its rows and columns."""
    b, y, x, c = latents.shape
    cells = latents.reshape(b, y // PATCH, PATCH, x // PATCH, PATCH, c)  # [B, Y/2, 2, X/2, 2, C]
    return cells.transpose(0, 1, 3, 5, 2, 4).reshape(b, -1, c * PATCH**2)  # [B, T, 4 C]


def unpack(tokens: Float[Array, "B T K"], y: int, x: int) -> Float[Array, "B Y X C"]:
    """Return latents of y rows and x columns: the inverse of `pack`."""
    cells = tokens.reshape(len(tokens), y // PATCH, x // PATCH, -1, PATCH, PATCH)
    return cells.transpose(0, 1, 4, 2, 5, 3).reshape(len(tokens), y, x, -1)  # [B, Y, X, C]


def rotation(
    cfg: FluxConfig, rows: int, columns: int
) -> tuple[Float[np.ndarray, "T half"], Float[np.ndarray, "T half"]]:
    """Return cos and sin of the places of an image's tokens: 0, row, column."""
    grid = np.indices((1, rows, columns)).reshape(3, -1).T  # [T, 3]
    return grid_cos_sin(grid, cfg.axes, FLUX_THETA)


def rules(cfg: FluxConfig) -> tuple[Rule, ...]:
    """Return the weight table of a diffusers transformer/ folder."""
    del cfg
    doubles = (
        one._replace(key=f"transformer_blocks.{{i}}.{one.key}", path=f"doubles.{one.path}")
        for one in JOINT_BLOCK_RULES
    )
    return (*RULES, *doubles)


_S = "single_transformer_blocks.{i}."
RULES = (
    *linear_rules("x_embedder", "x_embedder"),
    *linear_rules("time_text_embed.timestep_embedder.linear_{m}", "time_embedding.linear_{m}"),
    *linear_rules("time_text_embed.guidance_embedder.linear_{m}", "guidance_embedding.linear_{m}"),
    *linear_rules("time_text_embed.text_embedder.linear_{m}", "text_embedding.linear_{m}"),
    *linear_rules("context_embedder", "context_embedder"),
    *linear_rules(_S + "norm.linear", "singles.norm.linear"),
    *linear_rules(_S + "attn.to_q", "singles.attn.to_q"),
    *linear_rules(_S + "attn.to_k", "singles.attn.to_k"),
    *linear_rules(_S + "attn.to_v", "singles.attn.to_v"),
    Rule(_S + "attn.norm_q.weight", "singles.attn.norm_q.scale"),
    Rule(_S + "attn.norm_k.weight", "singles.attn.norm_k.scale"),
    *linear_rules(_S + "proj_mlp", "singles.proj_mlp"),
    *linear_rules(_S + "proj_out", "singles.proj_out"),
    *linear_rules("norm_out.linear", "norm_out.linear"),
    *linear_rules("proj_out", "proj_out"),
)

ARCHITECTURE = Architecture(
    family="denoiser",
    class_name=lambda config: "FluxTransformer2DModel",
    config=FluxConfig.from_hf,
    module=FluxTransformer,
    rules=rules,
)
