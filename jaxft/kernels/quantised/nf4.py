"""NF4 of bitsandbytes: a 4-bit code for each number, and a scale for each block of 64.

The scales have 8-bit codes themselves ("double quantisation"). Source: Dettmers et al. 2023,
arXiv:2305.14314, section 3.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

NF4_BLOCK, NESTED_BLOCK = 64, 256
# Quantiles of a normal distribution with 0 among them, scaled to [-1, 1].
NF4_VALUES = np.array(
    (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    np.float32,
)


class NF4(NamedTuple):
    """A kernel [*ins, *outs] in NF4. The blocks run over the inputs of one output.

    codes: uint8 [*outs, blocks, 32], two numbers a byte, the first in its high bits. scales: the
    largest absolute number of each block [*outs, blocks], as uint8 codes, or as fp32 if `nested` is
    None. nested: the scale of 256 codes of scales, fp32 [n]. offset: the mean scale, fp32 [].
    """

    codes: Any
    scales: Any
    nested: Any = None
    offset: Any = None


def dynamic_values() -> np.ndarray:
    """Return the 256 values of an 8-bit code of a scale, fp32, in their order.

    Each decade from 1e-6 to 1 has twice the values of the one below it.
    Source: Dettmers et al. 2021, arXiv:2110.02861, section 2.1.
    """
    found = [0.0, 1.0]
    low, high = np.float32(0.1), np.float32(1.0)
    for i in range(7):
        count = 2**i
        width, k = np.float64((high - low) / np.float32(count)), np.arange(count + 1)
        # The sums of torch.linspace, which round once and run from both ends.
        ends = np.where(k < (count + 1) // 2, low + width * k, high - width * (count - k))
        ends = ends.astype(np.float32)
        means = (ends[:-1] + ends[1:]) / np.float32(2) * np.float32(10.0 ** (i - 6))
        found += [*means.tolist(), *(-means).tolist()]
    return np.array(sorted(found), np.float32)


DYNAMIC_VALUES = dynamic_values()


def axes(kernel: tuple[str | None, ...], inputs: int) -> NF4:
    """Return the logical axes of all arrays, by those of the kernel [*ins, *outs].

    The blocks are sharded like the first dim of the inputs.
    """
    blocks = (*kernel[inputs:], kernel[0])
    return NF4((*blocks, None), blocks, (None,), ())


def encode(kernel: Float[Array, "..."], inputs: int) -> NF4:
    """Return a kernel [*ins, *outs] with double quantisation. The number of inputs is n * 64."""
    made = encode_once(kernel, inputs)
    offset = made.scales.mean()
    flat = (made.scales - offset).reshape(-1)
    rows = jnp.pad(flat, (0, -len(flat) % NESTED_BLOCK)).reshape(-1, NESTED_BLOCK)  # [n, 256]
    nested = jnp.abs(rows).max(-1)
    scaled = rows * (1.0 / jnp.where(nested == 0, 1, nested))[:, None]
    bounds = (DYNAMIC_VALUES[:-1] + DYNAMIC_VALUES[1:]) / 2
    found = jnp.searchsorted(bounds, scaled, side="left").astype(jnp.uint8)  # the nearest value
    scales = found.reshape(-1)[: flat.size].reshape(made.scales.shape)  # [*outs, blocks]
    return NF4(made.codes, scales, nested, offset)


def encode_once(kernel: Float[Array, "..."], inputs: int) -> NF4:
    """Return a kernel as `encode` does, but with fp32 scales."""
    outs = kernel.shape[inputs:]
    kernel = jnp.moveaxis(kernel, range(inputs), range(-inputs, 0))  # [*outs, *ins]
    blocks = kernel.astype(jnp.float32).reshape(*outs, -1, NF4_BLOCK)  # [*outs, blocks, 64]
    scales = jnp.abs(blocks).max(-1)
    scaled = blocks * (1.0 / jnp.where(scales == 0, 1, scales))[..., None]
    bounds = (NF4_VALUES[:-1] + NF4_VALUES[1:]) / 2
    found = sum((scaled > bound).astype(jnp.uint8) for bound in bounds)
    pairs = jnp.asarray(found).reshape(*outs, -1, NF4_BLOCK // 2, 2)  # [*outs, blocks, 32, 2]
    return NF4(pairs[..., 0] << 4 | pairs[..., 1], scales)


def decode(kernel: NF4, ins: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Return the kernel as [*outs, *ins] in a dtype: fp32 products, rounded once."""
    outs = kernel.scales.shape[:-1]
    shifts = jnp.array([4, 0], jnp.uint8)
    codes = kernel.codes[..., None] >> shifts & 15  # [*outs, blocks, 32, 2]
    codes = codes.reshape(*outs, -1, NF4_BLOCK)  # [*outs, blocks, 64]
    # A choice by the bits of each code, because a TPU reads a table element by element. It is made
    # of integers: the constants of `jnp.where` are arrays, which a scan over layers would hold.
    values: list[Any] = NF4_VALUES.view(np.int32).tolist()
    for bit in range(4):
        mask = -(codes.astype(jnp.int32) >> bit & 1)  # all bits are those of the code's bit
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [even ^ (mask & (even ^ odd)) for even, odd in pairs]
    number = jax.lax.bitcast_convert_type(values[0], jnp.float32)
    made = number * _scales(kernel)[..., None]  # [*outs, blocks, 64]
    return made.astype(dtype).reshape(*outs, *ins)


def with_plain_scales(kernel: NF4) -> NF4:
    """Return the same kernel with fp32 scales, which can be cut anywhere between blocks."""
    return NF4(kernel.codes, _scales(kernel))


def _scales(kernel: NF4) -> Float[Array, "..."]:
    """Return the fp32 scale of each block."""
    if kernel.nested is None:
        return kernel.scales
    each = jnp.repeat(kernel.nested, NESTED_BLOCK)[: kernel.scales.size]
    each = each.reshape(kernel.scales.shape)  # [*outs, blocks]
    scaled = jnp.asarray(DYNAMIC_VALUES)[kernel.scales] * each
    # The bounds change no value. They keep a compiler from making one operation of product and sum,
    # which would round only once.
    return jnp.clip(scaled, -each, each) + kernel.offset
