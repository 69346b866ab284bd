"""One decoder for every layout, and products of grouped rows with quantised kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.kernels import grouped_matmul as grouped
from jaxft.kernels.quantised import int8, nf4
from jaxft.kernels.quantised.layouts import decode

LAYOUTS = {"nf4": nf4, "int8": int8}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_kernel_is_decoded_by_its_layout(name):
    kernel = jax.random.normal(jax.random.key(0), (64, 2, 8))
    held = LAYOUTS[name].encode(kernel, 1)
    made = decode(held, (64,), jnp.float32)  # [2, 8, 64]
    np.testing.assert_array_equal(made, LAYOUTS[name].decode(held, (64,), jnp.float32))
    rough = np.abs(np.moveaxis(made, -1, 0) - kernel).max()
    assert rough < {"nf4": 0.6, "int8": 0.02}[name]


@pytest.mark.parametrize("name", LAYOUTS)
def test_grouped_products_and_gradients_are_those_of_the_decoded_kernels(name):
    keys = jax.random.split(jax.random.key(1), 3)
    kernels, rows = jax.random.normal(keys[0], (5, 64, 2, 8)), jax.random.normal(keys[1], (40, 64))
    groups = jax.random.randint(keys[2], (40,), 0, 5)
    held = jax.vmap(lambda one: LAYOUTS[name].encode(one, 1))(kernels)
    made = jax.vmap(lambda one: decode(one, (64,), jnp.float32))(held)  # [5, 2, 8, 64]
    plain = made.reshape(5, 16, 64).mT  # [5, 64, 16]

    def ours(x):
        found = grouped.group_rows(groups, 5)
        wide = jnp.take(x, found.rows, axis=0, mode="fill", fill_value=0)
        return grouped.grouped_matmul(wide, held, found)[found.places]

    np.testing.assert_allclose(ours(rows), grouped.reference(rows, plain, groups), atol=1e-4)
    got, want = (
        jax.grad(lambda x, f=f: jnp.sin(f(x)).sum())(rows)
        for f in (ours, lambda x: grouped.reference(x, plain, groups))
    )
    np.testing.assert_allclose(got, want, atol=1e-4)
