"""The one attention function of the project; which kernel runs where is decided here alone."""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import ceil, floor, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Bytes of fp32 scores that one query block may make; on CPU fewer, larger blocks measured best.
CPU_SCORES, ACCELERATOR_SCORES = 2**25, 2**28
SMALLEST_BLOCK, ROWS = 16, 8  # queries; a block is a multiple of ROWS (a TPU's sublanes)
SPANS, SMALLEST_SPAN = 3, 32  # of causal rows: 3 spans need 2/3 of the products
MASKED = -1e30  # finite, so that a row with nothing to see stays finite


class Rows(NamedTuple):
    """What the mask compares: positions and segments, (B or 1, length); segments may be absent."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None


class Keys(NamedTuple):
    """Keys and values, or their gradients."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


Seen = tuple[Rows, int | Array | None]  # the keys' rows and the window


class Span(NamedTuple):
    """Queries from `start` to `end` see none of the keys from `last` on; `size` of them a block."""

    start: int
    end: int
    last: int
    size: int


class How(NamedTuple):
    """What is settled when the step is traced."""

    causal: bool
    scale: float
    spans: tuple[Span, ...]


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    q_positions: Int[Array, "B T"] | None = None,
    kv_positions: Int[Array, "B S"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """softmax(scale q k^T) v over the keys each query may see; softmax in fp32.

    A query sees the keys of its own segment and, if causal, those whose position is not after its
    own and, given a window, fewer than `window` before it. Positions default to 0, 1, 2, ...;
    segments to one for all; kv segments and positions to the queries' when T == S. Padding is
    segment 0: its rows are finite, and mean nothing. `window` may be traced (one a scanned layer).
    N is a multiple of K (grouped-query attention); `scale` defaults to 1 / sqrt(H).
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if q_segments is not None and kv_segments is None:
        kv_segments = q_segments
    if window is not None and not causal:
        raise ValueError("window needs causal=True: it counts keys before the query")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("kv_segments needs q_segments: a query sees the keys of its own segment")
    positioned = q_positions is not None or kv_positions is not None
    plain = causal and not positioned and q_segments is None and q.shape[1] == k.shape[1]
    if plain and not isinstance(window, jax.Array) and _cudnn_takes(q):
        left = None if window is None else (window - 1, 0)
        return jax.nn.dot_product_attention(
            q, k, v, scale=scale, is_causal=True, local_window_size=left, implementation="cudnn"
        )
    queries = Rows(_positions(q_positions, q.shape[1]), q_segments)
    own = kv_positions is None and q.shape[1] == k.shape[1]
    keys = Rows(queries.positions if own else _positions(kv_positions, k.shape[1]), kv_segments)
    if q.dtype == jnp.float32:  # of a narrower q the scores are scaled, in fp32
        q, scale = scale * q, 1.0
    how = How(causal, scale, _spans(q.shape, k.shape[1], causal and own and q_positions is None))
    return _blockwise(q, k, v, queries, keys, how, window)


def _cudnn_takes(q: Array) -> bool:
    """cuDNN's flash attention: half precision, head_dim a multiple of 8 up to 256 (Hopper)."""
    half, head_dim = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    return jax.default_backend() == "gpu" and half and head_dim % 8 == 0 and head_dim <= 256


def _positions(positions: Array | None, length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions


def _blockwise(
    q: Array, k: Array, v: Array, queries: Rows, keys: Rows, how: How, window: int | Array | None
) -> Array:
    """One block of queries at a time, so that only O(block x S) scores exist, backward included."""
    (batch, length, heads, dim), kv_heads = q.shape, k.shape[2]
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim).transpose(0, 2, 3, 1, 4)
    # Keys stay fp32 outside the loop: their gradients sum over blocks, in that precision.
    wide = Keys(*(x.swapaxes(1, 2).astype(jnp.float32) for x in (k, v)))
    queries = jax.tree.map(lambda x: x[:, None, None, :, None], queries)
    keys = jax.tree.map(lambda x: x[:, None, None, None], keys)
    out: Array = _attend(q, wide, queries, (keys, window), how)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)


