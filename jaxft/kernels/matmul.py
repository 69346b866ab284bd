"""The product of activations and a kernel, for all projections.

A kernel in another format is one more branch of `quantised/layouts.py`.
"""

from functools import partial
from math import prod
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.runtime import device
from jaxft.kernels.quantised.layouts import Quantised, decode

Kernel = Array | Quantised


def matmul(x: Float[Array, "..."], kernel: Kernel, inputs: int = 1) -> Any:
    """Return x [*rows, *ins] times kernel [*ins, *outs]: [*rows, *outs], in x's dtype.

    inputs: the number of dims of *ins. A quantised kernel is frozen: it has no gradient.
    """
    if isinstance(kernel, Quantised):
        return _quantised(x, kernel, x.shape[x.ndim - inputs :])
    return _plain(x, kernel.astype(x.dtype), inputs)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _plain(x: Array, kernel: Array, inputs: int) -> Any:
    """Return the product with an array.

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


_plain.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _quantised(x: Array, kernel: Quantised, ins: tuple[int, ...]) -> Any:
    """Return the product with a quantised kernel, which is decoded to x's dtype.

    The backward pass decodes it again. It thus keeps the codes alone, and no copy of the weights.
    """
    decoded = decode(kernel, ins, x.dtype)  # [*outs, *ins]
    dims = (
        tuple(range(x.ndim - len(ins), x.ndim)),
        tuple(range(decoded.ndim - len(ins), decoded.ndim)),
    )
    return jax.lax.dot_general(x, decoded, (dims, ((), ())))  # [*rows, *outs]


def _quantised_forward(x: Array, kernel: Quantised, ins: tuple[int, ...]) -> tuple[Any, Any]:
    return _quantised(x, kernel, ins), kernel


def _quantised_backward(ins: tuple[int, ...], kernel: Quantised, dy: Array) -> tuple[Array, None]:
    decoded = decode(kernel, ins, dy.dtype)  # [*outs, *ins]
    outs = decoded.ndim - len(ins)
    dims = tuple(range(dy.ndim - outs, dy.ndim)), tuple(range(outs))
    return jax.lax.dot_general(dy, decoded, (dims, ((), ()))), None  # [*rows, *ins]


_quantised.defvjp(_quantised_forward, _quantised_backward)
