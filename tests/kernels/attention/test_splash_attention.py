"""jax's attention for TPUs, interpreted on a CPU, against the formula."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.sharding import batch_sharding, make_mesh
from jaxft.kernels.attention.attention import reference
from jaxft.kernels.attention.splash_attention import splash_attention

LENGTH, PADDED = 150, 256
SINKS = jnp.array([0.5, -1.0, 3.0, 0.0])
SEGMENTS = jnp.array([[1] * 40 + [2] * 100 + [0] * 10, [1] * 150])  # [2, 150]


def data(length=LENGTH, keys=LENGTH, heads=4, kv_heads=2, dim=64):
    draws = jax.random.split(jax.random.key(0), 3)
    shapes = (2, length, heads, dim), (2, keys, kv_heads, dim), (2, keys, kv_heads, dim)
    return [jax.random.normal(key, shape) for key, shape in zip(draws, shapes, strict=True)]


def both(fn, args, sinks=None):
    def loss(args, sinks):
        out = fn(*args, sinks=sinks)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(args, sinks)


@pytest.mark.parametrize(
    ("causal", "window", "segments", "keys", "dim", "soft_cap", "sinks"),
    [
        (True, None, None, LENGTH, 64, None, None),
        (True, None, SEGMENTS, LENGTH, 64, None, None),
        (True, 7, SEGMENTS, LENGTH, 128, None, None),
        (False, None, None, 77, 40, None, None),
        (True, 7, SEGMENTS, LENGTH, 64, 0.7, None),
        (True, 7, SEGMENTS, LENGTH, 64, None, SINKS),
    ],
)
def test_every_mask_gives_the_formula_with_its_gradients(
    causal, window, segments, keys, dim, soft_cap, sinks
):
    args, scale = data(keys=keys, dim=dim), dim**-0.5
    mask = None
    if causal:
        before = jnp.arange(LENGTH)[:, None] - jnp.arange(LENGTH)
        mask = (before >= 0)[None] if window is None else ((before >= 0) & (before < window))[None]
    if segments is not None:
        mask = mask & (segments[:, :, None] == segments[:, None])
    ours = partial(
        splash_attention, segments=segments, causal=causal, window=window, scale=scale,
        soft_cap=soft_cap, interpret=True,
    )  # fmt: skip
    want = both(partial(reference, mask=mask, soft_cap=soft_cap), args, sinks)
    for a, b in zip(jax.tree.leaves(both(ours, args, sinks)), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, atol=3e-5)


def test_a_mesh_computes_its_rows_and_heads_alone():
    args, mesh = data(), make_mesh(2, 1, 2, jax.devices()[:4])
    ours = partial(
        splash_attention, segments=SEGMENTS, causal=True, window=None, scale=0.125, interpret=True
    )
    want, slopes = jax.jit(ours)(*args), both(ours, args, SINKS)
    with jax.set_mesh(mesh):
        placed = jax.device_put(args, batch_sharding(mesh))
        compiled = jax.jit(ours).lower(*placed).compile()
        np.testing.assert_allclose(compiled(*placed), want, atol=1e-6)
        for a, b in zip(
            jax.tree.leaves(both(ours, placed, SINKS)), jax.tree.leaves(slopes), strict=True
        ):
            np.testing.assert_allclose(a, b, atol=1e-5)
    assert "all-gather" not in compiled.as_text()
