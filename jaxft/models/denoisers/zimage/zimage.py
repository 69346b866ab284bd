"""ZImageTransformer2DModel of Z-Image, over NHWC latents.

Image and text are refined apart first. Then they are one sequence, of which all blocks have the
same projections. The model counts time from noise to data.
Source: Z-Image Team 2025, arXiv:2511.22699, and diffusers' transformer_z_image.py.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.kernels.elementwise import recomputed
from jaxft.models.denoisers.joint import (
    JOINT_EPS,
    TIME_DIM,
    Rotation,
    StreamProjections,
    check_sides,
    linear_rules,
    scan_blocks,
)
from jaxft.models.denoisers.zimage.zimage_config import TOKEN_SIDE, ZImageConfig
from jaxft.models.registry import Architecture
from jaxft.nn.conv import dense, runner, spread
from jaxft.nn.embedding import TimeEmbedding, timestep_embedding
from jaxft.nn.linear import Linear
from jaxft.nn.norm import RMSNorm, adaptive_layer_norm
from jaxft.nn.rope import grid_cos_sin
from jaxft.weights.rules import Rule

FILL = 32  # image and text are each filled up to a multiple of so many tokens
TIME_WIDTH, TIME_HIDDEN = 256, 1024  # of the embedding of time. No config.json has them


class Places(NamedTuple):
    """The rotation of tokens, and their segments: 1, or 0 for tokens that none attends to.

    segments: None if all are 1.
    """

    rope: Rotation
    segments: Int[Array, "B T"] | None = None


class GatedMLP(nnx.Module):
    """w2(silu(w1 x) * w3 x), without biases: Shazeer 2020, arXiv:2002.05202."""

    def __init__(self, dim: int, width: int, *, key: PRNGKeyArray):
        keys = jax.random.split(key, 3)
        axes, std = ("embed", "mlp"), spread(dim)
        self.w1 = Linear((dim,), (width,), axes, key=keys[0], std=std)
        self.w2 = Linear((width,), (dim,), axes[::-1], key=keys[1], std=spread(width))
        self.w3 = Linear((dim,), (width,), axes, key=keys[2], std=std)

    def __call__(
        self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B T D"]:
        return self.w2(recomputed(_gated)(self.w1(x, keys), self.w3(x, keys)), keys)


def _gated(gate: Array, value: Array) -> Array:
    return jax.nn.silu(gate) * value


class SandwichBlock(nnx.Module):
    """Attention and a gated MLP, each between two norms.

    modulated: time scales the inputs of both, and gates their outputs.
    """

    def __init__(self, cfg: ZImageConfig, *, key: PRNGKeyArray, modulated: bool = True):
        dim, keys = cfg.dim, jax.random.split(key, 3)
        self.attention = StreamProjections(cfg, key=keys[0], bias=False, eps=cfg.eps)
        self.feed_forward = GatedMLP(dim, cfg.mlp_dim, key=keys[1])
        self.attention_norm1 = RMSNorm(dim, eps=cfg.eps)
        self.attention_norm2 = RMSNorm(dim, eps=cfg.eps)
        self.ffn_norm1 = RMSNorm(dim, eps=cfg.eps)
        self.ffn_norm2 = RMSNorm(dim, eps=cfg.eps)
        made = dense(min(dim, TIME_WIDTH), 4 * dim, key=keys[2]) if modulated else None
        self.modulation: Linear | None = nnx.data(made)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        time: Float[Array, "B E"],
        keys: PRNGKeyArray | None,
        places: Places,
    ) -> Float[Array, "B T D"]:
        """Return the tokens. time: its embedding, to which no silu is applied."""
        scale, gate, mlp_scale, mlp_gate = self._modulations(x, time, keys)  # [B, 1, D] or 1
        q, k, v = self.attention(self.attention_norm1(x) * scale, keys, places.rope)
        heads = attention(q, k, v, causal=False, q_segments=places.segments)  # [B, T, N, H]
        x = x + gate * self.attention_norm2(self.attention.output(heads, keys))
        made = self.feed_forward(self.ffn_norm1(x) * mlp_scale, keys)
        return x + mlp_gate * self.ffn_norm2(made)

    def _modulations(self, x: Array, time: Array, keys: PRNGKeyArray | None) -> tuple[Any, ...]:
        if self.modulation is None:
            return 1, 1, 1, 1
        made = constrain(self.modulation(time, keys), "batch", None)[:, None]  # [B, 1, 4 D]
        scale, gate, mlp_scale, mlp_gate = jnp.split(made.astype(x.dtype), 4, axis=-1)
        return 1 + scale, jnp.tanh(gate), 1 + mlp_scale, jnp.tanh(mlp_gate)


class ZImageTransformer(nnx.Module):
    """Noisy latents, their sigmas and the embedded text to the model's velocity.

    Blocks are stacked, leaves [layers, ...].
    """

    def __init__(self, cfg: ZImageConfig, *, key: PRNGKeyArray):
        dim, keys = cfg.dim, jax.random.split(key, 8)
        width, packed = min(dim, TIME_WIDTH), cfg.in_channels * TOKEN_SIDE**2
        self.cfg = cfg
        self.x_embedder = Linear(
            (packed,), (dim,), (None, "mlp"), key=keys[0], bias=True, std=spread(packed)
        )
        self.time_embedding = TimeEmbedding(TIME_DIM, width, key=keys[1], hidden=TIME_HIDDEN)
        self.context_norm = RMSNorm(cfg.context_dim, eps=cfg.eps)
        self.context_embedder = dense(cfg.context_dim, dim, key=keys[2])
        self.x_pad_token = nnx.Param(jnp.zeros((1, dim)), axes=(None, "norm"))
        self.context_pad_token = nnx.Param(jnp.zeros((1, dim)), axes=(None, "norm"))
        refiners = jax.random.split(keys[3], (2, cfg.num_refiners))
        self.noise_refiner = jax.vmap(lambda key: SandwichBlock(cfg, key=key))(refiners[0])
        self.context_refiner = jax.vmap(
            lambda key: SandwichBlock(cfg, key=key, modulated=False)
        )(refiners[1])  # fmt: skip
        layers = jax.random.split(keys[4], cfg.num_layers)
        self.layers = jax.vmap(lambda key: SandwichBlock(cfg, key=key))(layers)
        self.norm_out = dense(width, dim, key=keys[5])
        self.proj_out = dense(dim, packed, key=keys[6])

    def __call__(
        self,
        latents: Float[Array, "B Y X C"],
        sigma: Float[Array, " B"],
        context: Float[Array, "B S D"],
        lengths: Int[Array, " B"],
        *,
        dtype: Any = None,
        keys: PRNGKeyArray | None = None,
        remat: str = "none",
    ) -> Float[Array, "B Y X C"]:
        """Return the prediction in `dtype`: the velocity noise - latents.

        latents: of any even Y and X. sigma: in 0 ... 1. context: text embeddings of `context_dim`
        channels. lengths: the number of tokens of each text, at most S. Rows after them are not
        read. dtype: of the computation, by default that of the latents. keys: one a row, for the
        dropout of adapters. remat: a key of conv.CONV_REMAT, or "none".
        Raises: UserError for odd sizes.
        """
        dtype, run, cfg = latents.dtype if dtype is None else dtype, runner(remat), self.cfg
        y, x = latents.shape[1:3]
        check_sides(y, x, TOKEN_SIDE)
        sinusoids = timestep_embedding(cfg.time_scale * (1.0 - sigma), TIME_DIM)
        time = constrain(self.time_embedding(sinusoids.astype(dtype), keys), "batch", None)
        tokens = self.x_embedder(pack_pixels(latents.astype(dtype)), keys)  # [B, T, D]
        count = tokens.shape[1]
        tokens = _filled(tokens, self.x_pad_token[...])
        text = self._text(context.astype(dtype), lengths, keys)  # [B, S, D]
        cut, grid = tokens.shape[1], (y // TOKEN_SIDE, x // TOKEN_SIDE)
        whole = places(cfg, grid, lengths, text.shape[1])
        image, words = (_part(whole, slice(cut)), _part(whole, slice(cut, None)))
        numbers = range(cfg.num_refiners)
        # None of the image's tokens is left out.
        image = image._replace(segments=None)
        tokens = scan_blocks(self.noise_refiner, numbers, tokens, time, keys, run, image)
        numbers = range(cfg.num_refiners, 2 * cfg.num_refiners)
        text = scan_blocks(self.context_refiner, numbers, text, time, keys, run, words)
        both = jnp.concatenate([tokens, text], axis=1)  # [B, T + S, D]
        numbers = range(numbers.stop, numbers.stop + cfg.num_layers)
        both = scan_blocks(self.layers, numbers, both, time, keys, run, whole)
        # Split over `tensor`, XLA got the gradients of micro-batches wrong.
        scale = constrain(self.norm_out(jax.nn.silu(time), keys), "batch", None)  # [B, D]
        made = adaptive_layer_norm(both[:, :count], jnp.zeros_like(scale), scale, JOINT_EPS)
        return -unpack_pixels(self.proj_out(made, keys), y, x)

    def _text(
        self, context: Float[Array, "B S D"], lengths: Int[Array, " B"], keys: PRNGKeyArray | None
    ) -> Float[Array, "B S D"]:
        """Return the embedded text, with the pad token in all rows after it."""
        text = self.context_embedder(self.context_norm(context), keys)  # [B, S, D]
        text = _filled(text, self.context_pad_token[...])
        real = jnp.arange(text.shape[1]) < lengths[:, None]  # [B, S]
        text = jnp.where(real[..., None], text, self.context_pad_token[...].astype(text.dtype))
        return constrain(text, "batch", "length", None)


def _filled(tokens: Float[Array, "B T D"], pad: Float[Array, "1 D"]) -> Float[Array, "B T D"]:
    """Return tokens with `pad` behind them, up to a multiple of FILL."""
    rows, count, dim = tokens.shape
    pads = jnp.broadcast_to(pad.astype(tokens.dtype), (rows, -count % FILL, dim))
    return constrain(jnp.concatenate([tokens, pads], axis=1), "batch", "length", None)


def _part(whole: Places, part: slice) -> Places:
    return jax.tree.map(lambda x: x[:, part], whole)


def places(
    cfg: ZImageConfig, grid: tuple[int, int], lengths: Int[Array, " B"], size: int
) -> Places:
    """Return the places of an image's tokens, filled up, and of `size` rows of text behind them.

    Text has the places (1, 0, 0), (2, 0, 0), …. The pads behind it go on, up to a multiple of
    FILL tokens, and the image's first place is the one after these. Pads of the image have the
    place (0, 0, 0). grid: the image's rows and columns. lengths: the tokens of each text.
    """
    rows, count, half = len(lengths), grid[0] * grid[1], cfg.axes[0] // 2
    ends = -(-lengths // FILL) * FILL  # [B]
    line = np.zeros((size + 2, 3), np.int64)
    line[:, 0] = np.arange(size + 2)
    cells = np.zeros((count + -count % FILL, 3), np.int64)
    cells[:count, 1:] = np.indices(grid).reshape(2, -1).T
    turned = []
    for first, rest in zip(
        grid_cos_sin(line, cfg.axes, cfg.theta), grid_cos_sin(cells, cfg.axes, cfg.theta),
        strict=True,
    ):  # fmt: skip
        whole = jnp.broadcast_to(jnp.asarray(rest), (rows, *rest.shape))  # [B, T, half]
        # All of an image's tokens have the same first place, which depends on the text's length.
        own = jnp.asarray(first)[ends + 1, None, :half]  # [B, 1, half of the first axis]
        whole = whole.at[:, :count, :half].set(own)
        text = jnp.asarray(first[1 : size + 1])  # [S, half]
        text = jnp.broadcast_to(text, (rows, *text.shape))  # [B, S, half]
        turned.append(jnp.concatenate([whole, text], axis=1))  # [B, T + S, half]
    image = jnp.ones((rows, len(cells)), jnp.int32)
    text = (jnp.arange(size) < ends[:, None]).astype(jnp.int32)  # [B, S]
    return Places((turned[0], turned[1]), jnp.concatenate([image, text], axis=1))


def pack_pixels(latents: Float[Array, "B Y X C"]) -> Float[Array, "B T K"]:
    """Return tokens of 2 x 2 latents. Each holds pixel after pixel, its channels together."""
    (b, y, x, c), n = latents.shape, TOKEN_SIDE
    cells = latents.reshape(b, y // n, n, x // n, n, c)  # [B, Y/2, 2, X/2, 2, C]
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(b, -1, c * n**2)  # [B, T, 4 C]


def unpack_pixels(tokens: Float[Array, "B T K"], y: int, x: int) -> Float[Array, "B Y X C"]:
    """Return latents of y rows and x columns: the inverse of `pack_pixels`."""
    b, n = len(tokens), TOKEN_SIDE
    cells = tokens.reshape(b, y // n, x // n, n, n, -1)  # [B, Y/2, X/2, 2, 2, C]
    return cells.transpose(0, 1, 3, 2, 4, 5).reshape(b, y, x, -1)  # [B, Y, X, C]


def rules(cfg: ZImageConfig) -> tuple[Rule, ...]:
    """Return the weight table of a diffusers transformer/ folder."""
    del cfg
    blocks = (
        one._replace(key=f"{stack}.{{i}}.{one.key}", path=f"{stack}.{one.path}")
        for stack in ("noise_refiner", "context_refiner", "layers")
        for one in BLOCK_RULES
    )
    return (*RULES, *blocks)


# A rule counts only where its path is a parameter: blocks of the text have no modulation.
BLOCK_RULES = (
    linear_rules("attention.to_q", "attention.to_q")[0],
    linear_rules("attention.to_k", "attention.to_k")[0],
    linear_rules("attention.to_v", "attention.to_v")[0],
    linear_rules("attention.to_out.0", "attention.to_out")[0],
    Rule("attention.norm_q.weight", "attention.norm_q.scale"),
    Rule("attention.norm_k.weight", "attention.norm_k.scale"),
    linear_rules("feed_forward.w{n}", "feed_forward.w{n}")[0],
    Rule("attention_norm{n}.weight", "attention_norm{n}.scale"),
    Rule("ffn_norm{n}.weight", "ffn_norm{n}.scale"),
    *linear_rules("adaLN_modulation.0", "modulation"),
)
RULES = (
    *linear_rules("all_x_embedder.2-1", "x_embedder"),
    *linear_rules("t_embedder.mlp.0", "time_embedding.linear_1"),
    *linear_rules("t_embedder.mlp.2", "time_embedding.linear_2"),
    Rule("cap_embedder.0.weight", "context_norm.scale"),
    *linear_rules("cap_embedder.1", "context_embedder"),
    Rule("x_pad_token", "x_pad_token"),
    Rule("cap_pad_token", "context_pad_token"),
    *linear_rules("all_final_layer.2-1.adaLN_modulation.1", "norm_out"),
    *linear_rules("all_final_layer.2-1.linear", "proj_out"),
)

ARCHITECTURE = Architecture(
    family="denoiser",
    class_name=lambda config: "ZImageTransformer2DModel",
    config=ZImageConfig.from_hf,
    module=ZImageTransformer,
    rules=rules,
)
