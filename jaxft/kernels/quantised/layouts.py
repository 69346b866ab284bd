"""The layouts of quantised kernels in one place: a branch here for each."""

from typing import Any

from jaxtyping import Array, Float

from jaxft.kernels.quantised import int8, nf4
from jaxft.kernels.quantised.int8 import Int8
from jaxft.kernels.quantised.nf4 import NF4

Quantised = NF4 | Int8


def decode(kernel: Quantised, ins: tuple[int, ...], dtype: Any) -> Float[Array, "..."]:
    """Return a quantised kernel as [*outs, *ins] in a dtype."""
    if isinstance(kernel, NF4):
        return nf4.decode(kernel, ins, dtype)
    return int8.decode(kernel, ins, dtype)
