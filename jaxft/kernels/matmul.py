"""The product of activations and a kernel, for all projections.

A kernel in another format (quantised, fp8) would be one more branch in this file alone.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.runtime import device


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: Float[Array, "..."], kernel: Float[Array, "..."], inputs: int = 1) -> Any:
    """Return x [*rows, *ins] times kernel [*ins, *outs]: [*rows, *outs].

    inputs: the number of dims of *ins.

    Value and gradients are those of `reference` on every device. On XLA:CPU a barrier keeps the
    operands of the gradients whole. Without it, XLA:CPU fuses the derivative of the activation into
    the transposed copy for the kernel's gradient. The strided reads take ten times as long as the
    copy.
    """
    return reference(x, kernel, inputs)


def reference(x: Float[Array, "..."], kernel: Float[Array, "..."], inputs: int = 1) -> Array:
    """Return the same product as `matmul`, with the gradients that jax derives."""
    return jnp.tensordot(x, kernel, inputs)


def _forward(x: Array, kernel: Array, inputs: int) -> tuple[Array, tuple[Array, Array]]:
    return reference(x, kernel, inputs), (x, kernel)


def _backward(inputs: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    if device().platform == "cpu":
        x, dy = jax.lax.optimization_barrier(x), jax.lax.optimization_barrier(dy)
    outs, rows = kernel.ndim - inputs, x.ndim - inputs
    dims = tuple(range(dy.ndim - outs, dy.ndim)), tuple(range(inputs, kernel.ndim))
    dx = jax.lax.dot_general(dy, kernel, (dims, ((), ())))  # [*rows, *ins]
    # XLA:CPU reads a transposed operand in place only if it is a matrix.
    count = prod(x.shape[:rows])
    x, dy = x.reshape(count, -1), dy.reshape(count, -1)  # [rows, ins] and [rows, outs]
    dkernel = jax.lax.dot_general(x, dy, (((0,), (0,)), ((), ())))  # [ins, outs]
    return dx, dkernel.reshape(kernel.shape)  # [*ins, *outs]


matmul.defvjp(_forward, _backward)
