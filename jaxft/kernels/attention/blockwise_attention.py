"""Attention by blocks of queries, for every device and mask. Memory is O(block x keys).

It is flash attention (Dao et al. 2022, arXiv:2205.14135) without blocks of keys. The scores of a
block are computed, normalised and not kept. The backward pass computes them again.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from math import ceil, floor, prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.runtime import device
from jaxft.kernels.elementwise import soft_capped

# Bytes of fp32 scores of one block of queries. On a CPU fewer, larger blocks were faster.
CPU_SCORES, ACCELERATOR_SCORES = 2**25, 2**28
SMALLEST_BLOCK = 16  # queries
BLOCK_MULTIPLE = 8  # queries, the sublanes of a TPU
CAUSAL_SPANS, SMALLEST_SPAN = 3, 32  # 3 spans of causal queries need 2/3 of the products
SAVED = "attention"  # the name of what the backward pass needs, for remat policies
MASKED = -1e30  # added to scores. Finite, so that the output of a query without keys is finite


class Coordinates(NamedTuple):
    """Position and segment of each token, from which a mask is computed.

    Both are int32 [B or 1, T], or broadcast against scores. `segments` is None if all tokens are
    one segment.
    """

    positions: Int[Array, "*b T"]
    segments: Int[Array, "*b T"] | None


class KeysValues(NamedTuple):
    """Keys and values, or their gradients."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


Masking = tuple[Coordinates, int | Array | None]  # the keys' coordinates and the window


class Span(NamedTuple):
    """Queries from `start` to `stop`. They attend to the first `keys` keys, `block` at once."""

    start: int
    stop: int
    keys: int
    block: int


class Blocking(NamedTuple):
    """Static settings: the kind of mask, factor and soft-cap of scores, the spans of queries."""

    causal: bool
    scale: float
    soft_cap: float | None
    spans: tuple[Span, ...]


def blockwise_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    queries: Coordinates,
    keys: Coordinates,
    *,
    causal: bool,
    window: int | Int[Array, ""] | None,
    scale: float,
    soft_cap: float | None,
    sinks: Float[Array, " N"] | None,
    in_order: bool,
) -> Float[Array, "B T N H"]:
    """Return the result of `attention`, one block of queries at a time, forward and backward.

    queries, keys: their coordinates, [B or 1, T] and [B or 1, S].
    in_order: queries and keys are the same tokens at positions 0, 1, 2, ..., and the mask is
    causal, so that early queries do not need the later keys.
    """
    (batch, length, heads, dim), kv_heads = q.shape, k.shape[2]
    if q.dtype == jnp.float32:  # scaling a bf16 q would round it, so its scores are scaled
        q, scale = scale * q, 1.0
    blocking = Blocking(causal, scale, soft_cap, cut_spans(q.shape, k.shape[1], in_order))
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)  # [B, T, K, G, H]
    q = q.transpose(0, 2, 3, 1, 4)  # [B, K, G, T, H]
    # Keys are fp32 outside the loop, because their gradients are summed over blocks in that dtype.
    wide = KeysValues(*(x.swapaxes(1, 2).astype(jnp.float32) for x in (k, v)))  # [B, K, S, H]
    queries = jax.tree.map(lambda x: x[:, None, None, :, None], queries)  # [B, 1, 1, T, 1]
    keys = jax.tree.map(lambda x: x[:, None, None, None], keys)  # [B, 1, 1, 1, S]
    if sinks is not None:
        sinks = sinks.astype(jnp.float32).reshape(1, kv_heads, -1, 1, 1)  # [1, K, G, 1, 1]
    out: Array = _attend(q, wide, sinks, queries, (keys, window), blocking)
    return out.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, dim)  # [B, T, N, H]


