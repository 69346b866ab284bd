"""Frozen kernels of projections in fewer bits: the base of a LoRA."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
from flax import nnx

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import Leaf, Packed
from jaxft.kernels.quantised import int8, nf4
from jaxft.kernels.quantised.int8 import Int8
from jaxft.kernels.quantised.nf4 import DYNAMIC_VALUES, NF4, NF4_BLOCK, NF4_VALUES
from jaxft.nn.linear import Linear
from jaxft.nn.lora import layer_count, projections

NF4_BASE, INT8_BASE = "nf4", "int8"  # values of the key `base`
# The values of NF4's codes, by the names that they have beside a weight of bitsandbytes.
NF4_TABLES = {"quant_map": NF4_VALUES, "nested_quant_map": DYNAMIC_VALUES}


class NF4Kernel(nnx.Module):
    """The kernel of a projection in NF4. It is read like a parameter.

    double: the scales have codes too.
    """

    def __init__(self, kernel: nnx.Param, inputs: int, double: bool):
        encode = nf4.encode if double else nf4.encode_once
        made = _params(kernel, inputs, encode, nf4.axes)
        self.codes, self.scales = made["codes"], made["scales"]
        self.nested, self.offset = nnx.data(made.get("nested")), nnx.data(made.get("offset"))

    def __getitem__(self, index: Any) -> NF4:
        held = NF4(self.codes[index], self.scales[index])
        if self.nested is None or self.offset is None:
            return held
        return held._replace(nested=self.nested[index], offset=self.offset[index])


class Int8Kernel(nnx.Module):
    """The kernel of a projection in int8. It is read like a parameter."""

    def __init__(self, kernel: nnx.Param, inputs: int):
        made = _params(kernel, inputs, int8.encode, int8.axes)
        self.codes, self.scales = made["codes"], made["scales"]

    def __getitem__(self, index: Any) -> Int8:
        return Int8(self.codes[index], self.scales[index])


def check_base(base: str, lora: Lora) -> None:
    """Raise UserError for a quantised base without a LoRA, or with one that changes its norms."""
    if base == "none":
        return
    if not lora.rank:
        raise UserError(f"base={base} is frozen, so it needs adapters; set lora.rank, such as 16")
    if lora.dora:
        raise UserError(
            f"lora.dora=True does not go with base={base}: DoRA measures the weights in every step;"
            " set base=none"
        )


def quantise(model: nnx.Module, base: str, double: bool = True, prefix: str = "") -> None:
    """Quantise the kernel of every projection in a stack of blocks, and those of all experts.

    In a decoder these are all but the output head, as in transformers. Embeddings, projections
    before and after the blocks, convolutions, routers, norms and biases stay.
    base: "nf4", "int8", or "none". double: as in `NF4Kernel`. prefix: of the network's paths.
    Raises: UserError for a projection whose inputs are no whole number of blocks, and for a model
    without any projection in a stack.
    """
    if base == "none":
        return
    found: dict[str, Any] = {
        path: linear
        for path, linear in projections(model).items()
        if path.startswith(prefix) and layer_count(linear) and isinstance(linear, Linear)
    }
    found |= _experts(model)
    if not found:
        raise UserError(f"base={base}: this model has no stacked blocks to quantise; set base=none")
    for path, module in found.items():
        about = module.kernel.get_metadata()
        axes, inputs = about["axes"], about["inputs"]
        at = len(module.kernel.shape) - len(axes) + int(axes[0] == "expert")
        width = prod(module.kernel.shape[at : at + inputs])
        if base == NF4_BASE and width % NF4_BLOCK:
            raise UserError(
                f"base={base}: {path} has {width} inputs, which is no multiple of {NF4_BLOCK}; set"
                f" base={INT8_BASE} or base=none"
            )
        if base == NF4_BASE:
            module.kernel = nnx.data(NF4Kernel(module.kernel, inputs, double))
        else:
            module.kernel = nnx.data(Int8Kernel(module.kernel, inputs))


def _experts(model: nnx.Module) -> dict[str, Any]:
    """Return the modules whose kernel is stacked over experts, by dotted path."""
    found = {}
    for path, module in nnx.iter_modules(model):
        kernel = getattr(module, "kernel", None)
        if isinstance(kernel, nnx.Param) and kernel.get_metadata()["axes"][0] == "expert":
            found[".".join(map(str, path))] = module
    return dict(sorted(found.items()))


def _params(
    kernel: nnx.Param,
    inputs: int,
    encode: Callable[[jax.Array, int], Any],
    axes: Callable[[tuple[str | None, ...], int], Any],
) -> dict[str, nnx.Param]:
    """Return the arrays of a kernel as parameters by name, each with what it is a part of."""
    own, shape = kernel.get_metadata()["axes"], tuple(kernel.shape)
    lead = ("layers",) if len(shape) > len(own) else ()
    packed = Packed(Leaf(shape, kernel.dtype, (*lead, *own), inputs), encode)
    experts, one = (own[:1], own[1:]) if own[0] == "expert" else ((), own)
    named = axes(one, inputs)._asdict()
    return {
        name: nnx.Param(array, axes=(*experts, *named[name]), packed=packed)
        for name, array in packed.encoded(kernel[...]).items()
    }
