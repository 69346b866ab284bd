"""The step of a run: jitted, and compiled ahead for each shape of batch."""

import time
from typing import Any

import jax

from jaxft.core import runtime, step
from jaxft.core.params import Params
from jaxft.core.step import State, StepSpec
from jaxft.runs.opening import Run
from jaxft.runs.state import Plan, run_state_shardings
from jaxft.tasks import Objective


def make_step(run: Run, plan: Plan, objective: Objective) -> Any:
    """Return the jitted step of a run: `step(state, frozen, batch) -> state, metrics`."""
    cfg, template = run.cfg, run.opened.template
    spec = StepSpec(
        cfg.micro_batches, runtime.resolve_dtype(cfg.compute_dtype), cfg.optim.ema, cfg.seed
    )
    shards = run_state_shardings(run, plan.tx)
    return step.make_step(template, objective.loss, plan.tx, plan.schedule, spec, shards, run.mesh)


class Compiled:
    """A jitted step compiled ahead of its first call, once for each shape of batch.

    The shapes that the data set announces are compiled before step 0. Another shape (short
    examples that need one more row) is compiled at its first batch.
    """

    def __init__(self, step_fn: Any):
        self.step_fn = step_fn
        self.by_shape: dict[Any, Any] = {}

    def __call__(self, state: State, frozen: Params, batch: dict[str, jax.Array]) -> Any:
        self.prepare(state, frozen, batch)
        return self.by_shape[_shape(batch)](state, frozen, batch)

    def prepare(self, state: State, frozen: Params, batch: dict[str, jax.Array]) -> bool:
        """Compile for a new shape, and print the seconds and the memory that it needs.

        `batch` may hold shapes without values. Returns True if the shape was new.
        """
        if _shape(batch) in self.by_shape:
            return False
        began = time.perf_counter()
        compiled = self.step_fn.lower(state, frozen, batch).compile()
        seconds, memory = time.perf_counter() - began, compiled.memory_analysis()
        if memory is not None:
            held, more = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            print(
                f"compiled the step for {_shape(batch)[0]} in {seconds:.1f} s; a device holds"
                f" {held / 2**30:.2f} GiB of parameters, state and batch, and a step needs"
                f" {more / 2**30:.2f} GiB more",
                flush=True,
            )
        self.by_shape[_shape(batch)] = compiled
        return True


def _shape(batch: dict[str, jax.Array]) -> tuple:
    return tuple(batch[name].shape for name in sorted(batch, reverse=True))
