"""Row-wise int8 of bitsandbytes: a code for each number, and a scale for the inputs of an output.

It is the storage of LLM.int8 (Dettmers et al. 2022, arXiv:2208.07339) without its products of
integers and its columns of outliers: the weights are decoded, and activations keep their dtype.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float

STEP = 1 / 127


class Int8(NamedTuple):
    """A kernel [*ins, *outs] in int8. codes: int8 [*outs, *ins]. scales: fp32 [*outs]."""

    codes: Any
    scales: Any


def axes(kernel: tuple[str | None, ...], inputs: int) -> Int8:
    """Return the logical axes of both arrays, by those of the kernel [*ins, *outs]."""
    return Int8((*kernel[inputs:], *kernel[:inputs]), kernel[inputs:])


def encode(kernel: Float[Array, "..."], inputs: int) -> Int8:
    """Return a kernel [*ins, *outs] in int8. The scale is the largest absolute number."""
    kernel = jnp.moveaxis(kernel, range(inputs), range(-inputs, 0))  # [*outs, *ins]
    kernel = kernel.astype(jnp.float32)
    scales = jnp.abs(kernel).max(range(-inputs, 0))  # [*outs]
    factors = 1.0 / jnp.where(scales == 0, 1, scales) * 127.0  # rounded twice, as torch divides
    codes = jnp.round(kernel * jnp.expand_dims(factors, range(-inputs, 0)))  # [*outs, *ins]
    return Int8(codes.astype(jnp.int8), scales)


def decode(kernel: Int8, ins: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Return the kernel as [*outs, *ins] in a dtype: fp32 products, rounded once."""
    scales = jnp.expand_dims(kernel.scales, range(-len(ins), 0))  # [*outs, 1, ...]
    return (kernel.codes.astype(jnp.float32) * scales * jnp.float32(STEP)).astype(dtype)
