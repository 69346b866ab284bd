"""Training without a schedule: gradients at one point, and an average that is evaluated."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from jaxft.core.params import Params


def schedule_free(
    steps: optax.GradientTransformation, learning_rate: optax.Schedule, b1: float
) -> optax.GradientTransformation:
    """Return optax's wrapper of an optimiser without momentum, whose first step is step 0.

    optax counts from 1 for the weights of the average, where `steps` counts from 0.
    """
    made = contrib.schedule_free(steps, lambda count: learning_rate(count - 1), b1)
    return optax.GradientTransformation(made.init, made.update)


def average(opt: Any, params: Params) -> Params:
    """Return the average x of the state of `schedule_free`, or {} for another optimiser.

    params: y, at which gradients are computed. The other sequence z is in the state, and y is
    (1 - b1) z + b1 x. In this form x is exactly y where y is z, as it is before the first step.
    """
    found = [one for one in jax.tree.leaves(opt, is_leaf=_is_state) if _is_state(one)]
    if not found:
        return {}
    ratio = jnp.asarray(1 / found[0].b1 - 1)  # [A] of a sweep, as the first axis of its params
    return {
        path: y + ratio.reshape(ratio.shape + (1,) * (y.ndim - ratio.ndim)) * (y - found[0].z[path])
        for path, y in params.items()
    }


def _is_state(node: Any) -> bool:
    return isinstance(node, contrib.ScheduleFreeState)
