"""Attention by blocks: their sizes, their memory, and the form of each device."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.attention import blockwise_attention as module
from jaxft.kernels.attention.attention import OVERRIDE, attention, reference
from jaxft.kernels.attention.blockwise_attention import (
    Coordinates,
    attention_mask,
    block_size,
    cut_spans,
)
from tests.devices import traced_for
from tests.kernels.attention.test_attention import data, jit


def test_t5_bf16_sums_key_gradients_over_blocks_in_fp32(monkeypatch):
    monkeypatch.setattr(module, "CPU_SCORES", 1)
    q, k, v = (x.astype(jnp.bfloat16) for x in data(length=1024, kv_length=8, heads=2, kv_heads=1))
    grad = jit(jax.grad(lambda v: attention(q, k, v, causal=False).astype(jnp.float32).sum()))
    want = jax.grad(lambda v: reference(*(x.astype(jnp.float32) for x in (q, k, v))).sum())(v)
    np.testing.assert_allclose(grad(v), want.astype(jnp.float32), rtol=0.01)
    assert attention(q, k, v, causal=False).dtype == jnp.bfloat16


def test_memory_grows_with_the_block_and_not_with_all_scores():
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in data(1, 8192, 4, 4, 16)]
    step = jax.jit(jax.grad(lambda *a: attention(*a, causal=True).sum(), argnums=(0, 1, 2)))
    scores = 4 * 4 * 8192 * 8192
    assert step.lower(*args).compile().memory_analysis().temp_size_in_bytes < scores / 8


def test_a_block_fits_the_budget_and_has_little_padding():
    scores = 4 * 8 * 4096  # bytes a query: 8 heads, 4,096 keys
    assert block_size(1, 4096, 8, 4096) * scores <= module.CPU_SCORES
    assert block_size(1, 100, 8, 4096) == 100
    assert block_size(1, 1000, 8, 2**20) == module.SMALLEST_BLOCK
    with traced_for("tpu"):
        assert block_size(1, 4096, 8, 4096) * scores <= module.ACCELERATOR_SCORES
        alone = block_size(8, 8192, 8, 8192)
    with traced_for("tpu", (2, 2, 2)):  # eight devices hold eight times as much
        assert block_size(8, 8192, 8, 8192) == 8 * alone


def test_causal_spans_are_for_a_cpu():
    shape = (2, 300, 4, 8)
    assert [(one.start, one.stop, one.keys) for one in cut_spans(shape, 300, True)] == [
        (0, 104, 104),
        (104, 208, 208),
        (208, 300, 300),
    ]
    assert len(cut_spans(shape, 300, False)) == 1
    with traced_for("gpu"):
        (one,) = cut_spans(shape, 300, True)
        assert (one.start, one.stop, one.keys) == (0, 300, 300)


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_the_form_of_an_accelerator_equals_the_reference_too(platform, monkeypatch):
    """Traced for that device, and run here."""
    monkeypatch.setenv(OVERRIDE, "blockwise")
    args, mask = data(length=104), jnp.tril(jnp.ones((1, 104, 104), bool))

    def both(fn):
        return jax.value_and_grad(lambda *a: (fn(*a) ** 2).sum(), argnums=(0, 1, 2))

    ours = both(partial(attention, causal=True))
    with traced_for(platform):
        traced = jax.make_jaxpr(ours)(*args)
    assert "optimization_barrier" not in str(traced)
    assert "optimization_barrier" in str(jax.make_jaxpr(ours)(*args))
    got = jit(partial(jax.core.eval_jaxpr, traced.jaxpr, traced.consts))(*args)
    want = jit(both(partial(reference, mask=mask)))(*args)
    for a, b in zip(got, jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


# ---- masks -----------------------------------------------------------------------------------


def sides(positions, segments=None):
    """Queries [T, 1] and keys [1, T] at the same coordinates."""
    positions = jnp.array(positions)
    segments = None if segments is None else jnp.array(segments)
    queries = Coordinates(positions[:, None], None if segments is None else segments[:, None])
    return queries, Coordinates(positions[None], None if segments is None else segments[None])


def test_every_key_counts_without_a_mask():
    assert attention_mask(*sides(range(4)), causal=False) is None


def test_causal_by_positions():
    mask = attention_mask(*sides([2, 0, 1]), causal=True)
    np.testing.assert_array_equal(mask, [[1, 1, 1], [0, 1, 0], [0, 1, 1]])


@pytest.mark.parametrize("window", [2, jnp.int32(2)])
def test_a_window_counts_the_query_itself(window):
    mask = attention_mask(*sides(range(4)), causal=True, window=window)
    np.testing.assert_array_equal(mask, np.tri(4) - np.tri(4, k=-2))


def test_segments_with_and_without_order():
    queries, keys = sides([0, 1, 0, 1], [1, 1, 2, 2])
    same = np.kron(np.eye(2), np.ones((2, 2)))
    np.testing.assert_array_equal(attention_mask(queries, keys, causal=False), same)
    np.testing.assert_array_equal(attention_mask(queries, keys, causal=True), same * np.tri(4))
