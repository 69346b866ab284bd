"""Flash attention of NVIDIA's cuDNN, for whole rows and for rows of several segments."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxft.core.runtime import Device

CUDNN_MULTIPLE = 8  # tokens
LARGEST_HEAD_DIM = 256  # of Hopper. Older GPUs have 128
NO_SEGMENT = -1  # in lists of segments that are shorter than the longest


def refusal(device: Device, q: Float[Array, "B T N H"], soft_cap: float | None, sinks: bool) -> str:
    """Return why cuDNN does not run for these queries on this device, or ""."""
    head_dim = q.shape[-1]
    if device.platform != "gpu":
        return f"it runs on GPUs, and the device is a {device.kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float16):
        return f"it runs in bfloat16 and float16, and compute_dtype is {q.dtype}"
    if head_dim % 8 or head_dim > LARGEST_HEAD_DIM:
        return (
            f"its head dims are multiples of 8 up to {LARGEST_HEAD_DIM}, and the model has"
            f" {head_dim}"
        )
    if soft_cap is not None:
        return f"it has no soft-cap of scores, and the model has one of {soft_cap}"
    if sinks:
        return "it has no sinks, as jax calls it, and the model has one for each head"
    return ""


def cudnn_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    causal: bool,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return attention of rows that are one segment each.

    The backward pass refuses odd numbers of queries or keys, such as the 77 of CLIP, so these are
    padded. A causal mask hides the padding from the queries. Without one, cuDNN gets the number of
    keys.
    """
    left = None if window is None else (window - 1, 0)  # keys before and after the query
    length, keys = q.shape[1], k.shape[1]
    hidden = keys % CUDNN_MULTIPLE and not causal
    lengths = jnp.full(k.shape[:1], keys, jnp.int32) if hidden else None  # [B]
    q, k, v = (_padded(x) for x in (q, k, v))
    out = jax.nn.dot_product_attention(
        q, k, v, scale=scale, is_causal=causal, local_window_size=left,
        key_value_seq_lengths=lengths, implementation="cudnn",
    )  # fmt: skip
    return out[:, :length]


def cudnn_segments(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B T K H"],
    v: Float[Array, "B T K H"],
    segments: Int[Array, "B T"],
    most: int,
    window: int | None,
    scale: float,
) -> Float[Array, "B T N H"]:
    """Return causal self-attention within the segments of each row.

    most: the largest number of segments in a row, padding counted as one. Each segment is a run of
    tokens. The padding attends to itself, because cuDNN leaves the outputs of tokens without a
    segment undefined.
    """
    from jax._src.cudnn import fused_attention_stablehlo as cudnn  # jax.nn has no such form

    length, heads = q.shape[1], q.shape[2]
    groups = heads // k.shape[2]
    # jax computes the offsets of keys from the number of query heads, so both need as many.
    k, v = (jnp.repeat(x, groups, axis=2) if groups > 1 else x for x in (k, v))
    if extra := -length % CUDNN_MULTIPLE:
        segments = jnp.pad(segments, ((0, 0), (0, extra)), mode="edge")
        q, k, v = (_padded(x) for x in (q, k, v))
    starts, sizes = runs(segments, most)
    out: Any = cudnn.dot_product_attention(
        q, k, v,
        q_seqlen=sizes, kv_seqlen=sizes, q_offsets=starts, kv_offsets=starts,
        scale=scale, mask_type=cudnn.MaskType.PADDING_CAUSAL, sliding_window_length=window,
    )  # fmt: skip
    return out[:, :length]


def runs(segments: Int[Array, "B T"], most: int) -> tuple[Int[Array, "B M1"], Int[Array, "B M"]]:
    """Return the first token of each run of equal ids [B, most + 1], and its length [B, most].

    Entries after the last run are NO_SEGMENT.
    """
    batch, length = segments.shape
    first = jnp.ones((batch, 1), bool)
    begins = jnp.concatenate([first, segments[:, 1:] != segments[:, :-1]], axis=1)  # [B, T]
    places = jnp.where(begins, jnp.arange(length, dtype=jnp.int32), length)
    starts = jnp.sort(places, axis=1)[:, : most + 1]  # [B, M + 1], `length` after the last run
    starts = jnp.pad(starts, ((0, 0), (0, most + 1 - starts.shape[1])), constant_values=length)
    sizes = jnp.diff(starts, axis=1)  # [B, M]
    there = starts < length
    return jnp.where(there, starts, NO_SEGMENT), jnp.where(there[:, :-1], sizes, NO_SEGMENT)


def _padded(x: Float[Array, "B T N H"]) -> Float[Array, "B T2 N H"]:
    """Return x with zeros up to a multiple of CUDNN_MULTIPLE tokens."""
    extra = -x.shape[1] % CUDNN_MULTIPLE
    return jnp.pad(x, ((0, 0), (0, extra), (0, 0), (0, 0))) if extra else x
