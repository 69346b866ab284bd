"""State of a run before a step: durations, optimiser, parameters and moments."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax

from jaxft.core import config as configs
from jaxft.core import optim, runtime
from jaxft.core.optimizers.schedule_free import average
from jaxft.core.params import Params, describe_trained
from jaxft.core.step import State, init_state, state_shardings
from jaxft.runs.checkpoint import Checkpoints, Damage
from jaxft.runs.opening import Run, encode, load_params
from jaxft.runs.sweep import MEMBER_AXES, with_axis
from jaxft.tasks import Data, Objective, Rows


class Plan(NamedTuple):
    """The optimiser of a run and its duration in steps."""

    total: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation


def make_plan(run: Run, examples: int) -> Plan:
    """Return the total steps, the schedule and the Optax chain for `examples` training rows."""
    cfg, o = run.cfg, run.cfg.optim
    total = configs.steps(cfg.total, cfg.batch_size, examples, "total")
    warmup = configs.steps(o.warmup, cfg.batch_size, examples, "optim.warmup")
    warmup = min(warmup, max(total - 1, 0))  # a short trial run of a config is not an error
    schedule = optim.schedule(o.schedule, o.lr, warmup, max(total, 1))
    return Plan(total, schedule, make_chain(run, schedule))


def make_chain(run: Run, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Return the Optax chain of a run at a learning rate."""
    o = run.cfg.optim
    return optim.make_optimizer(
        o.name,
        schedule,
        b1=o.b1,
        b2=o.b2,
        weight_decay=o.weight_decay,
        clip=o.clip,
        leaves=run.trained_leaves,
        factors=optim.lr_factors(o.lr_by, run.trained_leaves),
    )


class Periods(NamedTuple):
    """Numbers of steps between two events of a kind. 0 is never."""

    log: int
    eval: int
    save: int
    sample: int


def periods(run: Run, examples: int) -> Periods:
    """Return `every.…` in steps, for `examples` training rows."""
    every, size = run.cfg.every, run.cfg.batch_size
    pairs = zip(Periods._fields, (every.log, every.eval, every.save, every.sample), strict=True)
    return Periods(*(configs.steps(value, size, examples, f"every.{key}") for key, value in pairs))


def fresh_state(run: Run, tx: optax.GradientTransformation, trained: Params) -> State:
    """Return the state before step 0, in the sharding of the step."""
    return jax.jit(_initial(run, tx), out_shardings=run_state_shardings(run, tx))(trained)


def _initial(run: Run, tx: optax.GradientTransformation) -> Callable[[Params], State]:
    """Return the function that makes the state before step 0 of what trains."""
    init = partial(init_state, tx, ema=run.cfg.optim.ema)
    return jax.vmap(init, out_axes=MEMBER_AXES) if run.sweep else init


def run_state_shardings(run: Run, tx: optax.GradientTransformation) -> State:
    """Return the sharding of each array of the state."""
    ema = run.cfg.optim.ema
    one = state_shardings(tx, run.trained_leaves, run.shardings, ema, run.mesh)
    return jax.tree.map(with_axis, one)._replace(step=one.step) if run.sweep else one


def abstract_state(run: Run, tx: optax.GradientTransformation | None = None) -> State:
    """Return shapes, dtypes and shardings of the state, for the restore of a checkpoint.

    Without `tx`, the run's own optimiser is used. The structure of its state depends on no
    duration, so no data are needed.
    """
    tx = make_chain(run, optax.constant_schedule(0.0)) if tx is None else tx
    dtype = runtime.resolve_dtype(run.cfg.param_dtype)
    lead = (run.copies,) if run.sweep else ()
    params: Any = {
        path: jax.ShapeDtypeStruct((*lead, *leaf.shape), leaf.held_in(dtype))
        for path, leaf in run.trained_leaves.items()
    }
    shapes = jax.eval_shape(_initial(run, tx), params)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shapes,
        run_state_shardings(run, tx),
    )


def model_params(frozen: Params, state: State) -> Params:
    """Return parameters for evaluation, sampling and export, averaged where averages exist."""
    return {**frozen, **(state.ema or average(state.opt, state.params) or state.params)}