def attention_mask(
    queries: Coordinates,
    keys: Coordinates,
    *,
    causal: bool,
    window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "*b T S"] | None:
    """Return True for each key that a query attends to, or None if that is every key.

    The coordinates broadcast against each other: [.., T, 1] of queries and [.., 1, S] of keys. A
    query attends to keys of its own segment. If `causal`, keys after its own position are left out.
    `window` is the number of keys up to the query's own position. It needs `causal`.
    """
    mask = None
    if causal:
        distance = queries.positions - keys.positions  # [.., T, S]
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
    if queries.segments is not None and keys.segments is not None:
        same = queries.segments == keys.segments  # [.., T, S]
        mask = same if mask is None else mask & same
    return mask


def cut_spans(shape: tuple[int, ...], kv_length: int, in_order: bool) -> tuple[Span, ...]:
    """Cut queries of shape [B, T, N, H] into spans. With causal rows a span skips the later keys.

    On accelerators there is one span, so that their kernels stay whole.
    """
    batch, length, heads, _ = shape
    stops = [length]
    if in_order and device().platform == "cpu" and length >= CAUSAL_SPANS * SMALLEST_SPAN:
        step = BLOCK_MULTIPLE * ceil(length / (CAUSAL_SPANS * BLOCK_MULTIPLE))
        stops = [*range(step, length, step), length]
    seen = stops if in_order else [kv_length]
    return tuple(
        Span(start, stop, keys, block_size(batch, stop - start, heads, keys))
        for start, stop, keys in zip([0, *stops], stops, seen, strict=False)
    )


def block_size(batch: int, length: int, heads: int, kv_length: int) -> int:
    """Return the number of queries in a block, whose scores fit the budget of one device.

    Fewer, larger blocks are faster. Of the sizes from half of the budget to all of it, the size
    with the least padding is chosen.
    """
    budget = CPU_SCORES if device().platform == "cpu" else ACCELERATOR_SCORES
    mesh = jax.sharding.get_abstract_mesh()
    row = 4 * prod((batch, heads, kv_length)) / max(1, mesh.size)
    most = max(SMALLEST_BLOCK, floor(budget / row))
    if most >= length:
        return length
    sizes = range(most // BLOCK_MULTIPLE * BLOCK_MULTIPLE, most // 2, -BLOCK_MULTIPLE)
    return min(sizes, key=lambda size: size * ceil(length / size))


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
    q: Float[Array, "B K G T H"],
    wide: KeysValues,
    sinks: Float[Array, "1 K G 1 1"] | None,
    queries: Coordinates,
    masking: Masking,
    blocking: Blocking,
) -> Float[Array, "B K G T H"]:
    return _forward(q, wide, sinks, queries, masking, blocking)[0]


def _forward(
    q: Array,
    wide: KeysValues,
    sinks: Array | None,
    queries: Coordinates,
    masking: Masking,
    blocking: Blocking,
) -> tuple[Array, tuple]:
    with_ones, right = _sums_by_product(q), _values(q, wide.v)

    def span(one: Span) -> tuple[Array, Array, Array]:
        k, v, keys = _first(one.keys, (wide.k, right, masking[0]))

        def block(_: None, x: tuple[Array, Coordinates]) -> tuple[None, tuple[Array, Array, Array]]:
            q, queries = x
            scores = _scores(q, k, queries, (keys, masking[1]), blocking)[0]
            top = scores.max(-1, keepdims=True)  # [B, K, G, T, 1]
            top = top if sinks is None else jnp.maximum(top, sinks)
            weights = jnp.exp(scores - top)  # [B, K, G, T, S]
            out = _product(weights.astype(q.dtype), v, 4, 2)  # [B, K, G, T, H or H + 1]
            total = out[..., -1:] if with_ones else weights.sum(-1, keepdims=True)
            total = total if sinks is None else total + jnp.exp(sinks - top)
            out = out[..., : q.shape[-1]] / total
            return None, (out.astype(q.dtype), top, total)

        return _over_blocks(block, None, (q, queries), one)[1]

    made = _join_spans([span(one) for one in blocking.spans])
    out, top, total = (checkpoint_name(x, SAVED) for x in made)
    return out, (q, wide, sinks, queries, masking, out, top, total)


