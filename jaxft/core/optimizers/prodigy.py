"""Prodigy, which estimates its own step size."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import optax
from optax import contrib

from jaxft.core.params import Params


def prodigy(
    learning_rate: optax.Schedule,
    b1: float,
    b2: float,
    weight_decay: float,
    decays: Callable[[Params], dict[str, bool]],
) -> optax.GradientTransformation:
    """optax's Prodigy, whose weight decay would include norms and biases.

    Gradients that are all 0 at the first step give it 0 / 0 as step size. It then stays as it was.
    """
    plain = contrib.prodigy(learning_rate, (b1, b2))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        count = state.count + 1
        correction = jnp.sqrt(1 - b2**count) / (1 - b1**count)
        size = weight_decay * state.estim_lr * learning_rate(state.count) * correction
        found: Any = plain.update(updates, state, params)
        made, new = found
        unmoved = sum(jnp.sum(jnp.abs(x)) for x in new.grad_sum.values()) == 0
        new = new._replace(estim_lr=jnp.where(unmoved, state.estim_lr, new.estim_lr))
        made = {path: jnp.where(unmoved, 0.0, x) for path, x in made.items()}
        decayed = decays(params)
        return {k: x - size * params[k] if decayed[k] else x for k, x in made.items()}, new

    return optax.GradientTransformation(plain.init, update)
