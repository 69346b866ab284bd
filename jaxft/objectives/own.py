"""A loss of the user's own, in place of that of a task."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf
from jaxft.core.step import Batch, Metrics


@dataclass(frozen=True)
class OwnLoss:
    """An objective with the loss of a function. Units and FLOPs are those of the `task` objective.

    function: (objective, model, batch, keys, step) -> ((sum, weight), metrics), where `objective`
    is the task's own.
    """

    task: Any
    function: Callable[..., Any]
    remat: str = "none"
    unread: tuple[str, ...] = ()  # a function may read every parameter

    @property
    def unit(self) -> str:
        return self.task.unit

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return what the function returns. Raises UserError for another form."""
        task = replace(self.task, remat=self.remat)
        found = self.function(task, model, batch, keys, step)
        match found:
            case ((jax.Array(shape=()) as total, jax.Array(shape=()) as weight), dict(metrics)):
                return (total, weight), metrics
        raise UserError(
            f"the loss {name_of(self.function)} must return ((sum, weight), metrics): two scalar"
            f" arrays, and a dict of further sums by name; it returned {_form(found)}"
        )

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return self.task.units(batch)

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        return self.task.flops(trained)


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function with its module."""
    return f"{function.__module__}.{function.__qualname__}"


def _form(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(map(_form, value))})"
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"an array of shape {shape}"