def _backward(
    blocking: Blocking, saved: tuple, dout: Array
) -> tuple[Array, KeysValues, Array | None, None, None]:
    """Return the gradients of queries, keys, values and sinks, from scores computed again.

    The sum in the derivative of softmax is dout . out (Dao et al., eq. 4). XLA:CPU's derivative of
    a softmax takes longer than all the rest of a layer.
    """
    q, wide, sinks, queries, masking, out, top, total = saved
    share = dout.astype(jnp.float32) / total  # [B, K, G, T, H]
    mean = jnp.matmul(share * out, jnp.ones((out.shape[-1], 1)), precision="highest")
    with_ones, right = _sums_by_product(q), _values(q, wide.v)
    # With ones, the product below subtracts `mean` too: left and right have one column more.
    left = jnp.concatenate([share, -mean], -1) if with_ones else share
    inputs = (q, queries, left.astype(q.dtype), mean, top)

    def span(one: Span) -> tuple[KeysValues, Array]:
        k, v, keys = _first(one.keys, (wide.k, right, masking[0]))

        def block(sums: KeysValues, x: tuple) -> tuple[KeysValues, Array]:
            q, queries, left, mean, top = x
            scores, slope = _scores(q, k, queries, (keys, masking[1]), blocking)
            weights = jnp.exp(scores - top)
            dweights = _product(left, v, 4, 3)  # [B, K, G, T, S], less `mean` if with ones
            dscores = blocking.scale * weights * (dweights if with_ones else dweights - mean)
            dscores = dscores if slope is None else slope * dscores
            dq = _product(dscores.astype(q.dtype), k, 4, 2).astype(q.dtype)  # [B, K, G, T, H]
            dk = _over_queries(dscores.astype(q.dtype), q)
            dv = _over_queries(weights.astype(q.dtype), left[..., : q.shape[-1]])
            return KeysValues(sums.k + dk, sums.v + dv), dq

        zero = jax.tree.map(jnp.zeros_like, KeysValues(k, wide.v[:, :, : one.keys]))
        return _over_blocks(block, zero, inputs, one)

    sums, dqs = zip(*(span(one) for one in blocking.spans), strict=True)
    dsinks = None
    if sinks is not None:  # a sink has no value, so its slope is the mean alone
        dsinks = -(jnp.exp(sinks - top) * mean).sum((0, 3), keepdims=True)  # [1, K, G, 1, 1]
    return _join_spans(dqs), _sum_spans(sums), dsinks, None, None


_attend.defvjp(_forward, _backward)


def _sums_by_product(q: Float[Array, "B K G T H"]) -> bool:
    """Return True if products compute softmax's sums, by a column of ones beside the values.

    This saves two passes over the scores on XLA:CPU, and costs a copy of the values. It is faster
    where there are more scores than values. In half precision the sums would have rounded weights.
    """
    many = q.shape[2] * q.shape[3] > q.shape[4]
    return device().platform == "cpu" and q.dtype == jnp.float32 and many


def _values(q: Array, v: Array) -> Array:
    """Return v [B, K, S, H], with a column of ones, [B, K, S, H + 1], if `_sums_by_product`."""
    return jnp.concatenate([v, jnp.ones_like(v[..., :1])], -1) if _sums_by_product(q) else v


def _first(count: int, keys: tuple[Array, Array, Coordinates]) -> tuple[Array, Array, Coordinates]:
    """Return the first `count` keys, values and coordinates."""
    k, v, coordinates = keys
    return k[:, :, :count], v[:, :, :count], jax.tree.map(lambda x: x[..., :count], coordinates)


def _join_spans(parts: Sequence[Any]) -> Any:
    """Join arrays [B, K, G, T, ..] of the spans along the queries."""
    return jax.tree.map(lambda *x: x[0] if len(x) == 1 else jnp.concatenate(x, 3), *parts)


