"""Products of rows with a matrix for each group of rows: the experts of a mixture, none dropped.

A TPU has an instruction for it (`jax.lax.ragged_dot`). On a CPU jax computes that one with every
matrix on every row, and copies the rows for each group. On all devices but TPUs the rows of a group
are padded to whole blocks instead, and a loop over blocks multiplies each with its group's matrix.
For 8 to 64 groups this was 4 to 27 times as fast on a CPU. No GPU has measured either form.
Compiled for an H200, `ragged_dot` has a dense product for each group too.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.runtime import device
from jaxft.kernels.quantised.layouts import Quantised, decode

SMALLEST_BLOCK_ROWS, LARGEST_BLOCK_ROWS = 8, 256
# Blocks of a group with the mean number of rows. With more there is less padding, and each matrix
# is copied more often.
BLOCKS_ON_CPU, BLOCKS_ON_GPU = 8, 1


class GroupedRows(NamedTuple):
    """Rows in the order of their groups.

    rows: the row at each place, and the number of rows M where a place is padding. places: the
    place of each row. sizes: the places of each group. owners: the group of each block of places.
    """

    rows: Int[Array, " R"]
    places: Int[Array, " M"]
    sizes: Int[Array, " E"]
    owners: Int[Array, " blocks"]


def group_rows(groups: Int[Array, " M"], count: int) -> GroupedRows:
    """Return M rows in the order of their groups, 0 to count - 1. A group keeps its order."""
    total, block = len(groups), _block_rows(len(groups), count)
    # A group with rows has 1 block for its first row, and 1 for every `block` rows after it.
    most = min(count, total)
    blocks = most + (total - most) // block
    order = jnp.argsort(groups, stable=True)  # [M]
    own = groups[order]
    held = jnp.bincount(groups, length=count)  # [E]
    sizes = -(-held // block) * block
    ends = jnp.cumsum(sizes)
    rank = jnp.arange(total) - (jnp.cumsum(held) - held)[own]  # of a row in its group
    sorted_places = ((ends - sizes)[own] + rank).astype(jnp.int32)
    places = jnp.zeros(total, jnp.int32).at[order].set(sorted_places, unique_indices=True)
    rows = jnp.full(blocks * block, total, jnp.int32)
    rows = rows.at[places].set(jnp.arange(total, dtype=jnp.int32), unique_indices=True)
    owners = jnp.searchsorted(ends, jnp.arange(blocks) * block, side="right")
    return GroupedRows(rows, places, sizes, jnp.minimum(owners, count - 1))


def grouped_matmul(
    x: Float[Array, "R K"], kernels: Float[Array, "E K *N"] | Quantised, groups: GroupedRows
) -> Float[Array, "R N"]:
    """Return x times the kernel of each row's group, [R, N] in x's dtype, summed in fp32.

    x: the rows at the places of `groups`, 0 where a place is padding. Quantised kernels are stacked
    over groups, and frozen: they have no gradient.
    """
    if isinstance(kernels, Quantised):
        return _quantised(x, kernels, groups, x.shape[1:])
    kernels = kernels.reshape(*kernels.shape[:2], -1).astype(x.dtype)  # [E, K, N]
    if device().platform == "tpu":
        return _ragged(x, kernels, groups)
    return _by_blocks(x, kernels, groups.owners)


def reference(
    x: Float[Array, "M K"], kernels: Float[Array, "E K N"], groups: Int[Array, " M"]
) -> Float[Array, "M N"]:
    """Return the products of rows in any order, from those of every row with every kernel."""
    every = jnp.einsum("mk,ekn->men", x, kernels)  # [M, E, N]
    return jnp.take_along_axis(every, groups[:, None, None], axis=1)[:, 0]  # [M, N]


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _quantised(x: Array, kernels: Quantised, groups: GroupedRows, ins: tuple[int, ...]) -> Any:
    """Return the product with quantised kernels, which are decoded to x's dtype.

    The backward pass decodes them again. It thus keeps the codes alone, as `matmul` does.
    """
    return _frozen(x, _decoded(kernels, ins, x.dtype), groups, over=2)


def _quantised_forward(
    x: Array, kernels: Quantised, groups: GroupedRows, ins: tuple[int, ...]
) -> tuple[Any, Any]:
    return _quantised(x, kernels, groups, ins), (kernels, groups)


def _quantised_backward(
    ins: tuple[int, ...], saved: tuple[Quantised, GroupedRows], dy: Array
) -> tuple[Array, None, None]:
    kernels, groups = saved
    return _frozen(dy, _decoded(kernels, ins, dy.dtype), groups, over=1), None, None


_quantised.defvjp(_quantised_forward, _quantised_backward)


def _decoded(kernels: Quantised, ins: tuple[int, ...], dtype: Any) -> Float[Array, "E N K"]:
    made = jax.vmap(lambda one: decode(one, ins, dtype))(kernels)  # [E, *outs, K]
    return made.reshape(len(made), -1, *ins)


def _frozen(
    x: Array, kernels: Float[Array, "E N K"], groups: GroupedRows, over: int
) -> Float[Array, "R N"]:
    """Return the product of rows and kernels, summed over that dim of the kernels."""
    if device().platform == "tpu":
        return _ragged(x, kernels if over == 1 else kernels.mT, groups)
    return _product(x, kernels, groups.owners, over)


def _ragged(
    x: Float[Array, "R K"], kernels: Float[Array, "E K N"], groups: GroupedRows
) -> Float[Array, "R N"]:
    made = jax.lax.ragged_dot(
        x, kernels, groups.sizes.astype(jnp.int32), preferred_element_type=jnp.float32
    )
    return made.astype(x.dtype)


def _block_rows(rows: int, groups: int) -> int:
    """Return the number of rows in a block. `ragged_dot` needs no padding."""
    platform = device().platform
    if platform == "tpu":
        return 1
    count = BLOCKS_ON_CPU if platform == "cpu" else BLOCKS_ON_GPU
    wanted = max(1, rows // (groups * count))
    size = 2 ** int(np.ceil(np.log2(wanted)))
    return min(max(size, SMALLEST_BLOCK_ROWS), LARGEST_BLOCK_ROWS)


@jax.custom_vjp
def _by_blocks(
    x: Float[Array, "R K"], kernels: Float[Array, "E K N"], owners: Int[Array, " blocks"]
) -> Float[Array, "R N"]:
    return _product(x, kernels, owners, over=1)


def _forward(x: Array, kernels: Array, owners: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _product(x, kernels, owners, over=1), (x, kernels, owners)


def _backward(saved: tuple[Array, Array, Array], dout: Array) -> tuple[Array, Array, None]:
    """Return the gradients of rows and kernels.

    They are two loops, because XLA leaves the second one out if the kernels are frozen.
    """
    x, kernels, owners = saved
    dx = _product(dout, kernels, owners, over=2)
    block = len(x) // len(owners)

    def add(i: Array, sums: Array) -> Array:
        rows, slopes = (jax.lax.dynamic_slice_in_dim(one, i * block, block) for one in (x, dout))
        own = jax.lax.dynamic_index_in_dim(sums, owners[i], keepdims=False)  # [K, N]
        own += jnp.einsum("bk,bn->kn", rows, slopes, preferred_element_type=jnp.float32)
        return jax.lax.dynamic_update_index_in_dim(sums, own, owners[i], 0)

    zero = jnp.zeros(kernels.shape, jnp.float32)
    return dx, jax.lax.fori_loop(0, len(owners), add, zero).astype(kernels.dtype), None


_by_blocks.defvjp(_forward, _backward)


@partial(jax.jit, static_argnames="over")
def _product(x: Array, kernels: Array, owners: Array, over: int) -> Array:
    """Return the product of each block of x with its kernel, summed over that dim of kernels."""
    block = len(x) // len(owners)

    def multiply(i: Array, out: Array) -> Array:
        rows = jax.lax.dynamic_slice_in_dim(x, i * block, block)  # [b, K or N]
        kernel = jax.lax.dynamic_index_in_dim(kernels, owners[i], keepdims=False)  # [K, N]
        made = jax.lax.dot_general(
            rows, kernel, (((1,), (over - 1,)), ((), ())), preferred_element_type=jnp.float32
        )
        return jax.lax.dynamic_update_slice_in_dim(out, made.astype(out.dtype), i * block, 0)

    width = kernels.shape[3 - over]
    return jax.lax.fori_loop(0, len(owners), multiply, jnp.zeros((len(x), width), x.dtype))
