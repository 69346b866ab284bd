"""Products by groups of rows against those of every row with every kernel."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import grouped_matmul as module
from jaxft.kernels.grouped_matmul import group_rows, grouped_matmul, reference
from tests.devices import traced_for

K, N = 12, 20
# Groups of M rows: even ones, one that has all rows, some without rows, fewer rows than groups.
CASES = {
    "even": np.arange(96) % 4,
    "one has all": np.full(50, 2),
    "three of five are empty": np.repeat([1, 3], [7, 30]),
    "two rows": np.array([4, 1]),
    "many rows": np.random.default_rng(0).integers(0, 3, 900),
}


def data(groups, count):
    rng = np.random.default_rng(1)
    x, dout = rng.normal(size=(len(groups), K)), rng.normal(size=(len(groups), N))
    kernels = rng.normal(size=(count, K, N))
    return *(jnp.asarray(one, jnp.float32) for one in (x, kernels, dout)), jnp.asarray(groups)


def placed(x, kernels, groups):
    """The product in the order of the rows."""
    made = group_rows(groups, len(kernels))
    rows = jnp.take(x, made.rows, axis=0, mode="fill", fill_value=0)
    return grouped_matmul(rows, kernels, made)[made.places]


@pytest.fixture(params=["blocks", "ragged"])
def form(request, monkeypatch):
    """Both forms. jax computes the TPU's instruction on a CPU, too."""
    if request.param == "ragged":
        tpu = module.device()._replace(platform="tpu")
        monkeypatch.setattr(module, "device", lambda: tpu)


@pytest.mark.parametrize("case", CASES)
def test_products_and_gradients(case, form):
    x, kernels, dout, groups = data(CASES[case], 5)

    def loss(function, x, kernels):
        made = function(x, kernels, groups)
        return (made * dout).sum(), made

    both = (jax.grad(partial(loss, one), (0, 1), has_aux=True) for one in (placed, reference))
    (got, out), (want, wanted) = (jax.jit(one)(x, kernels) for one in both)
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    for mine, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(mine, theirs, atol=2e-5 * np.abs(theirs).max())


@pytest.mark.parametrize("case", CASES)
def test_every_row_has_one_place_in_its_group(case, form):
    groups = CASES[case]
    made = jax.tree.map(np.asarray, group_rows(jnp.asarray(groups), 5))
    block = len(made.rows) // len(made.owners)
    assert sorted(made.places) == sorted(set(made.places))
    assert (made.rows[made.places] == np.arange(len(groups))).all()
    assert (made.rows == len(groups)).sum() == len(made.rows) - len(groups)
    assert (made.owners[made.places // block] == groups).all()
    assert made.sizes.sum() <= len(made.rows)


def test_bf16_sums_in_fp32():
    x, kernels, _, groups = data(CASES["many rows"], 3)
    low = placed(x.astype(jnp.bfloat16), kernels, groups)
    assert low.dtype == jnp.bfloat16
    rounded = (one.astype(jnp.bfloat16).astype(jnp.float32) for one in (x, kernels))
    np.testing.assert_allclose(low.astype(jnp.float32), reference(*rounded, groups), rtol=8e-3)


def test_the_form_for_a_cpu_computes_few_products_more_than_it_needs():
    """jax's own fallback computes count = 16 times as many, and copies the rows 16 times."""
    rows, count = 4096, 16
    groups = jax.eval_shape(partial(group_rows, count=count), jax.ShapeDtypeStruct((rows,), "int"))
    assert len(groups.rows) < 1.2 * rows
    x, kernels = jnp.zeros((len(groups.rows), 256)), jnp.zeros((count, 256, 256))
    shapes = jax.tree.map(lambda one: jnp.zeros(one.shape, jnp.int32), groups)
    made = jax.jit(grouped_matmul).lower(x, kernels, shapes).compile()
    assert made.memory_analysis().temp_size_in_bytes < 2 * x.nbytes


def test_a_gpu_reads_a_matrix_for_few_blocks():
    """Rows of Qwen3-30B-A3B: 128 a group. A CPU has blocks of 16, and copies a matrix 9 times."""
    groups = jnp.arange(2048 * 8) % 128
    with traced_for("gpu"):
        found = jax.eval_shape(partial(group_rows, count=128), groups)
    assert found.owners.shape == (128 + (2048 * 8 - 128) // 128,)
    found = jax.eval_shape(partial(group_rows, count=128), groups)
    assert found.owners.shape == (128 + (2048 * 8 - 128) // 16,)


def test_frozen_kernels_cost_no_second_loop():
    x, kernels, _, groups = data(CASES["even"], 5)
    made = group_rows(groups, 5)
    rows = jnp.take(x, made.rows, axis=0, mode="fill", fill_value=0)

    def loops(argnums):
        grad = jax.grad(lambda *a: grouped_matmul(*a, made).sum(), argnums)
        return jax.jit(grad).lower(rows, kernels).compile().as_text().count(" while(")

    assert loops(0) < loops((0, 1))
