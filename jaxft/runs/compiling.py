"""The step of a run: jitted, and compiled ahead for each shape of batch."""

import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax

from jaxft.core import runtime, step
from jaxft.core.errors import UserError
from jaxft.core.params import Params
from jaxft.core.processes import EXHAUSTED
from jaxft.core.step import State, StepSpec
from jaxft.kernels.attention import used
from jaxft.runs.opening import Run
from jaxft.runs.state import Plan, run_state_shardings
from jaxft.tasks import Objective

# Policies of remat=auto, from the fastest to the one with the least memory. On an accelerator
# "none" is slower than "dots": it reads and writes more than "dots" computes again.
CPU_REMATS, ACCELERATOR_REMATS = ("none",), ("dots", "full")


def make_step(run: Run, plan: Plan, objective: Objective) -> Any:
    """Return the jitted step of a run: `step(state, frozen, batch) -> state, metrics`."""
    cfg, template = run.cfg, run.opened.template
    spec = StepSpec(
        cfg.micro_batches, runtime.resolve_dtype(cfg.compute_dtype), cfg.optim.ema, cfg.seed
    )
    shards = run_state_shardings(run, plan.tx)
    return step.make_step(template, objective.loss, plan.tx, plan.schedule, spec, shards, run.mesh)


def make_steps(run: Run, plan: Plan, objective: Any) -> dict[str, Any]:
    """Return the jitted step by its remat policy: the config's, or those that "auto" tries."""
    policies = (run.cfg.remat,)
    if run.cfg.remat == "auto":
        cpu = runtime.device(run.mesh).platform == "cpu"
        policies = CPU_REMATS if cpu else ACCELERATOR_REMATS
    return {name: make_step(run, plan, replace(objective, remat=name)) for name in policies}


class Compiled:
    """A jitted step compiled ahead of its first call, once for each shape of batch.

    The shapes that the data set announces are compiled before step 0. Another shape (short
    examples that need one more row) is compiled at its first batch.

    steps: the step by remat policy, in order of preference. limit: bytes of a device, 0 for none.
    A step that does not fit makes room for the next policy. The last one is taken as it is.
    """

    def __init__(self, steps: Mapping[str, Any], limit: int = 0):
        self.steps, self.limit = dict(steps), limit
        self.by_shape: dict[Any, Any] = {}
        self.needed = 0.0  # bytes of a device, of the largest shape

    @property
    def remat(self) -> str:
        """The policy of the next compilation."""
        return next(iter(self.steps))

    def __call__(self, state: State, frozen: Params, batch: dict[str, jax.Array]) -> Any:
        self.prepare(state, frozen, batch)
        return self.by_shape[_shape(batch)](state, frozen, batch)

    def prepare(self, state: State, frozen: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Compile for a new shape, and print the seconds and the memory that it needs.

        `batch` may hold shapes without values. Returns the compiled step. Raises UserError if the
        compiler refuses a step that does not fit.
        """
        if found := self.by_shape.get(_shape(batch)):
            return found
        while True:
            began = time.perf_counter()
            compiled, needed = _compile(self.steps[self.remat].lower(state, frozen, batch))
            fits = not self.limit or needed <= self.limit
            if compiled is not None and (fits or len(self.steps) == 1):
                break
            self._next(needed)
        self.needed = max(self.needed, needed)
        memory = compiled.memory_analysis()
        if memory is not None:
            held, more = memory.argument_size_in_bytes, memory.temp_size_in_bytes
            program = "" if runtime.device().platform == "cpu" else compiled.as_text()
            print(
                f"compiled the step for {_shape(batch)[0]} in {time.perf_counter() - began:.1f} s"
                f" (remat {self.remat}, attention {used(program)}); a device holds"
                f" {held / 2**30:.2f} GiB of parameters, state and batch, and a step needs"
                f" {more / 2**30:.2f} GiB more",
                flush=True,
            )
        self.by_shape[_shape(batch)] = compiled
        return compiled

    def _next(self, needed: float) -> None:
        """Drop the policy whose step does not fit."""
        dropped = self.remat
        if len(self.steps) == 1:
            raise UserError(
                f"the step does not fit on a device with remat={dropped}; lower batch_size, raise"
                " micro_batches, or take more devices"
            )
        del self.steps[dropped]
        size = f"{needed / 2**30:.2f} GiB" if needed else "more"
        print(
            f"remat={dropped} needs {size} of {self.limit / 2**30:.2f} GiB: trying {self.remat}",
            flush=True,
        )


def _compile(lowered: Any) -> tuple[Any, float]:
    """Return the compiled step and its bytes on a device. (None, 0) if the compiler refuses it."""
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        return None, 0.0
    memory = compiled.memory_analysis()
    return compiled, needed_bytes(memory) if memory else 0.0


def needed_bytes(memory: Any) -> int:
    """Return the bytes of a device that a compiled step needs, from its memory analysis."""
    made = memory.output_size_in_bytes - memory.alias_size_in_bytes  # the state is donated
    return memory.argument_size_in_bytes + made + memory.temp_size_in_bytes


def _shape(batch: Mapping[str, Any]) -> tuple:
    return tuple(batch[name].shape for name in sorted(batch, reverse=True))
