"""A run: what train, evaluate, sample and export share, from a config to sharded parameters."""

import re
import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

from jaxft.core import config as configs
from jaxft.core import optim, runtime, sharding, step
from jaxft.core.checkpoint import Checkpoints
from jaxft.core.config import Arguments, Config
from jaxft.core.errors import UserError
from jaxft.core.params import ADDED, Leaf, Params, describe, flatten, select, trainable_table
from jaxft.core.step import State, StepSpec, init_state, state_shardings
from jaxft.runs.workdir import read_config_file
from jaxft.tasks import Task, task_class
from jaxft.tasks.options import OPTIONS
from jaxft.weights import transfer


class Run(NamedTuple):
    """One config made concrete: its task, mesh, parameters by name and what of them trains."""

    cfg: Config
    task: Task
    mesh: Mesh
    leaves: dict[str, Leaf]
    shardings: dict[str, NamedSharding]
    chosen: set[str]

    @property
    def trained_leaves(self) -> dict[str, Leaf]:
        return {path: leaf for path, leaf in self.leaves.items() if path in self.chosen}


class Plan(NamedTuple):
    """The optimiser of a run and how long it runs."""

    total: int
    schedule: optax.Schedule
    tx: optax.GradientTransformation


def open_run(config: Mapping[str, Any]) -> Run:
    """Read the config, find the devices, open the model's folder; no weights are loaded yet."""
    cls = task_class(str(config.get("task")))
    cfg = configs.read_config(config, cls.Options)
    if cfg.lora.base and cfg.task != "llm":
        raise UserError(f"lora.base={cfg.lora.base!r} is for task=llm, which goes on from adapters")
    runtime.start()
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    _check_batch(cfg, mesh)
    if cfg.export.kind not in (kinds := cls.EXPORT_KINDS):
        raise UserError(f"export.kind={cfg.export.kind!r} is not one of {', '.join(kinds)}")
    task: Task = cls(cfg)
    leaves = describe(task.template)
    adds = any(re.fullmatch(ADDED, path) for path in leaves)
    pattern = task.cfg.trainable or (ADDED if adds else ".*")
    shardings = sharding.shardings(leaves, mesh)
    aids = tuple(part.prefix for part in task.parts if part.aid)
    can_train = {path: leaf for path, leaf in leaves.items() if not path.startswith(aids)}
    return Run(task.cfg, task, mesh, leaves, shardings, select(pattern, can_train))


def make_plan(run: Run) -> Plan:
    """Durations in steps, the schedule and the Optax chain."""
    cfg, examples = run.cfg, run.task.n_examples()
    total = configs.steps(cfg.total, cfg.batch_size, examples, "total")
    warmup = configs.steps(cfg.optim.warmup, cfg.batch_size, examples, "optim.warmup")
    warmup = min(warmup, max(total - 1, 0))  # a short trial run of a config is not an error
    schedule = optim.schedule(cfg.optim.schedule, cfg.optim.lr, warmup, max(total, 1))
    o = cfg.optim
    tx = optim.make_optimizer(
        o.name,
        schedule,
        b1=o.b1,
        b2=o.b2,
        weight_decay=o.weight_decay,
        clip=o.clip,
        leaves=run.trained_leaves,
    )
    return Plan(total, schedule, tx)


def load_params(run: Run, wanted: set[str] | None = None) -> Params:
    """Parameters (all, or those `wanted`), imported or drawn, born sharded.

    Adapters and new tokens are fp32 whatever the base is.
    """
    dtype = runtime.resolve_dtype(run.cfg.param_dtype)
    wanted = set(run.leaves) if wanted is None else wanted
    params: Params = {}
    for part in run.task.parts:
        if part.aid or run.cfg.init == "pretrained":
            params |= transfer.load(part, run.leaves, run.shardings, dtype, wanted)
    missing = wanted - params.keys()
    if missing:
        params |= _draw(run, missing, dtype)
    initial = run.task.initial()
    for path in wanted & initial.keys():
        array = initial[path]
        place = partial(lambda host, index: host[index], array)
        params[path] = jax.make_array_from_callback(array.shape, run.shardings[path], place)
    return {path: params[path] for path in run.leaves if path in wanted}


def _draw(run: Run, paths: set[str], dtype: Any) -> Params:
    def build() -> Params:
        drawn = flatten(run.task.build(jax.random.key(run.cfg.seed)))
        kept = {path: drawn[path] for path in paths}
        return {p: x if re.fullmatch(ADDED, p) else x.astype(dtype) for p, x in kept.items()}

    return jax.jit(build, out_shardings={path: run.shardings[path] for path in paths})()


def fresh_state(run: Run, tx: optax.GradientTransformation, trained: Params) -> State:
    """The state before step 0, sharded as the step wants it."""
    shards = run_state_shardings(run, tx)
    init = jax.jit(partial(init_state, tx, ema=run.cfg.optim.ema), out_shardings=shards)
    return init(trained)


def run_state_shardings(run: Run, tx: optax.GradientTransformation) -> State:
    return state_shardings(tx, run.trained_leaves, run.shardings, run.cfg.optim.ema, run.mesh)


