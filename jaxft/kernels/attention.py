"""Attention: one function for all models. Its form depends on device, dtype and mask."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.runtime import device
from jaxft.kernels.attention_mask import Coordinates
from jaxft.kernels.blockwise_attention import MASKED, blockwise_attention

LENGTH_MULTIPLE = 8  # tokens, for cuDNN


def attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    *,
    causal: bool,
    q_positions: Int[Array, "B T"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    window: int | Int[Array, ""] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale q k^T) v over the keys that each query attends to. Softmax is fp32.

    q [B, T, N, H], k and v [B, S, K, H]: N query heads share K key heads, N a multiple of K
    (grouped-query attention).
    causal: a query attends to no key after its own position.
    q_positions: [B or 1, T], by default 0 to T - 1. If T == S, keys have the positions of the
    queries, and else 0 to S - 1.
    q_segments, kv_segments: a query attends only to keys of its own segment. By default all tokens
    are one segment, and keys have the segments of the queries. Segment 0 is padding: its output is
    finite and has no meaning.
    window: a query attends to at most so many keys, of which its own position is the last. A traced
    window, for layers that differ within a scan, excludes flash attention. A Python int does not.
    scale: by default 1 / sqrt(H).

    Returns: [B, T, N, H] in q's dtype.
    Raises: ValueError for a window without `causal`, and for kv_segments without q_segments.

    A GPU runs cuDNN's flash attention if it supports the dtype, the head dim and the mask. In all
    other cases attention is computed by blocks of queries, so that not all scores exist at once.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if q_segments is not None and kv_segments is None:
        kv_segments = q_segments
    if window is not None and not causal:
        raise ValueError("window needs causal=True: it counts keys before the query")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("kv_segments needs q_segments: attention stays within a segment")
    aligned = q.shape[1] == k.shape[1]
    # cuDNN masks by the index of a token, so positions have to be 0, 1, 2, ...
    in_order = causal and aligned and q_positions is None
    whole = q_segments is None and (in_order or not causal)
    if whole and not isinstance(window, jax.Array) and cudnn_takes(q):
        return _flash(q, k, v, causal, window, scale)
    positions = _count(q.shape[1]) if q_positions is None else q_positions  # [B or 1, T]
    queries = Coordinates(positions, q_segments)
    keys = Coordinates(positions if aligned else _count(k.shape[1]), kv_segments)
    return blockwise_attention(
        q, k, v, queries, keys, causal=causal, window=window, scale=scale, in_order=in_order
    )


def cudnn_takes(q: Float[Array, "B T N H"]) -> bool:
    """Return True if cuDNN's flash attention runs here for these queries.

    It supports half precision, and head dims that are multiples of 8 up to 256 (Hopper).
    """
    half, head_dim = q.dtype in (jnp.bfloat16, jnp.float16), q.shape[-1]
    return device().platform == "gpu" and half and head_dim % 8 == 0 and head_dim <= 256


def _flash(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    causal: bool,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return attention by cuDNN.

    Its backward pass refuses odd numbers of queries or keys, such as the 77 of CLIP, so these are
    padded. A causal mask hides the padding from the queries. Without one, cuDNN gets the number of
    keys.
    """
    left = None if window is None else (window - 1, 0)  # keys before and after the query
    length, keys = q.shape[1], k.shape[1]
    hidden = keys % LENGTH_MULTIPLE and not causal
    lengths = jnp.full(k.shape[:1], keys, jnp.int32) if hidden else None  # [B]
    q, k, v = (_padded(x) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=left,
        key_value_seq_lengths=lengths, implementation="cudnn",
    )  # fmt: skip
    return out[:, :length]


def _padded(x: Float[Array, "B T N H"]) -> Float[Array, "B T2 N H"]:
    """Return x with zeros up to a multiple of LENGTH_MULTIPLE tokens."""
    extra = -x.shape[1] % LENGTH_MULTIPLE
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x


def _count(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)[None]


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"] | None = None,
    scale: float | None = None,
) -> Float[Array, "B T N H"]:
    """Return attention by its formula, in fp32, with all scores at once.

    mask: [B or 1, T, S], True for each key that a query attends to. The other forms are tested
    against this function.
    """
    batch, length, heads, dim = q.shape
    k, v = k.astype(jnp.float32), v.astype(jnp.float32)
    q32 = q.astype(jnp.float32).reshape(batch, length, k.shape[2], -1, dim)  # [B, T, K, G, H]
    scores = jnp.einsum("btkgh,bskh->bkgts", q32, k)  # [B, K, G, T, S]
    scores *= dim**-0.5 if scale is None else scale
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    out = jnp.einsum("bkgts,bskh->btkgh", jax.nn.softmax(scores, -1), v)  # [B, T, K, G, H]
    return out.reshape(batch, length, heads, dim).astype(q.dtype)  # [B, T, N, H]
