"""Attention: one function for all models. Its kernel depends on device, dtype and mask."""

import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.errors import UserError
from jaxft.core.runtime import Device, device
from jaxft.core.sharding import batch_ways
from jaxft.kernels.attention.blockwise_attention import (
    MASKED,
    SAVED,
    Coordinates,
    blockwise_attention,
)
from jaxft.kernels.attention.cudnn_attention import cudnn_attention, cudnn_segments
from jaxft.kernels.attention.cudnn_attention import refusal as cudnn_refusal
from jaxft.kernels.elementwise import soft_capped

CUDNN_FORWARD = "dot_product_attention_fwd_wrapper"  # jax's primitive
OVERRIDE = "JAXFT_ATTENTION"  # an environment variable: the name of a kernel
CALLS = {"cudnn": "__cudnn$fmha", "splash": "tpu_custom_call"}  # in a compiled program


@jax.named_scope("attention")
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
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    segments_in_row: int = 0,
) -> Float[Array, "B T N H"]:
    """Return softmax(scale q k^T) v [B, T, N, H] over the keys of each query, in q's dtype.

    q [B, T, N, H], k and v [B, S, K, H]: N query heads share K key heads, N a multiple of K
    (grouped-query attention). Softmax is fp32.
    causal: a query attends to no key after its own position.
    q_positions: [B or 1, T], by default 0 to T - 1. If T == S, keys have the same, else 0 to S - 1.
    q_segments, kv_segments: a query attends only to keys of its own segment. By default there is
    one, and keys have the segments of the queries. Segment 0 is padding, with any finite output.
    window: a query attends to at most so many keys, of which its own position is the last. A traced
    window, for layers that differ within a scan, excludes flash attention. A Python int does not.
    scale: by default 1 / sqrt(H). soft_cap: scores s become soft_cap * tanh(s / soft_cap).
    sinks: a score for each query head, of a key whose value is 0 and that every query attends to.
    segments_in_row: the most segments of a row, padding counted as one, where each segment of
    q_segments is one run of tokens. 0 if that is not known. cuDNN needs it.

    Raises: ValueError for a window without `causal`, and for kv_segments without q_segments.
    A GPU runs cuDNN's flash attention, and a TPU jax's own, if they can. Others compute by blocks.
    """
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    if window is not None and not causal:
        raise ValueError("window needs causal=True: it counts keys before the query")
    if q_segments is None and kv_segments is not None:
        raise ValueError("kv_segments needs q_segments: attention stays within a segment")
    aligned = q.shape[1] == k.shape[1]
    # Flash kernels mask by the index of a token, so positions have to be 0, 1, 2, ...
    in_order = causal and aligned and q_positions is None
    by_index = kv_segments is None and (in_order or not causal)
    if by_index and not isinstance(window, jax.Array):
        kernel = choose(q, soft_cap, sinks is not None)
        if kernel == "cudnn" and q_segments is None:
            return cudnn_attention(q, k, v, causal, window, scale)
        if kernel == "cudnn" and q_segments is not None and segments_in_row and in_order:
            return cudnn_segments(q, k, v, q_segments, segments_in_row, window, scale)
        if kernel == "splash":
            from jaxft.kernels.attention.splash_attention import splash_attention  # takes 0.4 s

            return splash_attention(q, k, v, q_segments, causal, window, scale, soft_cap, sinks)
    positions = _count(q.shape[1]) if q_positions is None else q_positions  # [B or 1, T]
    kv_segments = q_segments if kv_segments is None else kv_segments
    keys = Coordinates(positions if aligned else _count(k.shape[1]), kv_segments)
    return blockwise_attention(
        q, k, v, Coordinates(positions, q_segments), keys,
        causal=causal, window=window, scale=scale, soft_cap=soft_cap, sinks=sinks,
        in_order=in_order,
    )  # fmt: skip


def choose(q: Float[Array, "B T N H"], soft_cap: float | None = None, sinks: bool = False) -> str:
    """Return the kernel for these queries on the device of the mesh, a key of KERNELS.

    OVERRIDE in the environment names another one. Raises: UserError if that one cannot run here.
    """
    asked, here = os.environ.get(OVERRIDE, "auto"), device()
    if asked not in ("auto", *KERNELS):
        raise UserError(f"{OVERRIDE}={asked!r} is not one of auto, {', '.join(KERNELS)}")
    if asked != "auto":
        if reason := KERNELS[asked](here, q, soft_cap, sinks):
            raise UserError(f"{OVERRIDE}={asked} cannot run: {reason}; unset it")
        return asked
    return next(name for name, refusal in KERNELS.items() if not refusal(here, q, soft_cap, sinks))


def used(program: str) -> str:
    """Return the kernel of attention in the text of a compiled program."""
    return next((name for name, call in CALLS.items() if call in program), "blockwise")


# A policy of jax.checkpoint: True for the results of a kernel's forward pass, which are its output
# and a number for each query. Without them the backward pass would run the kernel forward again.
saves_attention = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.save_only_these_names(SAVED),
    lambda primitive, *_, **__: primitive.name == CUDNN_FORWARD,
)


def _splash_refusal(
    device: Device, q: Float[Array, "B T N H"], soft_cap: float | None, sinks: bool
) -> str:
    """Return why jax's attention for TPUs does not run for these queries, or ""."""
    del soft_cap, sinks  # it has both
    if device.platform != "tpu":
        return f"it runs on TPUs, and the device is a {device.kind}"
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1 and q.shape[0] % batch_ways(mesh):
        return f"the mesh {dict(mesh.shape)} does not divide the {q.shape[0]} rows"
    return ""


# Kernels in order of preference. Each has a function that returns why it cannot run, or "".
KERNELS: dict[str, Callable[[Device, Any, float | None, bool], str]] = {
    "cudnn": cudnn_refusal,
    "splash": _splash_refusal,
    "blockwise": lambda device, q, soft_cap, sinks: "",
}


def _count(length: int) -> Array:
    return jnp.arange(length, dtype=jnp.int32)[None]


def reference(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    mask: Bool[Array, "#B T S"] | None = None,
    scale: float | None = None,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
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
    scores, _ = soft_capped(scores, soft_cap)
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, MASKED)
    if sinks is not None:
        column = sinks.astype(jnp.float32).reshape(1, k.shape[2], -1, 1, 1)  # [1, K, G, 1, 1]
        column = jnp.broadcast_to(column, (*scores.shape[:4], 1))  # [B, K, G, T, 1]
        scores = jnp.concatenate([scores, column], -1)  # [B, K, G, T, S + 1]
    weights = jax.nn.softmax(scores, -1)[..., : k.shape[1]]  # [B, K, G, T, S]
    out = jnp.einsum("bkgts,bskh->btkgh", weights, v)  # [B, T, K, G, H]
    return out.reshape(batch, length, heads, dim).astype(q.dtype)  # [B, T, N, H]
