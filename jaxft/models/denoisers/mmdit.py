"""SD3Transformer2DModel (MMDiT) of Stable Diffusion 3 and 3.5, over NHWC latents.

Image tokens and text tokens have their own projections in each block, and attend to each other.
Source: Esser et al. 2024, arXiv:2403.03206.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.params import CONSTANT_ROLE
from jaxft.core.sharding import constrain
from jaxft.kernels.attention import attention
from jaxft.kernels.elementwise import recomputed
from jaxft.kernels.loops import unrolls
from jaxft.models.denoisers.mmdit_config import BlockRun, MMDiTConfig
from jaxft.models.registry import Architecture
from jaxft.nn.conv import REPLICATED_KERNEL, Conv, dense, runner, spread
from jaxft.nn.embedding import TimeEmbedding, timestep_embedding
from jaxft.nn.linear import Linear
from jaxft.nn.norm import RMSNorm, adaptive_layer_norm
from jaxft.weights.rules import Rule

MMDIT_EPS = 1e-6  # of every norm. No config.json has it
TIME_DIM = 256  # sinusoids of the timestep

Tokens = tuple[Float[Array, "B T D"], Float[Array, "B S D"]]  # of the image, and of the text
Heads = tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"]]


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


class Modulation(nnx.Module):
    """The shifts, scales and gates of a block, projected from the embedding of time and text."""

    def __init__(self, dim: int, chunks: int, *, key: PRNGKeyArray):
        self.linear = dense(dim, chunks * dim, key=key)
        self.chunks = chunks

    def __call__(
        self, time: Float[Array, "B D"], keys: PRNGKeyArray | None
    ) -> list[Float[Array, "B D"]]:
        made = constrain(self.linear(time, keys), "batch", None)  # [B, chunks D]
        return jnp.split(made, self.chunks, axis=-1)  # [B, D] each


class StreamProjections(nnx.Module):
    """Queries, keys and values of one stream of tokens, with biases, and its output projection.

    out: False for the text of the last block, whose output nothing reads.
    """

    def __init__(self, cfg: MMDiTConfig, *, key: PRNGKeyArray, out: bool = True):
        d, axes, std = (cfg.dim,), ("embed", "heads"), spread(cfg.dim)
        keys = jax.random.split(key, 4)
        self.heads = cfg.heads
        self.to_q = Linear(d, d, axes, key=keys[0], bias=True, std=std)
        self.to_k = Linear(d, d, axes, key=keys[1], bias=True, std=std)
        self.to_v = Linear(d, d, axes, key=keys[2], bias=True, std=std)
        last = Linear(d, d, axes[::-1], key=keys[3], bias=True, std=std) if out else None
        self.to_out: Linear | None = nnx.data(last)
        norms = [RMSNorm(cfg.head_dim, eps=MMDIT_EPS) if cfg.qk_norm else None for _ in range(2)]
        self.norm_q, self.norm_k = map(nnx.data, norms)

    def __call__(self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None) -> Heads:
        made = (project(x, keys) for project in (self.to_q, self.to_k, self.to_v))
        q, k, v = (one.reshape(*one.shape[:2], self.heads, -1) for one in made)  # [B, T, N, H]
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        return q, k, v

    def output(self, heads: Float[Array, "B T N H"], keys: PRNGKeyArray | None) -> Array:
        """Return the output [B, T, D] of attention over these heads."""
        assert self.to_out is not None
        return self.to_out(heads.reshape(*heads.shape[:2], -1), keys)  # [B, T, D]


class GeluMLP(nnx.Module):
    """Two layers of four times the width, with the tanh form of GELU between them."""

    def __init__(self, dim: int, *, key: PRNGKeyArray):
        first, second = jax.random.split(key)
        std = spread(4 * dim)
        self.proj = dense(dim, 4 * dim, key=first)
        self.out = Linear((4 * dim,), (dim,), ("mlp", "embed"), key=second, bias=True, std=std)

    def __call__(
        self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        gelu = recomputed(partial(jax.nn.gelu, approximate=True))
        return self.out(gelu(self.proj(x, keys)), keys)


class JointBlock(nnx.Module):
    """Joint attention of image and text, and an MLP for each of the two.

    A dual block adds attention among the image tokens alone. The last block of a model returns its
    text as it is.
    """

    def __init__(self, cfg: MMDiTConfig, kind: BlockRun, *, key: PRNGKeyArray):
        dim, keys, text = cfg.dim, jax.random.split(key, 7), not kind.last
        self.dual, self.last = kind.dual, kind.last
        self.norm1 = Modulation(dim, 9 if kind.dual else 6, key=keys[0])
        self.norm1_context = Modulation(dim, 6 if text else 2, key=keys[1])
        self.attn = StreamProjections(cfg, key=keys[2])
        self.attn_context = StreamProjections(cfg, key=keys[3], out=text)
        self.attn2 = nnx.data(StreamProjections(cfg, key=keys[4]) if kind.dual else None)
        self.ff = GeluMLP(dim, key=keys[5])
        self.ff_context = nnx.data(GeluMLP(dim, key=keys[6]) if text else None)

    def __call__(
        self, tokens: Tokens, time: Float[Array, "B D"], keys: PRNGKeyArray | None
    ) -> Tokens:
        """Return the tokens of the image and of the text. time: after its silu."""
        x, text = tokens
        shift, scale, gate, *rest = self.norm1(time, keys)
        made = self.norm1_context(time, keys)
        # The two chunks of the last block are scale and shift, as in `norm_out`.
        text_shift, text_scale, *text_rest = made[::-1] if self.last else made
        q, k, v = self.attn(adaptive_layer_norm(x, shift, scale, MMDIT_EPS), keys)
        normed = adaptive_layer_norm(text, text_shift, text_scale, MMDIT_EPS)
        text_q, text_k, text_v = self.attn_context(normed, keys)
        k, v = (jnp.concatenate(pair, axis=1) for pair in ((k, text_k), (v, text_v)))
        if not self.last:
            q = jnp.concatenate([q, text_q], axis=1)  # [B, T + S, N, H]
        heads = attention(q, k, v, causal=False)  # [B, T + S, N, H], of the last block [B, T, N, H]
        count = x.shape[1]
        made = x + gate[:, None] * self.attn.output(heads[:, :count], keys)
        if self.attn2 is not None:
            shift2, scale2, gate2 = rest[3:]
            q, k, v = self.attn2(adaptive_layer_norm(x, shift2, scale2, MMDIT_EPS), keys)
            heads2 = attention(q, k, v, causal=False)  # [B, T, N, H]
            made = made + gate2[:, None] * self.attn2.output(heads2, keys)
        made = _mlp(self.ff, made, rest[:3], keys)
        if self.ff_context is None:
            return made, text
        text_gate, *text_rest = text_rest
        text = text + text_gate[:, None] * self.attn_context.output(heads[:, count:], keys)
        return made, _mlp(self.ff_context, text, text_rest, keys)


def _mlp(layer: GeluMLP, x: Array, modulation: list[Array], keys: PRNGKeyArray | None) -> Array:
    """Return x with the gated output of an MLP added. modulation: its shift, scale and gate."""
    shift, scale, gate = modulation
    return x + gate[:, None] * layer(adaptive_layer_norm(x, shift, scale, MMDIT_EPS), keys)


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
                jax.vmap(lambda key, kind=kind: JointBlock(cfg, kind, key=key))(
                    blocks[kind.layers.start : kind.layers.stop]
                )
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
        out = self.proj_out(adaptive_layer_norm(tokens, shift, scale, MMDIT_EPS), keys)
        p = cfg.patch_size
        out = out.reshape(rows, y // p, x // p, p, p, -1)  # [B, Y / p, X / p, p, p, F]
        return out.swapaxes(2, 3).reshape(rows, y, x, -1)  # [B, Y, X, F]

    def _blocks(
        self, tokens: Tokens, time: Array, keys: PRNGKeyArray | None, run: Callable[..., Tokens]
    ) -> Float[Array, "B T D"]:
        """Return the image tokens after all blocks, one scan a run. run: calls one block."""

        def body(tokens: Tokens, layer: tuple[JointBlock, Array]) -> tuple[Tokens, None]:
            block, number = layer
            # The layers of a scan share the keys, but not their dropout masks.
            own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
            return run(block, tokens, time, own), None

        for blocks, kind in zip(self.runs, self.cfg.runs, strict=True):
            count = len(kind.layers)
            numbers = jnp.arange(kind.layers.start, kind.layers.stop)
            # A loop around one block would only copy its weights: 0 unrolls the scan.
            unroll = 0 if count == 1 or unrolls(count) else 1
            tokens, _ = jax.lax.scan(body, tokens, (blocks, numbers), unroll=unroll)
        return tokens[0]


def _check_size(cfg: MMDiTConfig, y: int, x: int) -> None:
    p, most = cfg.patch_size, cfg.max_patches
    if y % p or x % p:
        raise UserError(f"latents of {y} x {x} are no multiple of the model's patches of {p} x {p}")
    if max(y, x) > p * most:
        raise UserError(
            f"latents of {y} x {x} are larger than {p * most}, the side of the model's table of"
            " positions; choose a smaller resolution"
        )


def rules(cfg: MMDiTConfig) -> tuple[Rule, ...]:
    """Return the weight table of a diffusers transformer/ folder: RULES and those of each run."""
    found = list(RULES)
    for number, kind in enumerate(cfg.runs):
        for one in BLOCK_RULES:
            key, path = f"transformer_blocks.{{i}}.{one.key}", f"runs.{number}.{one.path}"
            found.append(Rule(key, path, one.layout, kind.layers))
    return tuple(found)


def sizes(cfg: MMDiTConfig) -> dict[str, int]:
    """Return the dims that RULES' layouts name."""
    return {"m": cfg.max_patches}