def _spans(shape: tuple[int, ...], kv_length: int, aligned: bool) -> tuple[Span, ...]:
    """Where keys are the queries' own rows, a span's products leave out later ones."""
    batch, length, heads, _ = shape
    ends = _span_ends(length) if aligned else [length]
    lasts = ends if aligned else [kv_length]
    return tuple(
        Span(start, end, last, block_size(batch, end - start, heads, last))
        for start, end, last in zip([0, *ends], ends, lasts, strict=False)
    )


def _span_ends(length: int) -> list[int]:
    """Where to cut rows that see only what is before them; an accelerator's kernels stay whole."""
    if jax.default_backend() != "cpu" or length < SPANS * SMALLEST_SPAN:
        return [length]
    step = ROWS * ceil(length / (SPANS * ROWS))
    return [*range(step, length, step), length]


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(
    q: Float[Array, "B K G T H"], wide: Keys, queries: Rows, seen: Seen, how: How
) -> Float[Array, "B K G T H"]:
    return _forward(q, wide, queries, seen, how)[0]


def _forward(q: Array, wide: Keys, queries: Rows, seen: Seen, how: How) -> tuple[Array, tuple]:
    folded, right = _folded(q), _right(q, wide.v)

    def span(one: Span) -> tuple[Array, Array, Array]:
        k, v, keys = _before(one.last, (wide.k, right, seen[0]))

        def block(_: None, x: tuple[Array, Rows]) -> tuple[None, tuple[Array, Array, Array]]:
            q, queries = x
            scores = _scores(q, k, queries, (keys, seen[1]), how)
            top = scores.max(-1, keepdims=True)
            weights = jnp.exp(scores - top)
            out = _product(weights.astype(q.dtype), v, 4, 2)
            total = out[..., -1:] if folded else weights.sum(-1, keepdims=True)
            out = out[..., : q.shape[-1]] / total
            return None, (out.astype(q.dtype), top, total)

        return _over_blocks(block, None, (q, queries), one)[1]

    out, top, total = _joined([span(one) for one in how.spans])
    return out, (q, wide, queries, seen, out, top, total)


def _backward(how: How, kept: tuple, dout: Array) -> tuple[Array, Keys, None, None]:
    """From scores made again; softmax's own sum is dout . out (Dao et al. 2022, arXiv:2205.14135).

    Beside the time of a kept softmax, XLA:CPU's derivative of one is the slowest part of a layer.
    """
    q, wide, queries, seen, out, top, total = kept
    share = dout.astype(jnp.float32) / total
    mean = jnp.matmul(share * out, jnp.ones((out.shape[-1], 1)), precision="highest")
    folded, right = _folded(q), _right(q, wide.v)
    left = jnp.concatenate([share, -mean], -1) if folded else share
    inputs = (q, queries, left.astype(q.dtype), mean, top)

    def span(one: Span) -> tuple[Keys, Array]:
        k, v, keys = _before(one.last, (wide.k, right, seen[0]))

        def block(sums: Keys, x: tuple) -> tuple[Keys, Array]:
            q, queries, left, mean, top = x
            weights = jnp.exp(_scores(q, k, queries, (keys, seen[1]), how) - top)
            dweights = _product(left, v, 4, 3)
            dscores = how.scale * weights * (dweights if folded else dweights - mean)
            dq = _product(dscores.astype(q.dtype), k, 4, 2).astype(q.dtype)
            dk = _over_queries(dscores.astype(q.dtype), q)
            dv = _over_queries(weights.astype(q.dtype), left[..., : q.shape[-1]])
            return Keys(sums.k + dk, sums.v + dv), dq

        zero = jax.tree.map(jnp.zeros_like, Keys(k, wide.v[:, :, : one.last]))
        return _over_blocks(block, zero, inputs, one)

    sums, dqs = zip(*(span(one) for one in how.spans), strict=True)
    return _joined(dqs), _summed(sums), None, None


_attend.defvjp(_forward, _backward)


def _folded(q: Array) -> bool:
    """Whether values have a column of ones beside them, so that products make softmax's sums.

    XLA:CPU is saved two passes over the scores, where these are more than the values that are
    copied for it. Sums of rounded weights would not do.
    """
    many = q.shape[2] * q.shape[3] > q.shape[4]
    return jax.default_backend() == "cpu" and q.dtype == jnp.float32 and many


def _right(q: Array, v: Array) -> Array:
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1) if _folded(q) else v


