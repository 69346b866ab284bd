"""SD3Transformer2DModel (MMDiT) of Stable Diffusion 3 and 3.5, over NHWC latents.

Image tokens and text tokens have their own projections in each block, and attend to each other.
Source: Esser et al. 2024, arXiv:2403.03206.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.params import CONSTANT_ROLE
from jaxft.core.sharding import constrain
from jaxft.models.denoisers.joint import (
    JOINT_BLOCK_RULES,
    JOINT_EPS,
    TIME_DIM,
    JointBlock,
    Modulation,
    Tokens,
    check_sides,
    linear_rules,
    scan_blocks,
)
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.models.registry import Architecture
from jaxft.nn.conv import REPLICATED_KERNEL, Conv, dense, runner
from jaxft.nn.embedding import TimeEmbedding, timestep_embedding
from jaxft.nn.norm import adaptive_layer_norm
from jaxft.weights.rules import Rule


class PatchEmbedding(nnx.Module):
    """Patches of latents as tokens, plus the middle of a stored table of positions.

    The table is a tensor of the checkpoint. It never trains.
    """

    def __init__(self, cfg: MMDiTConfig, *, key: PRNGKeyArray):
        self.proj = Conv(
            cfg.in_channels,
            cfg.dim,
            cfg.patch_size,
            key=key,
            stride=cfg.patch_size,
            axes=REPLICATED_KERNEL,
        )
        side = cfg.max_patches
        places = jnp.arange(side) * (cfg.sample_size // cfg.patch_size / side)  # [M]
        one = timestep_embedding(places, cfg.dim // 2, cos_first=False)  # [M, D / 2]
        pair = jnp.broadcast_arrays(one[None], one[:, None])  # column, then row: [M, M, D / 2]
        table = jnp.concatenate(pair, axis=-1)  # [M, M, D]
        self.pos_embed = nnx.Param(table, axes=(None, None, "embed"), role=CONSTANT_ROLE)

    def __call__(
        self, latents: Float[Array, "B Y X C"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        x = self.proj(latents, keys)  # [B, Y / patch, X / patch, D]
        table: Array = self.pos_embed[...]
        top, left = ((most - n) // 2 for most, n in zip(table.shape, x.shape[1:3], strict=False))
        places = table[top : top + x.shape[1], left : left + x.shape[2]].astype(x.dtype)
        x = x + constrain(places, None, None, None)
        return x.reshape(x.shape[0], -1, x.shape[-1])  # [B, T, D]


class MMDiT(nnx.Module):
    """Noisy latents, their timesteps and the embedded text to the model's prediction.

    Blocks with the same parameters that follow each other are one stacked JointBlock of `runs`,
    leaves [layers, ...]. The last block is a run of its own, and so are those before and after a
    change of dual attention.
    """

    def __init__(self, cfg: MMDiTConfig, *, key: PRNGKeyArray):
        dim, keys = cfg.dim, jax.random.split(key, 7)
        self.cfg = cfg
        self.pos_embed = PatchEmbedding(cfg, key=keys[0])
        self.time_embedding = TimeEmbedding(TIME_DIM, dim, key=keys[1])
        self.text_embedding = TimeEmbedding(cfg.pooled_dim, dim, key=keys[2])
        self.context_embedder = dense(cfg.context_dim, dim, key=keys[3])
        blocks = jax.random.split(keys[4], cfg.num_layers)
        self.runs = nnx.List(
            [
                jax.vmap(
                    lambda key, kind=kind: JointBlock(cfg, key=key, dual=kind.dual, last=kind.last)
                )(blocks[kind.layers.start : kind.layers.stop])
                for kind in cfg.runs
            ]
        )
        self.norm_out = Modulation(dim, 2, key=keys[5])
        self.proj_out = dense(dim, cfg.patch_size**2 * cfg.out_channels, key=keys[6])

    def __call__(
        self,
        latents: Float[Array, "B Y X C"],
        timesteps: Float[Array, " B"],
        context: Float[Array, "B S D"],
        pooled: Float[Array, "B P"],
        *,
        dtype: Any = None,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
    ) -> Float[Array, "B Y X F"]:
        """Return the prediction in `dtype`: the velocity noise - latents.

        latents: of any Y and X that are multiples of `patch_size`. timesteps: sigma * 1000, in
        0 ... 1000. context: text embeddings of `context_dim` channels, of which all S are keys of
        attention. pooled: of `pooled_dim` channels. dtype: of the computation, by default that of
        the latents. keys: one a row, for the dropout of adapters. remat: a key of conv.CONV_REMAT,
        or "none".
        Raises: UserError for latents that are too large, or no multiple of the patch.
        """
        cfg = self.cfg
        dtype = latents.dtype if dtype is None else dtype
        (rows, y, x, _), run = latents.shape, runner(remat)
        _check_size(cfg, y, x)
        time = timestep_embedding(timesteps, TIME_DIM).astype(dtype)  # [B, TIME_DIM]
        time = self.time_embedding(time, keys) + self.text_embedding(pooled.astype(dtype), keys)
        time = constrain(jax.nn.silu(time), "batch", None)  # [B, D], as all blocks read it
        tokens = self.pos_embed(latents.astype(dtype), keys)  # [B, T, D]
        text = self.context_embedder(context.astype(dtype), keys)  # [B, S, D]
        tokens, text = (constrain(one, "batch", "length", None) for one in (tokens, text))
        tokens = self._blocks((tokens, text), time, keys, run)
        scale, shift = self.norm_out(time, keys)
        out = self.proj_out(adaptive_layer_norm(tokens, shift, scale, JOINT_EPS), keys)
        p = cfg.patch_size
        out = out.reshape(rows, y // p, x // p, p, p, -1)  # [B, Y / p, X / p, p, p, F]
        return out.swapaxes(2, 3).reshape(rows, y, x, -1)  # [B, Y, X, F]

    def _blocks(
        self, tokens: Tokens, time: Array, keys: PRNGKeyArray | None, run: Callable[..., Tokens]
    ) -> Float[Array, "B T D"]:
        """Return the image tokens after all blocks, one scan a run. run: calls one block."""
        for blocks, kind in zip(self.runs, self.cfg.runs, strict=True):
            tokens = scan_blocks(blocks, kind.layers, tokens, time, keys, run)
        return tokens[0]


def _check_size(cfg: MMDiTConfig, y: int, x: int) -> None:
    p, most = cfg.patch_size, cfg.max_patches
    check_sides(y, x, p)
    if max(y, x) > p * most:
        raise UserError(
            f"latents of {y} x {x} are larger than {p * most}, the side of the model's table of"
            " positions; choose a smaller resolution"
        )


def rules(cfg: MMDiTConfig) -> tuple[Rule, ...]:
    """Return the weight table of a diffusers transformer/ folder: RULES and those of each run."""
    found = list(RULES)
    for number, kind in enumerate(cfg.runs):
        for one in JOINT_BLOCK_RULES:
            key, path = f"transformer_blocks.{{i}}.{one.key}", f"runs.{number}.{one.path}"
            found.append(Rule(key, path, one.layout, kind.layers))
    return tuple(found)


def sizes(cfg: MMDiTConfig) -> dict[str, int]:
    """Return the dims that RULES' layouts name."""
    return {"m": cfg.max_patches}


RULES = (
    Rule("pos_embed.pos_embed", "pos_embed.pos_embed", "1 (m n) d -> m n d"),
    Rule("pos_embed.proj.weight", "pos_embed.proj.kernel", "o i y x -> y x i o"),
    Rule("pos_embed.proj.bias", "pos_embed.proj.bias"),
    *linear_rules("time_text_embed.timestep_embedder.linear_{m}", "time_embedding.linear_{m}"),
    *linear_rules("time_text_embed.text_embedder.linear_{m}", "text_embedding.linear_{m}"),
    *linear_rules("context_embedder", "context_embedder"),
    *linear_rules("norm_out.linear", "norm_out.linear"),
    *linear_rules("proj_out", "proj_out"),
)

ARCHITECTURE = Architecture(
    family="denoiser",
    class_name=lambda config: "SD3Transformer2DModel",
    config=MMDiTConfig.from_hf,
    module=MMDiT,
    rules=rules,
    sizes=sizes,
)