def begin(
    run: Run,
    plan: Plan,
    saved: Checkpoints,
    start: int,
    data: Data,
    wrap: Callable[[Objective], Objective],
) -> tuple[Objective, State, Params, dict[str, Any]]:
    """Return what a run trains and `start_state`. The caches of the rows are filled before.

    The model and its moments are thus not in memory beside what fills the caches. `wrap` returns
    the objective to train, given the task's own.
    """
    loaded = encode(run, data, {}, start)
    objective = wrap(run.task.objective(run.opened, data.train))
    return objective, *start_state(run, plan, saved, start, objective.unread, loaded)


def start_state(
    run: Run,
    plan: Plan,
    saved: Checkpoints,
    start: int,
    unread: tuple[str, ...] = (),
    loaded: Mapping[str, jax.Array] = {},
) -> tuple[State, Params, dict[str, Any]]:
    """Return (state, frozen parameters, data position): new ones, or those of a checkpoint.

    `start` is the newest step. If its checkpoint is damaged, an earlier one is restored:
    `state.step` is the step from which to go on. unread: as in `Objective`: these parameters are
    not loaded. loaded: parameters of this step that are in memory already.
    """
    wanted = {path for path in run.leaves if not path.startswith(unread)}
    if start:
        wanted -= run.chosen

    def params() -> Params:
        return {path: x for path, x in loaded.items() if path in wanted} | load_params(
            run, wanted - loaded.keys()
        )

    if not start:
        every = params()
        frozen = {path: x for path, x in every.items() if path not in run.chosen}
        return fresh_state(run, plan.tx, {path: every[path] for path in run.chosen}), frozen, {}
    abstract = abstract_state(run, plan.tx)
    start, (state, position), damaged = saved.newest(lambda step: saved.restore(step, abstract))
    saved.set_aside(damaged, start)
    print(f"resumed from step {start}{_continued(run, plan, saved, start)}", flush=True)
    return state, params(), position


def best_params(run: Run, plan: Plan, workdir: Path, step: int, frozen: Params) -> Params | None:
    """Return the parameters of a kept checkpoint. If it is damaged, say so and return None."""
    saved = Checkpoints(workdir)
    try:
        state = saved.restore(step, abstract_state(run, plan.tx))[0]
        return model_params(frozen, state)
    except Damage as damage:
        print(f"the checkpoint of step {step} is damaged ({damage}): the last step is exported")
        return None
    finally:
        saved.close()


def _continued(run: Run, plan: Plan, saved: Checkpoints, start: int) -> str:
    """Return the change of `total` since a checkpoint, with the rule of the schedule, or ""."""
    former, now = saved.config(start)["total"], run.cfg.total
    if former == now:
        return ""
    rate = float(np.asarray(plan.schedule(start)))
    return (
        f"; total {former} -> {now}: the steps that remain have the learning rates of a run of"
        f" {plan.total} steps ({run.cfg.optim.schedule}: {rate:.3g} at step {start})"
    )


def _rates(run: Run) -> str:
    """Return the learning rate of a run, or the lowest and the highest of a sweep."""
    rates = run.cfg.optim.lr * run.sweep.rates if run.sweep else [run.cfg.optim.lr]
    return " to ".join(f"{rate:.6g}" for rate in dict.fromkeys((min(rates), max(rates))))


def summary(run: Run, plan: Plan, rows: Rows) -> str:
    """Return the first lines that a run prints, with the defaults chosen for this machine."""
    cfg = run.cfg
    micro = f" in {cfg.micro_batches} micro-batches" if cfg.micro_batches > 1 else ""
    lines = [
        f"model {cfg.model} ({cfg.init}), {run.opened.describe()}; {rows.describe()}",
        f"devices {runtime.describe_devices()}, mesh {dict(run.mesh.shape)};"
        f" compute {runtime.resolve_dtype(cfg.compute_dtype)}, parameters {cfg.param_dtype},"
        f" remat {cfg.remat}",
        f"{plan.total} steps of {cfg.batch_size} examples{micro}, {cfg.optim.name} at"
        f" {_rates(run)} ({cfg.optim.schedule})",
        describe_trained(run.leaves, run.chosen),
    ]
    if run.sweep:
        lines[-1] += ", of the largest member"
        lines.append(f"sweep of {run.copies} adapters: {', '.join(run.sweep.runs)}")
    return "\n".join(lines)