def _sum_spans(parts: Sequence[KeysValues]) -> KeysValues:
    """Sum the gradients of keys over spans. All spans but the last have fewer keys."""
    cuts = list(pairwise([0, *(part.k.shape[2] for part in parts)]))

    def add(*every: Array) -> Array:
        pieces = [sum(x[:, :, i:j] for x in every[n:]) for n, (i, j) in enumerate(cuts)]
        return jnp.concatenate(pieces, 2)  # [B, K, S, H]

    return jax.tree.map(add, *parts)


def _scores(
    q: Array, k: Array, queries: Coordinates, masking: Masking, blocking: Blocking
) -> tuple[Float[Array, "B K G T S"], Float[Array, "B K G T S"] | None]:
    """Return masked scores in fp32, and the derivative of their soft-cap, None without one.

    The mask is added. For a select, XLA:CPU would write MASKED in the shape of all scores.
    """
    scores = _product(q, k, 4, 3)
    scores = scores if blocking.scale == 1.0 else blocking.scale * scores
    scores, slope = soft_capped(scores, blocking.soft_cap)
    keys, window = masking
    mask = attention_mask(queries, keys, causal=blocking.causal, window=window)
    return (scores if mask is None else scores + jnp.where(mask, 0.0, MASKED)), slope


def _product(x: Array, y: Array, over: int, keys_over: int) -> Array:
    """Return x [B, K, G, T, .] times y [B, K, S, H] in x's dtype, summed in fp32.

    The sum is over dim `over` of x and `keys_over` of y. Neither is transposed.
    """
    dims = (((over,), (keys_over,)), ((0, 1), (0, 1)))
    return jax.lax.dot_general(x, y.astype(x.dtype), dims, preferred_element_type=jnp.float32)


def _over_queries(
    x: Float[Array, "B K G T S"], y: Float[Array, "B K G T H"]
) -> Float[Array, "B K S H"]:
    """Return the sum of x y over heads and queries, in fp32.

    The form for a CPU does not transpose x, the larger of the two.
    """
    dims = (((2, 3), (2, 3)), ((0, 1), (0, 1)))
    if device().platform != "cpu":
        return jax.lax.dot_general(x, y, dims, preferred_element_type=jnp.float32)
    made = jax.lax.dot_general(y, x, dims, preferred_element_type=jnp.float32)  # [B, K, H, S]
    return jax.lax.optimization_barrier(made).swapaxes(2, 3)  # [B, K, S, H]


def _over_blocks(block: Callable, carry: Any, inputs: tuple, span: Span) -> tuple[Any, Any]:
    """Scan `block` over blocks of the span's queries (dim 3), and join its outputs."""
    length = span.stop - span.start
    inputs = jax.tree.map(lambda x: x[:, :, :, span.start : span.stop], inputs)
    if span.block >= length:
        return block(carry, inputs)
    carry, made = jax.lax.scan(block, carry, jax.tree.map(partial(_cut, size=span.block), inputs))
    return carry, jax.tree.map(partial(_join, length=length), made)


def _cut(x: Array, size: int) -> Array:
    """Cut queries into blocks [blocks, B, K, G, size, H], the last padded with zeros."""
    count = -(-x.shape[3] // size)
    x = jnp.pad(x, [(0, 0)] * 3 + [(0, count * size - x.shape[3]), (0, 0)])
    x = x.reshape(*x.shape[:3], count, size, x.shape[4])  # [B, K, G, blocks, size, H]
    return jnp.moveaxis(x, 3, 0)  # [blocks, B, K, G, size, H]


def _join(x: Array, length: int) -> Array:
    """Join blocks to [B, K, G, T, H] again, without the padding."""
    x = jnp.moveaxis(x, 0, 3)  # [B, K, G, blocks, size, H]
    return x.reshape(*x.shape[:3], -1, x.shape[5])[:, :, :, :length]  # [B, K, G, T, H]
