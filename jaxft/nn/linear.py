"""The only projection of the project, with the slot that a LoRA adapter fits in."""

from functools import partial
from math import prod
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray


class Adapter(NamedTuple):
    """How an adapter acts: scale (alpha / r), dropout on its input, and its own RNG stream."""

    scale: float
    dropout: float = 0.0
    stream: int = 0


class Linear(nnx.Module):
    """y = x W + b over the trailing `in_shape` dims; with an adapter also + scale * (x A) B.

    Shapes: x (..., *in_shape) -> (..., *out_shape). `axes` are the logical axes of both.
    LoRA: Hu et al. 2021, arXiv:2106.09685, eq. 3.
    """

    def __init__(
        self,
        in_shape: tuple[int, ...],
        out_shape: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        key: PRNGKeyArray,
        bias: bool = False,
        std: float = 0.02,
    ):
        shape = (*in_shape, *out_shape)
        self.kernel = nnx.Param(
            std * jax.random.normal(key, shape), axes=axes, inputs=len(in_shape)
        )
        out_axes = axes[len(in_shape) :]
        self.bias = nnx.data(nnx.Param(jnp.zeros(out_shape), axes=out_axes) if bias else None)
        self.lora_a: nnx.Param | None = nnx.data(None)
        self.lora_b: nnx.Param | None = nnx.data(None)
        self.adapter = Adapter(1.0)
        self.inputs = len(in_shape)

    def __call__(
        self, x: Float[Array, "..."], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "..."]:
        """`keys`, one a row of x, turn the adapter's dropout on; without them there is none."""
        y: Array = contract(x, self.kernel[...].astype(x.dtype), self.inputs)
        if self.lora_a is not None and self.lora_b is not None:
            y = y + self._adapted(x, keys, self.lora_a[...], self.lora_b[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        return y

    def wide_input(
        self, x: Float[Array, "... D"], keys: PRNGKeyArray | None = None
    ) -> Float[Array, "... E"]:
        """Return x with its adapter's scale * (x A) beside it, for a product with `wide_kernel`.

        `keys` as in `__call__`: dropout acts on the adapter's input alone. This is for callers
        that multiply by the kernel elsewhere. An adapter that is added to a bf16 kernel is rounded
        away until it is large: its steps are far below the kernel's last bit.
        """
        if self.lora_a is None:
            return x
        inputs = x
        if keys is not None and self.adapter.dropout > 0:
            inputs = dropout(x, keys, self.adapter)
        low = jnp.tensordot(inputs, self.lora_a[...].astype(x.dtype), self.inputs)
        return jnp.concatenate([x, (self.adapter.scale * low).astype(x.dtype)], axis=-1)

    def wide_kernel(self) -> Float[Array, "E F"]:
        """The kernel with its adapter's B below it; the bias is not in it."""
        kernel: Array = self.kernel[...]
        if self.lora_b is None:
            return kernel
        return jnp.concatenate([kernel, self.lora_b[...].astype(kernel.dtype)])

    def _adapted(self, x: Array, keys: PRNGKeyArray | None, a: Array, b: Array) -> Array:
        if keys is not None and self.adapter.dropout > 0:
            x = dropout(x, keys, self.adapter)
        low = jnp.tensordot(x, a.astype(x.dtype), self.inputs)
        return self.adapter.scale * jnp.tensordot(low, b.astype(x.dtype), 1)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def contract(x: Array, kernel: Array, inputs: int) -> Any:
    """tensordot(x, kernel, inputs), with gradients whose operands XLA:CPU writes in one piece.

    Left alone it fuses the activation's derivative into a transposing copy for the kernel's
    gradient: strided reads, ten times the time of the copy alone. On an accelerator this is
    tensordot and its usual gradients.
    """
    return jnp.tensordot(x, kernel, inputs)


def _contract_forward(x: Array, kernel: Array, inputs: int) -> tuple[Array, tuple[Array, Array]]:
    return jnp.tensordot(x, kernel, inputs), (x, kernel)


def _contract_backward(inputs: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    if jax.default_backend() == "cpu":
        x, dy = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(dy)
    outs, rows = kernel.ndim - inputs, x.ndim - inputs
    dims = tuple(range(dy.ndim - outs, dy.ndim)), tuple(range(inputs, kernel.ndim))
    dx = jax.lax.dot_general(dy, kernel, (dims, ((), ())))
    # Matrices, since of these alone XLA:CPU's products read a transposed one as it lies.
    x, dy = x.reshape(prod(x.shape[:rows]), -1), dy.reshape(prod(x.shape[:rows]), -1)
    dkernel = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))
    return dx, dkernel.reshape(kernel.shape)


contract.defvjp(_contract_forward, _contract_backward)


def dropout(x: Array, keys: PRNGKeyArray, adapter: Adapter) -> Array:
    """Inverted dropout whose mask depends on a row's own key only, not on its batch or mesh."""
    keep = 1.0 - adapter.dropout

    def kept(key: PRNGKeyArray) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, adapter.stream), keep, x.shape[1:])

    return jnp.where(jax.vmap(kept)(keys), x / keep, 0).astype(x.dtype)


class Embedding(nnx.Module):
    """A table of row vectors: token ids (...) -> (..., D)."""

    def __init__(self, rows: int, dim: int, *, key: PRNGKeyArray, std: float = 0.02):
        table = std * jax.random.normal(key, (rows, dim))
        self.embedding = nnx.Param(table, axes=("vocab", "embed"))

    def __call__(self, ids: Array, dtype: jnp.dtype | None = None) -> Array:
        table = self.embedding[...]
        return gather_rows(table if dtype is None else table.astype(dtype), ids)


def gather_rows(table: Array, ids: Array) -> Array:
    """table[ids] with the table made whole over its columns first.

    Indexing a table sharded over both dims makes XLA rematerialise it ("Involuntary full
    rematerialization"); gathering it once is one all-gather.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        table = jax.lax.with_sharding_constraint(table, jax.sharding.PartitionSpec())
    return table[ids]
