"""The attention function against its formula: masks, positions, meshes, the choice of a form."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.core.sharding import batch_sharding, make_mesh
from jaxft.kernels.attention import blockwise_attention as module
from jaxft.kernels.attention.attention import (
    OVERRIDE,
    attention,
    choose,
    reference,
    saves_attention,
    used,
)
from jaxft.kernels.attention.blockwise_attention import block_size, cut_spans
from tests.devices import traced_for

# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = partial(jax.jit, compiler_options=QUICK)


def data(batch=2, length=37, heads=4, kv_heads=2, dim=8, kv_length=None):
    keys = jax.random.split(jax.random.key(0), 3)
    kv = (batch, kv_length or length, kv_heads, dim)
    shapes = ((batch, length, heads, dim), kv, kv)
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True)]


def same(args, ours, mask, scale=None, length=None, soft_cap=None):
    """Outputs and gradients agree, over the first `length` queries."""

    def both(fn):
        def loss(*args):
            out = fn(*args)[:, :length]
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

        return jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(*args)

    got, want = both(ours), both(partial(reference, mask=mask, scale=scale, soft_cap=soft_cap))
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
    cut = cut_spans((2, 37, 4, 8), 37, True)
    assert any(one.block < one.stop - one.start for one in cut) == (count == "many")
    assert [one.stop for one in cut] == ([16, 32, 37] if spans else [37])


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


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("scale", [None, 3.0])
def test_a_soft_cap_of_scores_with_its_gradients(blocks, window, scale):
    """The second scale takes scores far beyond the cap."""
    segments = jnp.repeat(jnp.array([[1, 2], [3, 3]]), jnp.array([9, 28]), axis=1)
    before = jnp.arange(37)[:, None] - jnp.arange(37)
    mask = (segments[:, :, None] == segments[:, None]) & (before >= 0) & (before < (window or 99))
    ours = partial(attention, causal=True, window=window, scale=scale, soft_cap=2.0)
    same(data(), partial(ours, q_segments=segments), mask, scale, soft_cap=2.0)
    plain = attention(*data(), causal=True, window=window, scale=scale, q_segments=segments)
    assert np.abs(ours(*data(), q_segments=segments) - plain).max() > 1e-2


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("size", [1.0, 40.0])
def test_s1_sinks_are_one_more_column_of_the_softmax(blocks, window, size):
    """With their gradients. Large ones are above all scores of some rows, or far below."""
    args, sinks = data(), size * jnp.array([0.5, -1.0, 1.0, 0.1])
    segments = jnp.repeat(jnp.array([[1, 2], [3, 3]]), jnp.array([9, 28]), axis=1)
    before = jnp.arange(37)[:, None] - jnp.arange(37)
    mask = (segments[:, :, None] == segments[:, None]) & (before >= 0) & (before < (window or 99))

    def plain(q, k, v, sinks):
        k, v = (jnp.repeat(x, 2, axis=2) for x in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 8**0.5
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        column = jnp.broadcast_to(sinks[:, None, None], (2, 4, 37, 1))
        weights = jax.nn.softmax(jnp.concatenate([scores, column], -1), -1)[..., :-1]
        return jnp.einsum("bnts,bsnh->btnh", weights, v)

    def both(fn):
        def loss(*args):
            out = fn(*args)
            return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

        return jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(*args, sinks)

    ours = partial(attention, causal=True, window=window, q_segments=segments)
    want = both(plain)
    for fn in (lambda *a: ours(*a[:3], sinks=a[3]), lambda *a: reference(*a[:3], mask, sinks=a[3])):
        for a, b in zip(jax.tree.leaves(both(fn)), jax.tree.leaves(want), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-5)
    assert np.abs(ours(*args) - want[1]).max() > 0.1
    assert np.abs(want[0][3]).max() > (0.1 if size == 1 else 0)


def test_t8_a_query_without_keys_is_finite_with_finite_gradients(blocks):
    empty, full = jnp.zeros((2, 37), jnp.int32), jnp.ones((2, 37), jnp.int32)
    fn = partial(attention, causal=True, q_segments=full, kv_segments=empty)
    for sinks in (None, jnp.zeros(4)):
        one = partial(fn, sinks=sinks)
        out, grads = jax.value_and_grad(lambda *a, one=one: one(*a).sum(), argnums=(0, 1, 2))(
            *data()
        )
        assert all(np.isfinite(x).all() for x in (out, *grads))


@pytest.mark.parametrize("soft_cap", [None, 2.0])
@pytest.mark.parametrize("sinks", [None, jnp.arange(4.0)])
def test_one_query_against_a_cache_equals_the_last_row(soft_cap, sinks):
    q, k, v = data()
    first = q[:, :20], k[:, :20], v[:, :20]
    want = attention(*first, causal=True, window=7, soft_cap=soft_cap, sinks=sinks)[:, -1:]
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
        soft_cap=soft_cap,
        sinks=sinks,
    )
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_positions_not_indices_decide_when_given():
    length = module.CAUSAL_SPANS * module.SMALLEST_SPAN + 2  # rows in order would be cut into spans
    q, k, v = data(length=length)
    order = jax.random.permutation(jax.random.key(1), length)
    want = attention(q, k, v, causal=True)[:, order]
    positions = jnp.broadcast_to(order, (2, length))
    got = attention(q[:, order], k[:, order], v[:, order], causal=True, q_positions=positions)
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_meshes_keep_the_batch_and_the_heads_apart(capfd):
    args, mesh, sinks = data(batch=4), make_mesh(2, 2, 2), jnp.arange(4.0)

    def loss(sinks, *args):
        return (attention(*args, causal=True, sinks=sinks) ** 2).sum()

    step = jit(jax.grad(loss, argnums=(0, 1, 2, 3)))
    want = step(sinks, *args)
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, batch_sharding(mesh))
        compiled = step.lower(sinks, *placed).compile()
        got = compiled(sinks, *placed)
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


def test_the_reference_is_jaxs_own_attention():
    q, k, v = data(kv_length=11, kv_heads=4)
    mask = jnp.arange(37)[None, :, None] % 11 >= jnp.arange(11)
    want = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=0.3)
    np.testing.assert_allclose(reference(q, k, v, mask, 0.3), want, atol=1e-6)


@pytest.mark.parametrize(
    ("more", "flash"),
    [
        ({}, True),
        ({"window": 5}, True),
        ({"window": jnp.int32(5)}, False),
        ({"q_segments": jnp.ones((2, 37), jnp.int32)}, False),
        ({"q_positions": jnp.arange(37)[None]}, False),
        ({"causal": False}, True),
        ({"soft_cap": 50.0}, False),
        ({"sinks": jnp.zeros(4)}, False),
        (
            {"soft_cap": 50.0, "q_segments": jnp.ones((2, 37), jnp.int32), "segments_in_row": 2},
            False,
        ),
    ],
)
def test_on_a_gpu_the_mask_decides_between_cudnn_and_blocks(more, flash, monkeypatch):
    """jax asks the card for its cuDNN while it traces, so the call is recorded here."""
    calls = []

    def record(q, k, v, **how):
        calls.append(how)
        return q

    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    args = [x.astype(jnp.bfloat16) for x in data()]
    with traced_for("gpu"):
        jax.eval_shape(lambda *a: attention(*a, **{"causal": True, **more}), *args)
    assert len(calls) == flash
    if flash:
        lengths = calls[0].pop("key_value_seq_lengths")
        assert (lengths is None) == more.get("causal", True), "37 keys are padded to 40"
        assert calls[0] == {
            "scale": 8**-0.5,
            "is_causal": more.get("causal", True),
            "local_window_size": (4, 0) if "window" in more else None,
            "implementation": "cudnn",
        }


@pytest.mark.parametrize(
    ("platform", "kernel"), [("cpu", "blockwise"), ("gpu", "cudnn"), ("tpu", "splash")]
)
def test_each_device_has_its_kernel_and_an_override(platform, kernel, monkeypatch):
    q = jax.ShapeDtypeStruct((2, 8, 2, 64), jnp.bfloat16)
    with traced_for(platform):
        assert choose(q) == kernel
        monkeypatch.setenv(OVERRIDE, "blockwise")
        assert choose(q) == "blockwise"
        monkeypatch.setenv(OVERRIDE, "splash" if platform == "gpu" else "cudnn")
        with pytest.raises(UserError, match=r"JAXFT_ATTENTION=\w+ cannot run: it runs on [GT]PUs"):
            choose(q)
        monkeypatch.setenv(OVERRIDE, "flash3")
        with pytest.raises(UserError, match="is not one of auto, cudnn, splash, blockwise"):
            choose(q)


def test_cudnn_is_refused_for_soft_caps_and_sinks_and_splash_has_them(monkeypatch):
    q = jax.ShapeDtypeStruct((2, 8, 2, 64), jnp.bfloat16)
    with traced_for("gpu"):
        assert (choose(q), choose(q, 50.0)) == ("cudnn", "blockwise")
        monkeypatch.setenv(OVERRIDE, "cudnn")
        with pytest.raises(UserError, match=r"cannot run: it has no soft-cap of scores.*one of 50"):
            choose(q, 50.0)
        with pytest.raises(UserError, match=r"cannot run: it has no sinks.*one for each head"):
            choose(q, sinks=True)
    monkeypatch.delenv(OVERRIDE)
    with traced_for("gpu"):
        assert choose(q, sinks=True) == "blockwise"
    with traced_for("tpu"):
        assert choose(q, 50.0, sinks=True) == "splash"


def test_a_mesh_that_does_not_divide_the_rows_has_no_splash():
    q = jax.ShapeDtypeStruct((2, 8, 2, 64), jnp.bfloat16)
    with traced_for("tpu", (2, 2, 1)):
        assert choose(q) == "blockwise"


def test_the_policy_saves_what_the_backward_pass_would_compute_again():
    """Under remat a forward kernel would run twice, once more in the backward pass."""

    def count(policy):
        def loss(*args):
            return jax.checkpoint(partial(attention, causal=True), policy=policy)(*args).sum()

        return str(jax.make_jaxpr(jax.grad(loss))(*data())).count("reduce_max")

    nothing = jax.checkpoint_policies.nothing_saveable
    assert count(saves_attention) < count(nothing)


def test_the_kernel_of_a_compiled_program():
    assert used('custom_call_target="__cudnn$fmhaSoftmax"') == "cudnn"
    assert used('custom_call_target="tpu_custom_call"') == "splash"
    assert used("dot(") == "blockwise"
