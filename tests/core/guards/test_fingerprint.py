"""Fingerprints: one value on every mesh and in every order of sums, another for any changed bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxft.core import sharding
from jaxft.core.guards.fingerprint import fingerprints, not_finite

DTYPES = ("float32", "bfloat16", "float16", "int32", "uint8", "int8", "bool")
SHAPES = ((), (1,), (40,), (8, 24), (2, 8, 24), (3, 3, 8, 16))


def array(dtype, shape, seed=0):
    rng = np.random.default_rng(seed)
    return np.asarray(rng.normal(size=shape) * 40).astype(jnp.dtype(dtype))


def number(x):
    (found,) = fingerprints({"x": jnp.asarray(x)}).values()
    return found.number


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_sum_of_bits_times_odd_factors_on_any_mesh(dtype, shape):
    x = array(dtype, shape)
    bits = x.astype(np.uint32) if dtype == "bool" else x.view(f"u{x.dtype.itemsize}")
    total = bits.astype(object)
    for axis in reversed(range(x.ndim)):
        place = np.arange(1, shape[axis] + 1, dtype=np.uint32) + np.uint32(axis << 16)
        mixed = place * np.uint32(0xCC9E2D51)
        mixed = (mixed ^ (mixed >> 15)) * np.uint32(0x85EBCA6B)
        total = total @ ((mixed ^ (mixed >> 13)) | 1).astype(object)
    whole = fingerprints({"x": jnp.asarray(x)})["x"]
    assert whole == (int(total) % 2**32, shape, dtype)
    for sizes in ((8, 1, 1), (1, 4, 2), (2, 2, 2)):
        mesh = sharding.make_mesh(*sizes)
        if len(shape) < 2:
            continue
        spec = P(*(None,) * (len(shape) - 2), "fsdp", "tensor")
        placed = jax.device_put(x, NamedSharding(mesh, spec))
        assert fingerprints({"x": placed})["x"] == whole


@pytest.mark.parametrize("dtype", DTYPES)
def test_s5_any_flipped_bit_changes_it(dtype):
    x, rng = array(dtype, (4, 6)), np.random.default_rng(1)
    before = number(x)
    for _ in range(60):
        flipped = x.copy()
        raw = flipped.reshape(-1).view(np.uint8)
        bit = 0 if dtype == "bool" else rng.integers(8)
        raw[rng.integers(raw.size)] ^= 1 << bit
        assert number(flipped) != before


def test_exchanged_rows_columns_and_elements_change_it():
    x = array("float32", (6, 5))
    others = [x[::-1], x[:, ::-1], x.T.reshape(6, 5), np.roll(x, 1), np.roll(x, 1, axis=0)]
    assert len({number(x), *map(number, others)}) == 6


def test_arrays_that_are_not_finite_are_named():
    good, bad = jnp.ones((4, 6)), jnp.ones((4, 6)).at[2, 3].set(jnp.nan)
    tree = {"a": good, "b": (bad, jnp.float32(jnp.inf)), "c": jnp.int32(3)}
    assert not_finite(tree) == ["b.0", "b.1"]
    assert list(fingerprints(tree)) == ["a", "b.0", "b.1", "c"]
    assert not_finite({"layers.one": good, "two": bad, "three": -bad}) == ["three", "two"]
    assert not_finite({}) == []
