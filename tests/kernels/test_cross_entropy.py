"""The chunked loss head against the dense fp32 formula, on one device and on meshes."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxft.core.configs.schema import Lora
from jaxft.core.params import bind, describe, flatten
from jaxft.core.sharding import batch_sharding, make_mesh, shardings, spec
from jaxft.kernels.cross_entropy import linear_cross_entropy
from jaxft.nn import lora
from jaxft.nn.linear import Linear
from tests.devices import traced_for

B, T, D, V = 8, 13, 16, 24
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = partial(jax.jit, compiler_options=QUICK)


def dense(hidden, head, targets, weights, *, vocab_first, z_loss=0.0, soft_cap=None):
    logits = hidden @ (head.T if vocab_first else head)
    logits = soft_cap * jnp.tanh(logits / soft_cap) if soft_cap else logits
    lse = jax.nn.logsumexp(logits, -1)
    picked = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    hits = (weights * (logits.argmax(-1) == targets)).sum()
    return (weights * (lse - picked + z_loss * lse**2)).sum(), hits


def data(vocab_first, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(B, T, D)).astype(dtype)
    head = rng.normal(size=(V, D) if vocab_first else (D, V)).astype(np.float32)
    logits = hidden.astype(np.float32) @ (head.T if vocab_first else head)
    guess, other = logits.argmax(-1), rng.integers(0, V, (B, T))
    targets = np.where(rng.random((B, T)) < 0.3, guess, other).astype(np.int32)
    weights = (rng.random((B, T)) * (rng.random((B, T)) < 0.7)).astype(np.float32)
    return hidden, head, targets, weights


def relative(got, want):
    return float(np.abs(np.asarray(got) - want).max() / np.abs(want).max())


@pytest.mark.parametrize("soft_cap", [None, 3.0])
@pytest.mark.parametrize(("chunk", "z_loss"), [(None, 0.0), (1, 1e-2), (5, 0.0), (13, 1e-2)])
@pytest.mark.parametrize("vocab_first", [True, False])
def test_t12_equals_the_dense_formula(vocab_first, z_loss, chunk, soft_cap):
    hidden, head, targets, weights = data(vocab_first)
    how = {"vocab_first": vocab_first, "z_loss": z_loss, "soft_cap": soft_cap}
    ours = partial(linear_cross_entropy, chunk=chunk, **how)
    theirs = partial(dense, **how)
    grad = partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    (total, metrics), grads = jit(grad(ours))(hidden, head, targets, weights)
    (want, hits), wanted = jit(grad(theirs))(hidden, head, targets, weights)
    assert abs(total / want - 1) < 1e-6
    assert metrics["correct"] == pytest.approx(float(hits), rel=1e-6) and hits > 0
    assert metrics["weight"] == pytest.approx(float(weights.sum()), rel=1e-6)
    assert max(map(relative, grads, wanted)) < 1e-5
    logits = hidden @ (head.T if vocab_first else head)
    lse = jax.nn.logsumexp(soft_cap * np.tanh(logits / soft_cap) if soft_cap else logits, -1)
    if z_loss:
        assert metrics["z"] == pytest.approx(float((z_loss * weights * lse**2).sum()), rel=1e-5)


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 1, 8)])
@pytest.mark.parametrize(("vocab_first", "soft_cap"), [(True, None), (False, None), (True, 3.0)])
def test_t9_meshes_agree_with_one_device(vocab_first, soft_cap, shape):
    arrays = data(vocab_first)
    how = {"vocab_first": vocab_first, "soft_cap": soft_cap}
    loss = partial(linear_cross_entropy, chunk=4, z_loss=1e-2, **how)
    grad = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (want, wanted_metrics), wanted = grad(*arrays)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        head = NamedSharding(mesh, spec(("vocab", "embed") if vocab_first else ("embed", "vocab")))
        rows = batch_sharding(mesh)
        placed = jax.device_put(arrays, (rows, head, rows, rows))
        (total, metrics), grads = grad(*placed)
    assert abs(total / want - 1) < 1e-6
    assert all(metrics[k] == pytest.approx(float(v), rel=1e-6) for k, v in wanted_metrics.items())
    assert max(map(relative, grads, wanted)) < 1e-5
    assert grads[1].sharding.is_equivalent_to(head, 2)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2)])
def test_a_bias_joins_the_logits_and_gets_its_gradient(shape):
    hidden, head, targets, weights = data(False)
    bias = np.random.default_rng(3).normal(size=V).astype(np.float32)

    def ours(hidden, head, bias):
        loss = partial(linear_cross_entropy, vocab_first=False, chunk=4, z_loss=1e-2, bias=bias)
        total, metrics = loss(hidden, head, targets, weights)
        return total, metrics["correct"]

    def theirs(hidden, head, bias):
        wide = jnp.concatenate([hidden, np.ones((B, T, 1), np.float32)], -1)
        whole = jnp.concatenate([head, bias[None]])
        return dense(wide, whole, targets, weights, vocab_first=False, z_loss=1e-2)

    (want, hits), wanted = jit(jax.value_and_grad(theirs, (1, 2), has_aux=True))(hidden, head, bias)
    with jax.set_mesh(make_mesh(*shape)):
        grad = jit(jax.value_and_grad(ours, (1, 2), has_aux=True))
        (total, correct), grads = grad(hidden, head, bias)
    assert abs(total / want - 1) < 1e-6
    assert correct == pytest.approx(float(hits), rel=1e-6) and hits > 0
    assert max(map(relative, grads, wanted)) < 1e-5


@pytest.mark.parametrize("shape", [(8, 1, 1), (1, 1, 8)])
def test_of_equal_logits_the_first_is_the_answer(shape):
    """As argmax has it: rows of a table made alike, and a head of zeros, say no more than that."""
    hidden, head, _, weights = data(True)
    # Whole numbers: their sums are exact in any order, so that equal rows have equal logits.
    hidden, head = np.round(4 * hidden), np.round(4 * head)
    head[5::7] = head[2]
    for table in (head, np.zeros_like(head)):
        best = (hidden @ table.T).argmax(-1)
        for targets in (best, np.full_like(best, 2), np.full_like(best, 12)):
            targets = targets.astype(np.int32)
            with jax.set_mesh(make_mesh(*shape)):
                loss = jit(partial(linear_cross_entropy, vocab_first=True))
                _, metrics = loss(hidden, table, targets, weights)
            hits = (weights * (best == targets)).sum()
            assert metrics["correct"] == pytest.approx(float(hits), rel=1e-6)


def test_rows_that_do_not_divide_over_the_mesh_are_padded():
    hidden, head, targets, weights = (
        x[:3] if x.ndim != 2 or len(x) == B else x for x in data(True)
    )
    loss = partial(linear_cross_entropy, vocab_first=True)
    want, wanted = jit(jax.value_and_grad(lambda h: loss(h, head, targets, weights)[0]))(hidden)
    with jax.set_mesh(make_mesh(2, 2, 2)):
        got, grads = jit(jax.value_and_grad(lambda h: loss(h, head, targets, weights)[0]))(hidden)
    assert abs(got / want - 1) < 1e-6
    assert relative(grads, wanted) < 1e-5


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_an_adapters_rank_need_not_divide_over_the_mesh(shape):
    hidden, head, targets, weights = data(False)
    linear = Linear((D,), (V,), ("embed", "vocab"), key=jax.random.key(0))
    lora.add(linear, Lora(rank=3, alpha=3.0, targets=""), jax.random.key(1))
    params = flatten(linear) | {"kernel": jnp.asarray(head), "lora_b": jnp.asarray(head[:3])}

    def ours(params, hidden):
        model = bind(linear, params)
        made = model.wide_input(hidden), model.wide_kernel()
        return linear_cross_entropy(*made, targets, weights, vocab_first=False, chunk=4)[0]

    def theirs(params, hidden):
        whole = params["kernel"] + params["lora_a"] @ params["lora_b"]
        return dense(hidden, whole, targets, weights, vocab_first=False)[0]

    want, (wanted, wanted_dx) = jit(jax.value_and_grad(theirs, (0, 1)))(params, hidden)
    mesh = make_mesh(*shape)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(describe(linear), mesh))
        got, (grads, dx) = jit(jax.value_and_grad(ours, (0, 1)))(placed, hidden)
    assert abs(got / want - 1) < 1e-6
    assert relative(dx, wanted_dx) < 1e-5
    assert max(relative(grads[path], wanted[path]) for path in wanted) < 1e-5


def test_one_gather_and_one_reduction_of_the_head():
    """No collective of the head's shape sits in the loop over chunks."""
    mesh = make_mesh(1, 4, 2)
    loss = partial(linear_cross_entropy, vocab_first=False, chunk=2)
    with jax.set_mesh(mesh):
        rows, head = batch_sharding(mesh), NamedSharding(mesh, spec(("embed", "vocab")))
        placed = jax.device_put(data(False), (rows, head, rows, rows))
        step = jit(jax.grad(lambda h, w, *a: loss(h, w, *a)[0], argnums=(0, 1)))
        text = step.lower(*placed).compile().as_text()
    whole = rf"f32\[{D},{V // 2}\]"
    assert len(re.findall(rf"= {whole}\S* all-gather\(", text)) == 1
    reductions = re.findall(r"= f32\[(\d+),(\d+)\]\S* (all-reduce|reduce-scatter)\(", text)
    assert len([r for r in reductions if int(r[0]) * int(r[1]) * 8 >= D * V // 2]) == 1, reductions
    assert f"f32[{B},{T},{V}]" not in text


def test_all_weights_zero_is_zero_and_finite():
    hidden, head, targets, weights = data(True)
    loss = partial(linear_cross_entropy, vocab_first=True, z_loss=0.1)
    grad = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, metrics), grads = grad(hidden, head, targets, 0 * weights)
    assert total == metrics["weight"] == metrics["correct"] == 0
    assert all(np.all(np.asarray(g) == 0) for g in grads)


def test_a_tie_is_won_by_the_first_id_as_in_argmax():
    hidden, weights = jnp.zeros((1, 2, D)), jnp.ones((1, 2))
    loss = partial(linear_cross_entropy, vocab_first=True)
    with jax.set_mesh(make_mesh(1, 1, 8)):
        _, metrics = jit(loss)(hidden, jnp.ones((V, D)), jnp.array([[0, V - 1]]), weights)
    assert metrics["correct"] == 1


def test_a_frozen_head_gets_no_gradient_work_and_evaluation_none_at_all():
    hidden, head, targets, weights = data(True)

    def products(fn, *args):
        return str(jax.make_jaxpr(fn)(*args)).count("dot_general")

    def loss(hidden, head):
        return linear_cross_entropy(hidden, head, targets, weights, vocab_first=True)[0]

    assert products(loss, hidden, head) == 1
    assert products(jax.grad(loss), hidden, head) == 2
    assert products(jax.grad(loss, argnums=(0, 1)), hidden, head) == 3


def test_bf16_activations_keep_an_fp32_loss_and_fp32_head_gradients():
    hidden, head, targets, weights = data(True)
    low = jnp.asarray(hidden, jnp.bfloat16)
    loss = partial(linear_cross_entropy, vocab_first=True)
    grad = jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    (total, _), (dx, dw) = grad(low, head, targets, weights)
    rounded = np.asarray(jnp.asarray(head, jnp.bfloat16).astype(jnp.float32))
    want, _ = dense(low.astype(jnp.float32), rounded, targets, weights, vocab_first=True)
    assert abs(total / want - 1) < 1e-6
    assert (total.dtype, dx.dtype, dw.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("shape", [None, (1, 4, 2)])
def test_t12_fp32_logits_of_a_large_vocabulary_never_exist_whole(shape):
    rows, length, dim, vocab = 8, 4096, 8, 128 * 1024
    devices = 1 if shape is None else 8
    s = jax.ShapeDtypeStruct
    args = (
        s((rows, length, dim), jnp.float32),
        s((vocab, dim), jnp.float32),
        s((rows, length), jnp.int32),
        s((rows, length), jnp.float32),
    )
    loss = partial(linear_cross_entropy, vocab_first=True)
    step = jit(jax.grad(lambda h, w, *a: loss(h, w, *a)[0], argnums=(0, 1)))
    if shape is None:
        compiled = step.lower(*args).compile()
    else:
        with jax.set_mesh(make_mesh(*shape)):
            compiled = step.lower(*args).compile()
    logits = 4 * rows * length * vocab // devices
    assert compiled.memory_analysis().temp_size_in_bytes < logits / 8


@pytest.mark.parametrize(("length", "chunks"), [(1536, 2), (1100, 2), (4096, 4), (100, 1)])
def test_chunks_of_a_tpu_are_nearly_equal(length, chunks):
    """Chunks of 1,024 steps would compute logits of 2,048 for a row of 1,536."""
    x, targets, weights = jnp.ones((1, length, 8)), jnp.zeros((1, length), int), jnp.ones(length)

    def loss(x, head):
        return linear_cross_entropy(x, head, targets, weights[None], vocab_first=True)[0]

    with traced_for("tpu"):
        text = str(jax.make_jaxpr(loss)(x, jnp.ones((128256, 8))))
    steps = max(int(found) for found in re.findall(r"f32\[1,(\d+),128256\]", text))
    assert length <= steps * chunks < length + 8 * chunks
