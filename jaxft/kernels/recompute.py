"""Elementwise chains that the backward pass computes again, instead of reading saved arrays."""

from collections.abc import Callable
from typing import Any

import jax

from jaxft.core.runtime import device


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose intermediate arrays are not saved for the backward pass.

    Accelerators wait for memory in norms and activations, so that computing these again is faster
    than writing and reading fp32 copies. A CPU waits for arithmetic, and saves them.
    """
    return function if device().platform == "cpu" else jax.checkpoint(function)
