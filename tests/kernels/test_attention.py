"""The attention function against a plain softmax, its masks, blocks and memory."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.sharding import batch_sharding, make_mesh
from jaxft.kernels import attention as module
from jaxft.kernels.attention import attention, block_size

# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = partial(jax.jit, compiler_options=QUICK)


def data(batch=2, length=37, heads=4, kv_heads=2, dim=8, kv_length=None):
    keys = jax.random.split(jax.random.key(0), 3)
    kv = (batch, kv_length or length, kv_heads, dim)
    shapes = ((batch, length, heads, dim), kv, kv)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def plain(q, k, v, mask=None, scale=None):
    """Repeat the heads, make every score, softmax."""
    k, v = (jnp.repeat(x, q.shape[2] // x.shape[2], axis=2) for x in (k, v))
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) * (scale or q.shape[-1] ** -0.5)
    if mask is not None:
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
    return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores, -1), v)


def same(args, ours, mask, scale=None, length=None):
    """Outputs and gradients agree, over the first `length` queries."""

    def both(fn):
        def loss(*args):
            out = fn(*args)[:, :length]
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

        return jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)

    got, want = both(ours), both(partial(plain, mask=mask, scale=scale))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5)


@pytest.fixture(params=[("one block", False), ("one block", True), ("many", False), ("many", True)])
def blocks(request, monkeypatch):
    """37 queries in one block, or in three of 16 with the last one padded; or in spans of these,
    whole or in blocks of 8."""
    count, spans = request.param
    monkeypatch.setattr(module, "CPU_SCORES", 2**30 if count == "one block" else 1)
    monkeypatch.setattr(module, "SMALLEST_SPAN", 8 if spans else 32)
    smallest = 8 if spans else 16
    monkeypatch.setattr(module, "SMALLEST_BLOCK", smallest)
    assert block_size(2, 37, 4, 37) == (37 if count == "one block" else smallest)
    cut = module._spans((2, 37, 4, 8), 37, True)
    assert any(one.size < one.end - one.start for one in cut) == (count == "many")
    assert module._span_ends(37) == ([16, 32, 37] if spans else [37])


def test_causal_with_grouped_heads(blocks):
    mask = jnp.tril(jnp.ones((1, 37, 37), bool))
    same(data(), partial(attention, causal=True), mask)


def test_not_causal_against_fewer_keys_and_a_scale(blocks):
    args = data(kv_length=11, kv_heads=4)
    same(args, partial(attention, causal=False, scale=0.3), None, scale=0.3)


@pytest.mark.parametrize("window", [1, 5, jnp.int32(5), 2**30])
def test_window_counts_the_query_itself(blocks, window):
    before = jnp.arange(37)[:, None] - jnp.arange(37)
    mask = ((before >= 0) & (before < window))[None]
    same(data(), lambda *a: attention(*a, causal=True, window=window), mask)


def test_t10_segments_do_not_see_each_other_and_padding_is_finite(blocks):
    segments = jnp.repeat(
        jnp.array([[1, 2, 3, 0], [4, 4, 9, 0]]), jnp.array([9, 12, 10, 6]), axis=1
    )
    mask = (segments[:, :, None] == segments[:, None]) & jnp.tril(jnp.ones((37, 37), bool))
    ours = partial(attention, causal=True, q_segments=segments)
    same(data(), ours, mask, length=31)
    assert np.isfinite(ours(*data())).all()


def test_t8_a_query_without_keys_is_finite_with_finite_gradients(blocks):
    empty, full = jnp.zeros((2, 37), jnp.int32), jnp.ones((2, 37), jnp.int32)
    fn = partial(attention, causal=True, q_segments=full, kv_segments=empty)
    out, grads = jax.value_and_grad(lambda *a: fn(*a).sum(), argnums=(0, 1, 2))(*data())
    assert all(np.isfinite(x).all() for x in (out, *grads))


def test_one_query_against_a_cache_equals_the_last_row():
    q, k, v = data()
    want = attention(q[:, :20], k[:, :20], v[:, :20], causal=True, window=7)[:, -1:]
    written = (jnp.arange(37) < 20).astype(jnp.int32)[None].repeat(2, 0)
    got = attention(
        q[:, 19:20],
        k,
        v,
        causal=True,
        q_positions=jnp.array([[19], [19]]),
        q_segments=jnp.ones((2, 1), jnp.int32),
        kv_segments=written,
        window=7,
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_positions_not_indices_decide_when_given():
    length = module.SPANS * module.SMALLEST_SPAN + 2  # rows in order would be cut into spans
    q, k, v = data(length=length)
    order = jax.random.permutation(jax.random.key(1), length)
    want = attention(q, k, v, causal=True)[:, order]
    positions = jnp.broadcast_to(order, (2, length))
    got = attention(q[:, order], k[:, order], v[:, order], causal=True, q_positions=positions)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_t5_bf16_sums_key_gradients_over_blocks_in_fp32(monkeypatch):
    monkeypatch.setattr(module, "CPU_SCORES", 1)
    q, k, v = (x.astype(jnp.bfloat16) for x in data(length=1024, kv_length=8, heads=2, kv_heads=1))
    grad = jit(jax.grad(lambda v: attention(q, k, v, causal=False).astype(jnp.float32).sum()))
    want = jax.grad(lambda v: plain(*(x.astype(jnp.float32) for x in (q, k, v))).sum())(v)
    np.testing.assert_allclose(grad(v), want.astype(jnp.float32), rtol=0.01)
    assert attention(q, k, v, causal=False).dtype == jnp.bfloat16


def test_memory_grows_with_the_block_and_not_with_all_scores():
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in data(1, 8192, 4, 4, 16)]
    step = jax.jit(jax.grad(lambda *a: attention(*a, causal=True).sum(), argnums=(0, 1, 2)))
    scores = 4 * 4 * 8192 * 8192
    assert step.lower(*args).compile().memory_analysis().temp_size_in_bytes < scores / 8


def test_meshes_keep_the_batch_and_the_heads_apart(capfd):
    args, mesh = data(batch=4), make_mesh(2, 2, 2)
    step = jit(jax.grad(lambda *a: (attention(*a, causal=True) ** 2).sum(), argnums=(0, 1, 2)))
    want = step(*args)
    with jax.set_mesh(mesh):
        compiled = step.lower(*jax.device_put(args, batch_sharding(mesh))).compile()
        got = compiled(*jax.device_put(args, batch_sharding(mesh)))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
    assert not [x for x in ("all-gather(", "all-to-all(") if x in compiled.as_text()]
    assert "Involuntary" not in capfd.readouterr().err


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"causal": False, "window": 3}, "window needs causal=True"),
        ({"causal": True, "kv_segments": jnp.ones((2, 37))}, "kv_segments needs q_segments"),
    ],
)
def test_contradictions_raise(more, text):
    with pytest.raises(ValueError, match=text):
        attention(*data(), **more)
