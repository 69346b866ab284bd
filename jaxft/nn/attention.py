"""The one attention function of the project; which kernel runs where is decided here alone."""

from functools import partial
from math import prod
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# Bytes of fp32 scores that one query block may make; on CPU fewer, larger blocks measured best.
CPU_SCORES, ACCELERATOR_SCORES = 2**24, 2**28
SMALLEST_BLOCK = 16
MASKED = -1e30  # finite, so that a row with nothing to see stays finite


class Rows(NamedTuple):
    """What the mask compares: positions and segments, (B or 1, length); segments may be absent."""

    positions: Int[Array, "B T"]
    segments: Int[Array, "B T"] | None


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
    if kv_positions is None and q_positions is not None and q.shape[1] == k.shape[1]:
        kv_positions = q_positions
    keys = Rows(_positions(kv_positions, k.shape[1]), kv_segments)
    return _blockwise(q, k, v, queries, keys, causal, window, scale)


def _cudnn_takes(q: Array) -> bool:
    """cuDNN's flash attention: half precision, head_dim a multiple of 8 up to 256 (Hopper)."""
    half, head_dim = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    return jax.default_backend() == "gpu" and half and head_dim % 8 == 0 and head_dim <= 256


def _positions(positions: Array | None, length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)[None] if positions is None else positions


def _blockwise(
    q: Array,
    k: Array,
    v: Array,
    queries: Rows,
    keys: Rows,
    causal: bool,
    window: int | Array | None,
    scale: float,
) -> Array:
    """One block of queries at a time, so that only O(block x S) scores exist, backward included."""
    (batch, length, heads, dim), (kv_length, kv_heads) = q.shape, k.shape[1:3]
    # Keys stay fp32 outside the loop: their gradients sum over blocks, in that precision.
    wide = (k.swapaxes(1, 2).astype(jnp.float32), v.swapaxes(1, 2).astype(jnp.float32))
    q = q.reshape(batch, length, kv_heads, heads // kv_heads, dim)

    @jax.checkpoint
    def block(wide: tuple[Array, Array], q: Array, queries: Rows) -> Array:
        k, v = (x.astype(q.dtype) for x in wide)
        scores = scale * jnp.einsum("btkgh,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
        mask = _mask(queries, keys, causal, window)
        if mask is not None:
            scores = jnp.where(mask[:, None, None], scores, MASKED)
        weights = jax.nn.softmax(scores, axis=-1).astype(q.dtype)
        return jnp.einsum("bkgts,bksh->btkgh", weights, v)

    size = block_size(batch, length, heads, kv_length)
    if size >= length:
        out = block(wide, q, queries)
    else:
        blocks = jax.tree.map(partial(_cut, size=size), (q, queries))
        _, out = jax.lax.scan(lambda _, x: (None, block(wide, *x)), None, blocks)
        out = out.swapaxes(0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]
    return out.reshape(batch, length, heads, dim)


def _mask(queries: Rows, keys: Rows, causal: bool, window: int | Array | None) -> Array | None:
    """(B or 1, T, S) of what may be seen; None when everything may."""
    mask = None
    if causal:
        before = queries.positions[:, :, None] - keys.positions[:, None, :]
        mask = before >= 0
        if window is not None:
            mask &= before < window
    if queries.segments is not None and keys.segments is not None:
        same = queries.segments[:, :, None] == keys.segments[:, None, :]
        mask = same if mask is None else mask & same
    return mask


def block_size(batch: int, length: int, heads: int, kv_length: int) -> int:
    """Queries a block: as many (a power of two) as the scores' budget of one device allows."""
    budget = CPU_SCORES if jax.default_backend() == "cpu" else ACCELERATOR_SCORES
    mesh = jax.sharding.get_abstract_mesh()
    row = 4 * prod((batch, heads, kv_length)) / max(1, mesh.size)
    size = SMALLEST_BLOCK
    while 2 * size * row <= budget and size < length:
        size *= 2
    return min(size, length)


def _cut(x: Array, size: int) -> Array:
    """(B, T, ...) as (blocks, B, size, ...), zero-padded at the end."""
    count = -(-x.shape[1] // size)
    x = jnp.pad(x, [(0, 0), (0, count * size - x.shape[1])] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], count, size, *x.shape[2:]).swapaxes(0, 1)
