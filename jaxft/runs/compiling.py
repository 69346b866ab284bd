"""The step of a run: jitted, and compiled ahead for each shape of batch."""

import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

import jax

from jaxft.core import runtime, step
from jaxft.core.cli.live import status
from jaxft.core.errors import UserError
from jaxft.core.params import Params
from jaxft.core.processes import EXHAUSTED
from jaxft.core.step import State, StepSpec
from jaxft.kernels.attention.attention import used
from jaxft.objectives.preference import KTO, Preference
from jaxft.runs.opening import Run
from jaxft.runs.state import Plan, make_chain, run_state_shardings
from jaxft.runs.sweep import over_members
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
    measure = None
    if isinstance(objective, Preference) and objective.rule.name == KTO:
        measure = objective.measure

    def update_at(rate: Any) -> Any:
        """Return the update at `rate` times the learning rate of the run."""
        schedule = plan.schedule if rate is None else lambda count: rate * plan.schedule(count)
        tx = plan.tx if rate is None else make_chain(run, schedule)
        return step.make_update(template, objective.loss, tx, schedule, spec, measure)

    update = over_members(run.sweep, update_at) if run.sweep else update_at(None)
    return step.make_step(update, run_state_shardings(run, plan.tx), run.mesh)


def make_steps(run: Run, plan: Plan, objective: Any) -> dict[str, Any]:
    """Return the jitted step by its remat policy: the config's, or those that "auto" tries."""
    policies = (run.cfg.remat,)
    if run.cfg.remat == "auto":
        cpu = runtime.device(run.mesh).platform == "cpu"
        policies = CPU_REMATS if cpu else ACCELERATOR_REMATS
    return {name: make_step(run, plan, replace(objective, remat=name)) for name in policies}


class Compiled:
    """A jitted step compiled ahead of its first call, once for each shape of batch.

    The shapes that the data set announces are compiled before step 0. Another one (a rare batch
    that needs still more rows) is compiled at its first batch.

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

    def prepare(
        self, state: State, frozen: Mapping[str, Any], *batches: Mapping[str, Any]
    ) -> list[Any]:
        """Compile for new shapes, and print the seconds and the memory that they need, in one line.

        The batches may hold shapes without values. Returns the compiled steps. Raises UserError if
        the compiler refuses a step that does not fit.
        """
        new = {_shape(batch): batch for batch in batches if _shape(batch) not in self.by_shape}
        began = time.perf_counter()
        for shape, batch in new.items():
            status(f"compiling the step for {_batch_of(shape)}")
            self.by_shape[shape] = self._compiled(state, frozen, batch)
        status("")
        self._report(new, time.perf_counter() - began)
        return [self.by_shape[_shape(batch)] for batch in batches]

    def _compiled(self, state: State, frozen: Mapping[str, Any], batch: Mapping[str, Any]) -> Any:
        """Return the step compiled for a batch, by the first policy that fits, or by the last."""
        while True:
            compiled, needed = _compile(self.steps[self.remat].lower(state, frozen, batch))
            fits = not self.limit or needed <= self.limit
            if compiled is not None and (fits or len(self.steps) == 1):
                self.needed = max(self.needed, needed)
                return compiled
            self._next(needed)

    def _report(self, shapes: Collection[tuple], seconds: float) -> None:
        """Print a line on newly compiled shapes: the memory is that of the largest."""
        made = [self.by_shape[shape] for shape in shapes]
        memories = [one.memory_analysis() for one in made]
        if not made or None in memories:
            return
        held = max(one.argument_size_in_bytes for one in memories)
        more = max(one.temp_size_in_bytes for one in memories)
        program = "" if runtime.device().platform == "cpu" else made[-1].as_text()
        what = f"{len(made)} batch shapes" if len(made) > 1 else _batch_of(next(iter(shapes)))
        print(
            f"compiled the step for {what} in {seconds:.1f} s (remat {self.remat}, attention"
            f" {used(program)}); a device holds {held / 2**30:.2f} GiB of parameters, state and"
            f" batch, and a step needs {more / 2**30:.2f} GiB more",
            flush=True,
        )

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


def _batch_of(shape: tuple) -> str:
    """Return the size of a batch in words, by its first array."""
    return f"a batch of {' x '.join(map(str, shape[0]))}"


def _shape(batch: Mapping[str, Any]) -> tuple:
    return tuple(batch[name].shape for name in sorted(batch, reverse=True))
