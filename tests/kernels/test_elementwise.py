"""Elementwise chains: saved on a CPU, computed again on accelerators, with equal results."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels.elementwise import recomputed, soft_capped
from tests.devices import traced_for

X = jnp.linspace(-2, 2, 64, dtype=jnp.bfloat16)


def chain(x):
    return (jnp.sin(x.astype(jnp.float32)) ** 3).astype(x.dtype)


@pytest.mark.parametrize(("platform", "wide_saved"), [("cpu", 1), ("gpu", 0), ("tpu", 0)])
def test_accelerators_save_no_fp32_copies(platform, wide_saved):
    with traced_for(platform):
        saved = jax.eval_shape(lambda x: jax.vjp(recomputed(chain), x)[1], X)
    wide = [x for x in jax.tree.leaves(saved) if (x.dtype, x.shape) == (jnp.float32, X.shape)]
    assert bool(wide) == wide_saved


def test_the_gradient_is_the_same():
    def gradient(x):
        return jax.grad(lambda x: recomputed(chain)(x).astype(jnp.float32).sum())(x)

    want = gradient(X)
    with traced_for("gpu"):
        traced = jax.make_jaxpr(gradient)(X)
    got = jax.core.eval_jaxpr(traced.jaxpr, traced.consts, X)[0]
    np.testing.assert_array_equal(got, want)


def test_a_soft_cap_and_its_derivative():
    x = jnp.array([-1e4, -3.0, 0.0, 1e-3, 2.0, 1e4])
    capped, slope = soft_capped(x, 2.0)
    np.testing.assert_allclose(capped, 2 * np.tanh(np.asarray(x) / 2), rtol=1e-6)
    want = jax.vmap(jax.grad(lambda x: soft_capped(x, 2.0)[0]))(x)
    np.testing.assert_allclose(slope, want, atol=1e-7)
    assert soft_capped(x, None) == (x, None)
