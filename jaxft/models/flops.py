"""Model FLOPs of a traced function: two for each multiply-add."""

from collections.abc import Callable
from math import prod
from typing import Any

import jax

from jaxft.core.sharding import plain_mesh


def count(function: Callable[..., Any], *args: Any) -> float:
    """Return the FLOPs of one call on abstract or concrete arguments. The call is only traced.

    Only matrix products and convolutions count, as in torch's FlopCounterMode and in published MFU.
    The body of a scan counts once an iteration, that of a `while` loop once. The function is traced
    for a device without kernels of its own, so that products inside of these count too.
    """
    with jax.sharding.use_abstract_mesh(plain_mesh()):
        return _of_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _of_jaxpr(jaxpr: Any) -> float:
    return sum(_of_equation(equation) for equation in jaxpr.eqns)


def _of_equation(equation: Any) -> float:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2.0 * prod(equation.outvars[0].aval.shape) * prod(left[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        outputs = kernel[params["dimension_numbers"].rhs_spec[0]]
        zeros = prod(params["lhs_dilation"])  # one in so many inputs is not a zero between others
        return 2.0 * prod(equation.outvars[0].aval.shape) * prod(kernel) / outputs / zeros
    if name == "cond":
        return max(_of_jaxpr(branch.jaxpr) for branch in params["branches"])
    times = params["length"] if name == "scan" else 1
    return times * sum(_of_jaxpr(inner) for inner in _inner(params))


def _inner(params: dict[str, Any]) -> list[Any]:
    """Return the jaxprs that an equation calls, under whatever parameter names."""
    found = []
    for value in params.values():
        for one in value if isinstance(value, tuple | list) else (value,):
            jaxpr = getattr(one, "jaxpr", one)
            if hasattr(jaxpr, "eqns"):
                found.append(jaxpr)
    return found
