"""Flash attention of jax for TPUs ("splash"), for every mask that does not depend on values."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_mask as masks,
)
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from jaxft.core.sharding import AXIS_RULES
from jaxft.kernels.attention.blockwise_attention import SAVED

LANES = 128  # tokens, the lanes of a TPU
BLOCKS = (512, 384, 256, 128)  # tokens, queries and keys
NO_QUERY = -1  # the segment of padded keys


def splash_attention(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B S K H"],
    v: Float[Array, "B S K H"],
    segments: Int[Array, "B T"] | None,
    causal: bool,
    window: int | None,
    scale: float,
    soft_cap: float | None = None,
    sinks: Float[Array, " N"] | None = None,
    interpret: bool = False,
) -> Float[Array, "B T N H"]:
    """Return attention. Each device computes its rows and heads.

    segments: of queries and keys, which are the same tokens. interpret: run the kernel on a CPU,
    for tests.
    """
    length, keys = q.shape[1], k.shape[1]
    pair = None if segments is None else splash.SegmentIds(segments, segments)
    if pair is None and keys % LANES and not causal:  # hide the padded keys
        pair = splash.SegmentIds(*(jnp.ones(x.shape[:2], jnp.int32) for x in (q, k)))
    if pair is not None:
        # A padded query attends to the last query's keys, so that its softmax has terms.
        queries = jnp.pad(pair.q, _pads(pair.q), mode="edge")
        pair = splash.SegmentIds(
            queries, jnp.pad(pair.kv, _pads(pair.kv), constant_values=NO_QUERY)
        )
    q, k, v = (jnp.pad(x, _pads(x)) for x in (q * scale, k, v))
    run = partial(_local, causal=causal, window=window, soft_cap=soft_cap, interpret=interpret)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size > 1:
        rows = AXIS_RULES["batch"]
        heads = PartitionSpec(rows, None, AXIS_RULES["heads"])
        specs = (heads, heads, heads, PartitionSpec(rows), PartitionSpec(AXIS_RULES["heads"]))
        run = jax.shard_map(run, in_specs=specs, out_specs=heads, check_vma=False)
    return run(q, k, v, pair, sinks)[:, :length]


def _local(
    q: Array, k: Array, v: Array, segments: splash.SegmentIds | None, sinks: Array | None, *,
    causal: bool, window: int | None, soft_cap: float | None, interpret: bool,
) -> Array:  # fmt: skip
    """Return attention of one device's rows and heads, of padded lengths."""
    size = (q.shape[1], k.shape[1])
    mask: masks.Mask = masks.FullMask(size)
    if causal:
        mask = masks.CausalMask(size)
        if window is not None:
            mask = masks.LocalMask(size, (window - 1, 0), 0)
    bq, bk = (next(block for block in BLOCKS if length % block == 0) for length in size)
    blocks = splash.BlockSizes(
        block_q=bq, block_kv=bk, block_kv_compute=bk,
        block_q_dkv=bq, block_kv_dkv=bk, block_kv_dkv_compute=bk,
        block_q_dq=bq, block_kv_dq=bk,
    )  # fmt: skip
    kernel = splash.make_splash_mha(
        masks.MultiHeadMask([mask] * q.shape[2]), block_sizes=blocks, head_shards=1,
        q_seq_shards=1, residual_checkpoint_name=SAVED, attn_logits_soft_cap=soft_cap,
        interpret=interpret,
    )  # fmt: skip
    by_head = (x.swapaxes(1, 2) for x in (q, k, v))  # [B, N, T, H], [B, K, S, H]
    in_axes = (0, 0, 0, 0, None)  # a row has no sinks of its own
    out: Any = jax.vmap(kernel, in_axes)(*by_head, segments, sinks)  # [B, N, T, H]
    return out.swapaxes(1, 2)  # [B, T, N, H]


def _pads(x: Array) -> list[tuple[int, int]]:
    """Return the padding of x [B, T, ..] up to a multiple of LANES tokens, for jnp.pad."""
    return [(0, 0), (0, -x.shape[1] % LANES), *[(0, 0)] * (x.ndim - 2)]
