"""Elementwise functions: chains that the backward pass computes again, and soft-caps."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxft.core.runtime import device


def recomputed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function whose intermediate arrays are not saved for the backward pass.

    Accelerators wait for memory in norms and activations, so that computing these again is faster
    than writing and reading fp32 copies. A CPU waits for arithmetic, and saves them.
    """
    return function if device().platform == "cpu" else jax.checkpoint(function)


def soft_capped(
    x: Float[Array, "..."], cap: float | None
) -> tuple[Float[Array, "..."], Float[Array, "..."] | None]:
    """Return cap * tanh(x / cap) and its derivative, or x and None without a cap.

    The derivative is for gradients that are written by hand.
    Source: Gemma 2, arXiv:2408.00118, section 2.
    """
    if cap is None:
        return x, None
    level = jnp.tanh(x / cap)
    return cap * level, 1.0 - jnp.square(level)
