"""Blocks of joint attention, of MMDiT and FLUX: image and text with projections of their own.

Source: Esser et al. 2024, arXiv:2403.03206, figure 2.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.core.sharding import constrain
from jaxft.kernels.attention.attention import attention
from jaxft.kernels.elementwise import recomputed
from jaxft.kernels.loops import unrolls
from jaxft.nn.conv import dense, spread
from jaxft.nn.linear import Linear
from jaxft.nn.norm import RMSNorm, adaptive_layer_norm
from jaxft.nn.rope import rotate_neighbours
from jaxft.weights.rules import Rule

JOINT_EPS = 1e-6  # of every norm. No config.json has it
TIME_DIM = 256  # sinusoids of the timestep

Tokens = tuple[Float[Array, "B T D"], Float[Array, "B S D"]]  # of the image, and of the text
Heads = tuple[Float[Array, "B T N H"], Float[Array, "B T N H"], Float[Array, "B T N H"]]
Rotation = tuple[Float[Array, "*B T half"], Float[Array, "*B T half"]]  # cos and sin of each place


class HeadSizes(Protocol):
    """Sizes of attention, which every transformer's config has. dim = heads x head_dim.

    qk_norm: queries and keys of a head pass an RMS norm.
    """

    @property
    def dim(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def qk_norm(self) -> bool: ...


class Modulation(nnx.Module):
    """The shifts, scales and gates of a block, projected from the embedding of time and text."""

    def __init__(self, dim: int, chunks: int, *, key: PRNGKeyArray, bias: bool = True):
        self.linear = dense(dim, chunks * dim, key=key, bias=bias)
        self.chunks = chunks

    def __call__(
        self, time: Float[Array, "B D"], keys: PRNGKeyArray | None
    ) -> list[Float[Array, "B D"]]:
        made = constrain(self.linear(time, keys), "batch", None)  # [B, chunks D]
        return jnp.split(made, self.chunks, axis=-1)  # [B, D] each


class StreamProjections(nnx.Module):
    """Queries, keys and values of one stream of tokens, and its output projection.

    out: False for the text of the last block, whose output nothing reads. bias: the projections
    have biases. eps: of the norms of queries and keys.
    """

    def __init__(
        self,
        cfg: HeadSizes,
        *,
        key: PRNGKeyArray,
        out: bool = True,
        bias: bool = True,
        eps: float = JOINT_EPS,
    ):
        d, axes, std = (cfg.dim,), ("embed", "heads"), spread(cfg.dim)
        keys = jax.random.split(key, 4)
        self.heads = cfg.heads
        self.to_q = Linear(d, d, axes, key=keys[0], bias=bias, std=std)
        self.to_k = Linear(d, d, axes, key=keys[1], bias=bias, std=std)
        self.to_v = Linear(d, d, axes, key=keys[2], bias=bias, std=std)
        last = Linear(d, d, axes[::-1], key=keys[3], bias=bias, std=std) if out else None
        self.to_out: Linear | None = nnx.data(last)
        norms = [RMSNorm(cfg.head_dim, eps=eps) if cfg.qk_norm else None for _ in range(2)]
        self.norm_q, self.norm_k = map(nnx.data, norms)

    def __call__(
        self, x: Float[Array, "B T D"], keys: PRNGKeyArray | None, rope: Rotation | None = None
    ) -> Heads:
        made = (project(x, keys) for project in (self.to_q, self.to_k, self.to_v))
        q, k, v = (one.reshape(*one.shape[:2], self.heads, -1) for one in made)  # [B, T, N, H]
        if self.norm_q is not None and self.norm_k is not None:
            q, k = self.norm_q(q), self.norm_k(k)
        if rope is not None:
            q, k = (rotate_neighbours(one, *rope) for one in (q, k))
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
        return self.out(gelu(self.proj(x, keys)), keys)


def gelu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return the tanh form of GELU. The backward pass computes it again."""
    return recomputed(partial(jax.nn.gelu, approximate=True))(x)


