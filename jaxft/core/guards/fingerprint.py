"""Fingerprints of arrays, equal on every mesh, and the search for numbers that are not finite."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Print(NamedTuple):
    """The fingerprint of one array, its shape and dtype, and True if all numbers are finite."""

    number: int
    shape: tuple[int, ...]
    dtype: str
    finite: bool


def fingerprints(tree: Any) -> dict[str, Print]:
    """Return the fingerprint of every array of a tree, by its path.

    Of two arrays that differ in one element, the fingerprints differ. It detects faults of a disk
    or a memory, and is no protection against an attacker.
    """
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator=".") for path, _ in leaves]
    found = jax.device_get([_fingerprint(leaf) for _, leaf in leaves])  # one transfer for all
    return {
        name: Print(int(number), tuple(leaf.shape), np.dtype(leaf.dtype).name, bool(finite))
        for name, (_, leaf), (number, finite) in zip(names, leaves, found, strict=True)
    }


@jax.jit
def _fingerprint(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return (the sum of the elements' bits times odd factors modulo 2^32, True if all are finite).

    A sum of integers does not depend on its order, so neither does it on the mesh. The factor is a
    product of one odd number for each axis, so that exchanged elements are noticed too.
    """
    floating = jnp.issubdtype(x.dtype, jnp.floating)
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    for axis in reversed(range(x.ndim)):
        # The barrier keeps XLA from computing the factors again for each row.
        bits = jnp.dot(bits, jax.lax.optimization_barrier(_factors(x.shape[axis], axis)))
    return bits, is_finite(x) if floating else jnp.bool_(True)


def _factors(size: int, axis: int) -> jax.Array:
    """Return an odd number for each place on an axis, by the mixing steps of MurmurHash3."""
    place = jnp.arange(1, size + 1, dtype=jnp.uint32) + jnp.uint32(axis << 16)
    mixed = place * jnp.uint32(0xCC9E2D51)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    return (mixed ^ (mixed >> 13)) | jnp.uint32(1)


def not_finite(params: Mapping[str, jax.Array]) -> list[str]:
    """Return the paths of the parameters that hold NaN or infinite numbers."""
    names = sorted(params)
    found = jax.device_get([is_finite(params[name]) for name in names])
    return [name for name, finite in zip(names, found, strict=True) if not finite]


@jax.jit
def is_finite(x: jax.Array) -> jax.Array:
    """Return True, as a scalar on the devices, if no number is NaN or infinite."""
    # By rows first: XLA on a CPU reduces a whole array in one thread.
    return jnp.isfinite(x).all(axis=-1 if x.ndim else None).all()