def _before(last: int, keys: tuple[Array, Array, Rows]) -> tuple[Array, Array, Rows]:
    k, v, rows = keys
    return k[:, :, :last], v[:, :, :last], jax.tree.map(lambda x: x[..., :last], rows)


def _joined(parts: Sequence[Any]) -> Any:
    """What spans made of their queries, as one."""
    return jax.tree.map(lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x, 3), *parts)


def _summed(parts: Sequence[Keys]) -> Keys:
    """Gradients of the keys; all spans but the last see fewer of them."""
    cuts = list(pairwise([0, *(part.k.shape[2] for part in parts)]))

    def whole(*every: Array) -> Array:
        pieces = [sum(x[:, :, i:j] for x in every[n:]) for n, (i, j) in enumerate(cuts)]
        return jnp.concatenate(pieces, 2)

    return jax.tree.map(whole, *parts)


def _scores(q: Array, k: Array, queries: Rows, seen: Seen, how: How) -> Array:
    scores = _product(q, k, 4, 3)
    scores = scores if how.scale == 1.0 else how.scale * scores
    # Added, since for a select XLA:CPU writes out MASKED in the shape of all scores.
    mask = _mask(queries, *seen, how.causal)
    return scores if mask is None else scores + jnp.where(mask, 0.0, MASKED)


def _product(x: Array, y: Array, over: int, keys_over: int) -> Array:
    """(B, K, G, T, .) with (B, K, S, H) in x's precision, summed in fp32; never transposed."""
    dims = (((over,), (keys_over,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y.astype(x.dtype), dims, preferred_element_type=jnp.float32)


def _over_queries(x: Array, y: Array) -> Array:
    """(B, K, G, T, S) and (B, K, G, T, H) to (B, K, S, H); a CPU is to leave x as it lies."""
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    if jax.default_backend() != "cpu":
        return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
    made = jax.lax.dot_general(y, x, dims, preferred_element_type=jnp.float32)
    return jax.lax.optimization_barrier(made).swapaxes(2, 3)


def _over_blocks(block: Callable, carry: Any, inputs: tuple, span: Span) -> tuple[Any, Any]:
    """A scan of `block` over `size` of the span's rows (dim 3) at a time; results joined again."""
    length = span.end - span.start
    inputs = jax.tree.map(lambda x: x[:, :, :, span.start : span.end], inputs)
    if span.size >= length:
        return block(carry, inputs)
    carry, made = jax.lax.scan(block, carry, jax.tree.map(partial(_cut, size=span.size), inputs))
    return carry, jax.tree.map(partial(_join, length=length), made)


def _cut(x: Array, size: int) -> Array:
    """(..., T, H) as (blocks, ..., size, H), zero-padded at the end."""
    count = -(-x.shape[3] // size)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, count * size - x.shape[3]), (0, 0)])
    return jnp.moveaxis(x.reshape(*x.shape[:3], count, size, x.shape[4]), 3, 0)


def _join(x: Array, length: int) -> Array:
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, x.shape[5])[:, :, :, :length]


def _mask(queries: Rows, keys: Rows, window: int | Array | None, causal: bool) -> Array | None:
    """(B or 1, 1, 1, T, S) of what may be seen; None when everything may."""
    mask = None
    if causal:
        before = queries.positions - keys.positions
        mask = before >= 0
        if window is not None:
            mask &= before < window
    if queries.segments is not None and keys.segments is not None:
        same = queries.segments == keys.segments
        mask = same if mask is None else mask & same
    return mask


def block_size(batch: int, length: int, heads: int, kv_length: int) -> int:
    """Queries a block: within the scores' budget of one device, and as few of them padding as can.

    Of sizes down to half of what fits, since fewer, larger blocks are faster.
    """
    budget = CPU_SCORES if jax.default_backend() == "cpu" else ACCELERATOR_SCORES
    mesh = jax.sharding.get_abstract_mesh()
    row = 4 * prod((batch, heads, kv_length)) / max(1, mesh.size)
    most = max(SMALLEST_BLOCK, floor(budget / row))
    if most >= length:
        return length
    sizes = range(most // ROWS * ROWS, most // 2, -ROWS)
    return min(sizes, key=lambda size: size * ceil(length / size))