class JointBlock(nnx.Module):
    """Joint attention of image and text, and an MLP for each of the two.

    dual: attention among the image tokens alone is added. last: the block is the last of its model,
    and returns its text as it is.
    """

    def __init__(
        self, cfg: HeadSizes, *, key: PRNGKeyArray, dual: bool = False, last: bool = False
    ):
        dim, keys, text = cfg.dim, jax.random.split(key, 7), not last
        self.last = last
        self.norm1 = Modulation(dim, 9 if dual else 6, key=keys[0])
        self.norm1_context = Modulation(dim, 6 if text else 2, key=keys[1])
        self.attn = StreamProjections(cfg, key=keys[2])
        self.attn_context = StreamProjections(cfg, key=keys[3], out=text)
        self.attn2 = nnx.data(StreamProjections(cfg, key=keys[4]) if dual else None)
        self.ff = GeluMLP(dim, key=keys[5])
        self.ff_context = nnx.data(GeluMLP(dim, key=keys[6]) if text else None)

    def __call__(
        self,
        tokens: Tokens,
        time: Float[Array, "B D"],
        keys: PRNGKeyArray | None,
        rope: Rotation | None = None,
    ) -> Tokens:
        """Return the tokens of the image and of the text.

        time: after its silu. rope: the rotation of the image's T places. Text is not rotated.
        """
        x, text = tokens
        shift, scale, gate, *rest = self.norm1(time, keys)
        made = self.norm1_context(time, keys)
        # The two chunks of the last block are scale and shift, as in `norm_out`.
        text_shift, text_scale, *text_rest = made[::-1] if self.last else made
        q, k, v = self.attn(adaptive_layer_norm(x, shift, scale, JOINT_EPS), keys, rope)
        normed = adaptive_layer_norm(text, text_shift, text_scale, JOINT_EPS)
        text_q, text_k, text_v = self.attn_context(normed, keys)
        k, v = (jnp.concatenate(pair, axis=1) for pair in ((k, text_k), (v, text_v)))
        if not self.last:
            q = jnp.concatenate([q, text_q], axis=1)  # [B, T + S, N, H]
        heads = attention(q, k, v, causal=False)  # [B, T + S, N, H], of the last block [B, T, N, H]
        count = x.shape[1]
        made = x + gate[:, None] * self.attn.output(heads[:, :count], keys)
        if self.attn2 is not None:
            shift2, scale2, gate2 = rest[3:]
            q, k, v = self.attn2(adaptive_layer_norm(x, shift2, scale2, JOINT_EPS), keys)
            heads2 = attention(q, k, v, causal=False)  # [B, T, N, H]
            made = made + gate2[:, None] * self.attn2.output(heads2, keys)
        made = add_mlp(self.ff, made, rest[:3], JOINT_EPS, keys)
        if self.ff_context is None:
            return made, text
        text_gate, *text_rest = text_rest
        text = text + text_gate[:, None] * self.attn_context.output(heads[:, count:], keys)
        return made, add_mlp(self.ff_context, text, text_rest, JOINT_EPS, keys)


def add_mlp(
    layer: Callable[..., Array],
    x: Float[Array, "B T D"],
    modulation: Sequence[Float[Array, "B D"]],
    eps: float,
    keys: PRNGKeyArray | None,
) -> Float[Array, "B T D"]:
    """Return x with the gated output of an MLP added. modulation: its shift, scale and gate."""
    shift, scale, gate = modulation
    return x + gate[:, None] * layer(adaptive_layer_norm(x, shift, scale, eps), keys)


def check_sides(y: int, x: int, side: int) -> None:
    """Raise UserError for latents that tokens of `side` x `side` do not cover."""
    if y % side or x % side:
        raise UserError(
            f"latents of {y} x {x} are no multiple of the model's patches of {side} x {side}"
        )


def scan_blocks(
    stack: Callable[..., Any],
    layers: range,
    x: Any,
    time: Any,
    keys: PRNGKeyArray | None,
    run: Callable[..., Any],
    places: Any = None,
) -> Any:
    """Return activations after a stack of blocks, leaves [layers, ...], by one scan.

    layers: their numbers. They are folded into `keys`, so that dropout masks differ. time: its
    embedding, or the modulations that all blocks of the stack share. run: calls one
    block on x, time, keys and places, as `conv.runner` makes it. places: the rotation of tokens, in
    the form that the blocks take.
    """

    def body(x: Any, layer: tuple[Callable[..., Any], Array]) -> tuple[Any, None]:
        block, number = layer
        own = None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        return run(block, x, time, own, places), None

    count, numbers = len(layers), jnp.arange(layers.start, layers.stop)
    # A loop around one block would only copy its weights: 0 unrolls the scan.
    unroll = 0 if count == 1 or unrolls(count) else 1
    return jax.lax.scan(body, x, (stack, numbers), unroll=unroll)[0]


def linear_rules(key: str, path: str) -> tuple[Rule, Rule]:
    """Return the rules of a projection's weight and bias."""
    return Rule(key + ".weight", path + ".kernel", "o i -> i o"), Rule(
        key + ".bias", path + ".bias"
    )


# A rule counts only where its path is a parameter, so that one table is for blocks of all kinds.
JOINT_BLOCK_RULES = (
    *linear_rules("norm1.linear", "norm1.linear"),
    *linear_rules("norm1_context.linear", "norm1_context.linear"),
    *linear_rules("attn.to_q", "attn.to_q"),
    *linear_rules("attn.to_k", "attn.to_k"),
    *linear_rules("attn.to_v", "attn.to_v"),
    *linear_rules("attn.to_out.0", "attn.to_out"),
    *linear_rules("attn.add_q_proj", "attn_context.to_q"),
    *linear_rules("attn.add_k_proj", "attn_context.to_k"),
    *linear_rules("attn.add_v_proj", "attn_context.to_v"),
    *linear_rules("attn.to_add_out", "attn_context.to_out"),
    *linear_rules("attn2.to_q", "attn2.to_q"),
    *linear_rules("attn2.to_k", "attn2.to_k"),
    *linear_rules("attn2.to_v", "attn2.to_v"),
    *linear_rules("attn2.to_out.0", "attn2.to_out"),
    *linear_rules("ff.net.0.proj", "ff.proj"),
    *linear_rules("ff.net.2", "ff.out"),
    *linear_rules("ff_context.net.0.proj", "ff_context.proj"),
    *linear_rules("ff_context.net.2", "ff_context.out"),
    Rule("attn.norm_q.weight", "attn.norm_q.scale"),
    Rule("attn.norm_k.weight", "attn.norm_k.scale"),
    Rule("attn.norm_added_q.weight", "attn_context.norm_q.scale"),
    Rule("attn.norm_added_k.weight", "attn_context.norm_k.scale"),
    Rule("attn2.norm_q.weight", "attn2.norm_q.scale"),
    Rule("attn2.norm_k.weight", "attn2.norm_k.scale"),
)
