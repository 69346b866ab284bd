"""Fingerprints of arrays, equal on every mesh, and the search for numbers that are not finite."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

_BITS = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}


class Print(NamedTuple):
    """The fingerprint of one array, with its shape and dtype."""

    number: int
    shape: tuple[int, ...]
    dtype: str


def fingerprints(tree: Any) -> dict[str, Print]:
    """Return the fingerprint of every array of a tree, by its path.

    Of two arrays that differ in one element, the fingerprints differ. It detects faults of a disk
    or a memory, and is no protection against an attacker.
    """
    arrays = named_leaves(tree)
    # On several devices one array after the other: sums over virtual CPU devices wait for each
    # other for ever if more programs are under way than the host has threads.
    alone = all(len(leaf.devices()) == 1 for leaf in arrays.values())
    parts = [arrays] if alone else [{name: leaf} for name, leaf in arrays.items()]
    return {
        name: Print(int(number), arrays[name].shape, str(arrays[name].dtype))
        for part in parts
        for name, number in _numbers(part, alone).items()
    }


def named_leaves(tree: Any) -> dict[str, Any]:
    """Return the arrays of a tree by dotted path, or their shapes."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


@partial(jax.jit, static_argnames="alone")
def _numbers(arrays: dict[str, jax.Array], alone: bool) -> dict[str, jax.Array]:
    return {name: _fingerprint(x, _group(x.shape) if alone else 1) for name, x in arrays.items()}


@partial(jax.jit, static_argnames="group")  # traced once for all arrays of a shape
def _fingerprint(x: jax.Array, group: int) -> jax.Array:
    """Return the sum of the elements' bits times odd factors modulo 2^32.

    A sum of integers does not depend on its order, so neither does it on the mesh. The factor is a
    product of one odd number for each axis, so that exchanged elements are noticed too. group: the
    rows that are added first.
    """
    if x.dtype == jnp.bool_:
        bits = x.astype(jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, _BITS[x.dtype.itemsize]).astype(jnp.uint32)
    # The barrier keeps XLA from computing the factors again for each row.
    factors = [jax.lax.optimization_barrier(_factors(size, i)) for i, size in enumerate(x.shape)]
    if group > 1:
        *outer, rows, columns = x.shape
        bits = (bits * factors[-2][:, None]).reshape(*outer, rows // group, group, columns)
        bits = bits.sum(axis=-2, dtype=jnp.uint32)
        factors[-2] = jnp.ones(rows // group, jnp.uint32)
    for factor in reversed(factors):
        bits = jnp.dot(bits, factor)
    return bits


def _group(shape: tuple[int, ...]) -> int:
    """Return how many rows of an array that no mesh divides to add first.

    XLA on a CPU adds up to 16 rows as vectors, and a longer axis number by number: 5 times slower.
    """
    return next(n for n in range(16, 0, -1) if shape[-2] % n == 0) if len(shape) > 1 else 1


def _factors(size: int, axis: int) -> jax.Array:
    """Return an odd number for each place on an axis, by the mixing steps of MurmurHash3."""
    place = jnp.arange(1, size + 1, dtype=jnp.uint32) + jnp.uint32(axis << 16)
    mixed = place * jnp.uint32(0xCC9E2D51)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x85EBCA6B)
    return (mixed ^ (mixed >> 13)) | jnp.uint32(1)


def not_finite(tree: Any) -> list[str]:
    """Return the paths of the arrays of a tree that hold NaN or infinite numbers, sorted."""
    return [
        name
        for name, leaf in sorted(named_leaves(tree).items())
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not is_finite(leaf)
    ]


@jax.jit
def is_finite(x: jax.Array) -> jax.Array:
    """Return True, as a scalar on the devices, if no number is NaN or infinite."""
    # By rows first: XLA on a CPU reduces a whole array in one thread.
    return jnp.isfinite(x).all(axis=-1 if x.ndim else None).all()
