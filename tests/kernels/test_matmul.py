"""The product with a kernel: the reference's values and gradients, and the CPU's barriers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.matmul import matmul, reference
from tests.devices import traced_for

SHAPES = [
    ((5,), (6,), (4,)),
    ((2, 3), (6,), (2, 4)),
    ((2, 3), (2, 4), (6,)),
    ((3,), (2, 4), (2, 3)),
]


def data(rows, ins, outs, dtype=np.float32):
    rng = np.random.default_rng(0)
    shapes = ((*rows, *ins), (*ins, *outs), (*rows, *outs))
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize(("rows", "ins", "outs"), SHAPES)
def test_values_and_gradients_are_the_references(rows, ins, outs):
    x, kernel, dy = data(rows, ins, outs)
    ours, ours_back = jax.vjp(lambda x, k: matmul(x, k, len(ins)), x, kernel)
    theirs, theirs_back = jax.vjp(lambda x, k: reference(x, k, len(ins)), x, kernel)
    np.testing.assert_array_equal(ours, theirs)
    for a, b in zip(ours_back(dy), theirs_back(dy), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_half_precision_stays_what_it_is():
    x, kernel, dy = data((2, 3), (6,), (4,), jnp.bfloat16)
    out, back = jax.vjp(matmul, x, kernel)
    assert {a.dtype for a in (out, *back(dy)[:2])} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize(("platform", "barriers"), [("cpu", 2), ("gpu", 0), ("tpu", 0)])
def test_only_a_cpus_gradient_has_barriers(platform, barriers):
    x, kernel, _ = data((2, 3), (6,), (4,))
    with traced_for(platform):
        traced = jax.make_jaxpr(jax.grad(lambda *a: matmul(*a).sum(), (0, 1)))(x, kernel)
    assert str(traced).count("optimization_barrier") == barriers