def _linear(key: str, path: str) -> tuple[Rule, Rule]:
    return Rule(key + ".weight", path + ".kernel", "o i -> i o"), Rule(
        key + ".bias", path + ".bias"
    )


# A rule counts only where its path is a parameter, so that one table is for blocks of all kinds.
BLOCK_RULES = (
    *_linear("norm1.linear", "norm1.linear"),
    *_linear("norm1_context.linear", "norm1_context.linear"),
    *_linear("attn.to_q", "attn.to_q"),
    *_linear("attn.to_k", "attn.to_k"),
    *_linear("attn.to_v", "attn.to_v"),
    *_linear("attn.to_out.0", "attn.to_out"),
    *_linear("attn.add_q_proj", "attn_context.to_q"),
    *_linear("attn.add_k_proj", "attn_context.to_k"),
    *_linear("attn.add_v_proj", "attn_context.to_v"),
    *_linear("attn.to_add_out", "attn_context.to_out"),
    *_linear("attn2.to_q", "attn2.to_q"),
    *_linear("attn2.to_k", "attn2.to_k"),
    *_linear("attn2.to_v", "attn2.to_v"),
    *_linear("attn2.to_out.0", "attn2.to_out"),
    *_linear("ff.net.0.proj", "ff.proj"),
    *_linear("ff.net.2", "ff.out"),
    *_linear("ff_context.net.0.proj", "ff_context.proj"),
    *_linear("ff_context.net.2", "ff_context.out"),
    Rule("attn.norm_q.weight", "attn.norm_q.scale"),
    Rule("attn.norm_k.weight", "attn.norm_k.scale"),
    Rule("attn.norm_added_q.weight", "attn_context.norm_q.scale"),
    Rule("attn.norm_added_k.weight", "attn_context.norm_k.scale"),
    Rule("attn2.norm_q.weight", "attn2.norm_q.scale"),
    Rule("attn2.norm_k.weight", "attn2.norm_k.scale"),
)
RULES = (
    Rule("pos_embed.pos_embed", "pos_embed.pos_embed", "1 (m n) d -> m n d"),
    Rule("pos_embed.proj.weight", "pos_embed.proj.kernel", "o i y x -> y x i o"),
    Rule("pos_embed.proj.bias", "pos_embed.proj.bias"),
    *_linear("time_text_embed.timestep_embedder.linear_{m}", "time_embedding.linear_{m}"),
    *_linear("time_text_embed.text_embedder.linear_{m}", "text_embedding.linear_{m}"),
    *_linear("context_embedder", "context_embedder"),
    *_linear("norm_out.linear", "norm_out.linear"),
    *_linear("proj_out", "proj_out"),
)

ARCHITECTURE = Architecture(
    family="denoiser",
    class_name=lambda config: "SD3Transformer2DModel",
    config=MMDiTConfig.from_hf,
    module=MMDiT,
    rules=rules,
    sizes=sizes,
)