def abstract_state(run: Run, tx: optax.GradientTransformation) -> State:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored against."""
    dtype = runtime.resolve_dtype(run.cfg.param_dtype)
    params: Any = {
        path: jax.ShapeDtypeStruct(leaf.shape, np.float32 if re.fullmatch(ADDED, path) else dtype)
        for path, leaf in run.trained_leaves.items()
    }
    shapes = jax.eval_shape(partial(init_state, tx, ema=run.cfg.optim.ema), params)
    return jax.tree.map(
        lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place),
        shapes,
        run_state_shardings(run, tx),
    )


def best_params(state: State) -> Params:
    """What evaluation and export use: the average where there is one."""
    return state.ema or state.params


def model_params(frozen: Params, state: State) -> Params:
    """Every parameter of the model as evaluation, sampling and export see it."""
    return {**frozen, **best_params(state)}


def start_state(run: Run, plan: Plan, saved: Checkpoints, start: int) -> tuple[State, Params]:
    """(state, frozen parameters) before step `start`: fresh, or restored from that checkpoint."""
    if not start:
        params = load_params(run)
        frozen = {path: x for path, x in params.items() if path not in run.chosen}
        return fresh_state(run, plan.tx, {path: params[path] for path in run.chosen}), frozen
    state, _ = saved.restore(start, abstract_state(run, plan.tx))
    print(f"resumed from step {start}", flush=True)
    return state, load_params(run, set(run.leaves) - run.chosen)


def make_step(run: Run, plan: Plan) -> Any:
    """The jitted step of a run: `step(state, frozen, batch) -> state, metrics`."""
    cfg = run.cfg
    spec = StepSpec(
        cfg.micro_batches, runtime.resolve_dtype(cfg.compute_dtype), cfg.optim.ema, cfg.seed
    )
    shards = run_state_shardings(run, plan.tx)
    task = run.task
    return step.make_step(task.template, task.loss, plan.tx, plan.schedule, spec, shards, run.mesh)


class Compiled:
    """A jitted step compiled ahead of its first call, once for each shape of batch.

    What a task foretells of its shapes is compiled before step 0; a batch of another shape (short
    examples that need one more row) when it comes.
    """

    def __init__(self, step_fn: Any):
        self.step_fn = step_fn
        self.by_shape: dict[Any, Any] = {}

    def __call__(self, state: State, frozen: Params, batch: dict[str, jax.Array]) -> Any:
        self.prepare(state, frozen, batch)
        return self.by_shape[_shape(batch)](state, frozen, batch)

    def prepare(self, state: State, frozen: Params, batch: dict[str, jax.Array]) -> bool:
        """Compile for a new shape, and say how long it took and what memory it needs."""
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


class Periods(NamedTuple):
    """Every how many steps; 0 is never."""

    log: int
    eval: int
    save: int
    sample: int


def periods(run: Run) -> Periods:
    """`every.…` in steps."""
    every, size, examples = run.cfg.every, run.cfg.batch_size, run.task.n_examples()
    return Periods(
        *(
            configs.steps(getattr(every, name), size, examples, f"every.{name}")
            for name in Periods._fields
        )
    )


def summary(run: Run, plan: Plan) -> str:
    """What is about to happen, with the defaults that were chosen for this machine."""
    cfg = run.cfg
    micro = f" in {cfg.micro_batches} micro-batches" if cfg.micro_batches > 1 else ""
    lines = [
        f"model {cfg.model} ({cfg.init}), {run.task.describe()}",
        f"devices {runtime.describe_devices()}, mesh {dict(run.mesh.shape)};"
        f" compute {runtime.resolve_dtype(cfg.compute_dtype)}, parameters {cfg.param_dtype},"
        f" remat {runtime.resolve_remat(cfg.remat)}",
        f"{plan.total} steps of {cfg.batch_size} examples{micro}, {cfg.optim.name} at"
        f" {cfg.optim.lr:g} ({cfg.optim.schedule})",
        trainable_table(run.leaves, run.chosen),
    ]
    return "\n".join(lines)


def restore_run(
    workdir: Path, at: int | None, overrides: Iterable[tuple[str, str]] = ()
) -> tuple[Run, Params, int]:
    """(run, all parameters, step) of a run folder; the latest step unless one is named.

    Overrides change how the model is looked at (`data.eval`), never what it was trained on.
    """
    read_config_file(workdir)  # raises where this is no run folder
    runtime.join()
    saved = Checkpoints(workdir)
    at = saved.latest() if at is None else at
    if at is None:
        raise UserError(f"{workdir} has no checkpoint yet; train first")
    run = open_run(configs.resolve_config(saved.config(at), overrides, OPTIONS))
    with jax.set_mesh(run.mesh):
        state, _ = saved.restore(at, abstract_state(run, make_plan(run).tx))
        params = model_params(load_params(run, set(run.leaves) - run.chosen), state)
    saved.close()
    return run, params, at


def open_any(arguments: Arguments) -> tuple[Run, Params, int]:
    """(run, parameters, step) of `--workdir` at `--step`, or of `--config` before training."""
    options, overrides = arguments
    if "workdir" in options:
        return restore_run(Path(options["workdir"]), step_option(options), overrides)
    if "config" not in options:
        raise UserError("give --workdir=DIR (a run folder) or --config=FILE (an untrained model)")
    config = configs.load_config(options["config"], overrides, OPTIONS)
    runtime.join()
    run = open_run(config)
    with jax.set_mesh(run.mesh):
        return run, load_params(run), 0


def step_option(options: Mapping[str, str]) -> int | None:
    """`--step` as a number, None for the latest."""
    text = options.get("step")
    if text is not None and not text.isdigit():
        raise UserError(f"--step={text!r} must be the number of a checkpoint")
    return None if text is None else int(text)


def _check_batch(cfg: Config, mesh: Mesh) -> None:
    ways, micro = sharding.batch_ways(mesh), cfg.batch_size // cfg.micro_batches
    if micro % ways:
        raise UserError(
            f"batch_size={cfg.batch_size} / micro_batches={cfg.micro_batches} = {micro} rows does"
            f" not divide over data x fsdp = {ways} devices; change one of them"
        )
