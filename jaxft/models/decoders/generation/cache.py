"""Keys and values of the tokens so far, for a decoder that gets a few tokens at a time."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.models.decoders.config import DecoderConfig


class Cache(NamedTuple):
    """The keys and values of all layers, [L, B, K, S, H], or of each in a tuple, [B, K, S, H].

    `segments` holds 0 for empty slots and padding. The next token goes to slot `index`. Heads come
    before slots, as attention multiplies them.
    """

    k: Float[Array, "L B K S H"] | tuple[Float[Array, "B K S H"], ...]
    v: Float[Array, "L B K S H"] | tuple[Float[Array, "B K S H"], ...]
    segments: Int[Array, "B S"]
    index: Int[Array, ""]


def init_cache(
    cfg: DecoderConfig, batch: int, length: int, dtype: Any = jnp.float32, unstacked: bool = False
) -> Cache:
    """Return an empty cache of `length` slots a row, padding included.

    unstacked: the layers are a tuple of arrays instead of one array.
    """
    one = jnp.zeros((batch, cfg.num_kv_heads, length, cfg.head_dim), dtype)  # [B, K, S, H]
    empty = (one,) * cfg.num_layers if unstacked else jnp.stack([one] * cfg.num_layers)
    return Cache(empty, empty, jnp.zeros((batch, length), jnp.int32), jnp.int32(0))


def lengthened(cache: Cache, length: int) -> Cache:
    """Return the cache with empty slots behind its own, `length` in all."""
    new = length - cache.segments.shape[1]

    def longer(x: Array) -> Array:
        return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, new), (0, 0)])

    k, v = jax.tree.map(longer, (cache.k, cache.v))
    return cache._replace(k=k, v=v, segments=jnp.pad(cache.segments, ((0, 0), (0, new))))


def place(
    cache: Cache | None, segment_ids: Int[Array, "B T"] | None, shape: tuple[int, ...]
) -> tuple[Int[Array, "B T"] | None, Int[Array, "B S"] | None, Cache | None]:
    """Return the segments of the queries and of all keys, and the cache with the new segments.

    Without a cache the keys are those of this call. `shape` is the shape of the input, [B, T, D].
    """
    if cache is None:
        return segment_ids, segment_ids, None
    new = jnp.ones(shape[:2], jnp.int32) if segment_ids is None else segment_ids
    segments = jax.lax.dynamic_update_slice(cache.segments, new, (0, cache.index))  # [B, S]
    return new, segments, cache._replace(segments=segments)


def default_positions(
    segments: Int[Array, "B S"] | None, cache: Cache | None, length: int
) -> Int[Array, "B T"]:
    """Return 0, 1, …, or after a cache the count of real tokens that a row already has."""
    if cache is None or segments is None:
        return jnp.arange(length, dtype=jnp.int32)[None]
    counted = jnp.cumsum(segments != 0, axis=1, dtype=jnp.int32) - 1  # [B, S]
    return jax.lax.dynamic_slice_in_dim(counted, cache.index, length, axis=1)  # [B, T]


def append(
    memory: tuple[Array, Array],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    layer: Int[Array, ""] | int,
    index: Int[Array, ""],
) -> tuple[tuple[Array, Array], Float[Array, "B S K H"], Float[Array, "B S K H"]]:
    """Write one layer's k and v from slot `index` on.

    memory: `k` and `v` of a cache, stacked or of this layer alone.
    Returns: the memory, and the layer's k and v of all slots. Only T slots are written.
    """

    def write(old: Array, new: Array) -> Array:
        new, start = new.swapaxes(1, 2).astype(old.dtype), (0, 0, index, 0)  # [B, K, T, H]
        if old.ndim == new.ndim:  # the layer alone, [B, K, S, H]
            return jax.lax.dynamic_update_slice(old, new, start)
        return jax.lax.dynamic_update_slice(old, new[None], (layer, *start))

    def read(x: Array) -> Array:
        own = x if x.ndim == k.ndim else jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)
        return own.swapaxes(1, 2).astype(k.dtype)  # [B, S, K, H]

    written = write(memory[0], k), write(memory[1], v)
    return written, read(written[0]), read(written[1])
