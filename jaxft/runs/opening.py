"""Opening of a run: a config becomes a model on a mesh, before any data are read."""

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from jaxft.core import config as configs
from jaxft.core import optim, processes, runtime, sharding
from jaxft.core.cli.live import status
from jaxft.core.configs.schema import Config
from jaxft.core.configs.sweep import read_sweep
from jaxft.core.errors import UserError
from jaxft.core.guards.best import check_best
from jaxft.core.params import (
    CONSTANT_ROLE,
    SCALE_ROLE,
    Leaf,
    Params,
    describe,
    flatten,
    select,
    unpacked,
)
from jaxft.runs.sweep import Sweep, SweepPreview, make_sweep, stacked
from jaxft.tasks import OPTIONS, Data, Opened, Preview, Task, check_task, get_task
from jaxft.weights import transfer


class Run(NamedTuple):
    """An opened config: task, model, mesh, all parameters by path, and the paths that train.

    sweep: the members if several adapters train. Their arrays have a leading axis, the leaves not.
    """

    cfg: Config
    task: Task
    opened: Opened
    mesh: Mesh
    leaves: dict[str, Leaf]
    shardings: dict[str, NamedSharding]
    chosen: set[str]
    sweep: Sweep | None = None

    @property
    def trained_leaves(self) -> dict[str, Leaf]:
        return {path: leaf for path, leaf in self.leaves.items() if path in self.chosen}

    @property
    def copies(self) -> int:
        """The number of models that train at once."""
        return len(self.sweep.runs) if self.sweep else 1


def open_run(config: Mapping[str, Any], devices: Sequence[Any] | None = None) -> Run:
    """Read the config, find the devices and open the model's folder. Loads no weights.

    devices: those of a plan, by default all of this run. Raises UserError for a batch that the mesh
    does not divide, or an unknown export.kind.
    """
    members = read_sweep(str(config.get("sweep") or ""))
    if not members:
        return _open_one(config, devices)

    def changed(values: Mapping[str, Any]) -> Run:
        overrides = [(key, str(value)) for key, value in values.items()]
        return _open_one(configs.resolve_config(config, overrides, OPTIONS), devices)

    runs = {one.name: changed({**one.values, "sweep": ""}) for one in members}
    largest = members[0].values.keys() & {"optim.lr", "lora.rank"}
    run = changed({key: max(one.values[key] for one in members) for key in largest})
    return run._replace(sweep=make_sweep(run, members, runs))


def _open_one(config: Mapping[str, Any], devices: Sequence[Any] | None) -> Run:
    name = str(config.get("task"))
    check_task(name)
    cfg, task = configs.read_config(config, OPTIONS[name]), get_task(name)
    if devices is None:
        processes.start()
    mesh = sharding.make_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor, devices)
    _check_batch(cfg, mesh)
    optim.check_optimizer(cfg.optim, cfg.param_dtype)
    check_best(cfg.keep, cfg.stop, cfg.data.eval, cfg.every.eval)
    if cfg.export.kind not in (kinds := (*task.writers, "none")):
        raise UserError(f"export.kind={cfg.export.kind!r} is not one of {', '.join(kinds)}")
    status(f"opening {cfg.model}")
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # "auto" depends on the devices
        opened = task.open(cfg)
    leaves = describe(opened.template)
    places = sharding.shardings(leaves, mesh)
    auxiliary = tuple(part.prefix for part in opened.parts if part.aid)
    can_train = {
        path: leaf
        for path, leaf in unpacked(leaves).items()
        if not path.startswith(auxiliary) and leaf.role not in (CONSTANT_ROLE, SCALE_ROLE)
    }
    added = {path for path, leaf in can_train.items() if leaf.added}
    pattern = opened.cfg.trainable
    chosen = select(pattern, can_train) if pattern else added or set(can_train)
    if packed := sorted(chosen - leaves.keys()):
        raise UserError(
            f"trainable={pattern!r} matches {packed[0]}, which is quantised and thus frozen; leave"
            " trainable empty, or name other parameters"
        )
    optim.lr_factors(cfg.optim.lr_by, {path: leaves[path] for path in chosen})  # raises
    return Run(opened.cfg, task, opened, mesh, leaves, places, chosen)


def read_data(run: Run) -> Data:
    """Read the training rows, and the evaluation rows if the config names them."""
    cfg = run.cfg
    status(f"reading {cfg.data.train}")
    with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh):  # it divides packed rows
        train = run.task.read(run.opened, cfg.data.train, True)
        held_out = run.task.read(run.opened, cfg.data.eval, False) if cfg.data.eval else None
    return Data(train, held_out)


def encode(run: Run, data: Data, params: Params, step: int) -> Params:
    """Fill the caches of the rows, if the task has any. A run does so before it loads the model.

    params: those in memory before `step`, if any. Returns parameters that were loaded for it and
    that the model has before `step`.
    """

    def load(wanted: set[str]) -> Params:
        known = wanted & params.keys() - (run.chosen if step else set())
        # In the order of `params`, which is that of all processes: caches gather one by one.
        there = {path: x for path, x in params.items() if path in known}
        return there | (load_params(run, wanted - known) if wanted - known else {})

    status("encoding the data")
    sets = [rows for rows in (data.train, data.held_out) if rows is not None]
    made = run.task.encode(run.opened, run.chosen, sets, load)
    status("")
    return {path: x for path, x in made.items() if not step or path not in run.chosen}


def preview(run: Run, data: Data) -> Preview:
    """Return the preview of the model on rows that are encoded."""
    facts = data.facts if data.train is None else data.train.report()
    one = run.task.preview(run.opened, data._replace(facts=facts))
    return SweepPreview(one, run.sweep, run.chosen) if run.sweep else one


def completed(run: Run, params: Params, unread: tuple[str, ...] = ()) -> Params:
    """Return all parameters but the `unread`: those given, and frozen ones, loaded again.

    unread: beginnings of paths.
    """
    wanted = {path for path in run.leaves if not path.startswith(unread)}
    missing = wanted - params.keys()
    return {**params, **load_params(run, missing)} if missing else params


def exported(run: Run, params: Params) -> Params:
    """Return `params` with what an export reads beside them.

    Parts that were read from files are copied from there, unless they train or hold an adapter.
    """
    held = tuple(part.prefix for part in run.opened.parts if part.tensors is None)
    wanted = {path for path, leaf in run.leaves.items() if leaf.added or path.startswith(held)}
    missing = wanted - params.keys()
    return {**params, **load_params(run, missing)} if missing else params


def apart(run: Run, params: Params) -> Iterator[tuple[str, Run, Params]]:
    """Yield (name, run, parameters of its export) of each member of a sweep.

    Any other run is the only one, without a name.
    """
    if not run.sweep:
        yield "", run, params
        return
    for name, one in run.sweep.runs.items():
        yield name, one, exported(one, run.sweep.own(params, name))


def load_params(run: Run, wanted: set[str] | None = None) -> Params:
    """Import or initialise parameters (all, or those `wanted`), each in its final sharding.

    Adapters and new tokens are fp32, whatever the dtype of the base.
    """
    dtype = runtime.resolve_dtype(run.cfg.param_dtype)
    wanted = set(run.leaves) if wanted is None else wanted
    if run.sweep and wanted & run.chosen:
        return {**load_params(run, wanted - run.chosen), **_load_members(run, wanted & run.chosen)}
    params: Params = {}
    status(f"loading the weights of {run.cfg.model}")
    for part in run.opened.parts:
        if part.aid or run.cfg.init == "pretrained":
            params |= transfer.load(part, run.leaves, run.shardings, dtype, wanted)
    initial = run.opened.initial(wanted)
    if missing := wanted - params.keys() - initial.keys():
        params |= _draw(run, missing, dtype)
    for path in sorted(wanted & initial.keys()):
        array = initial[path]
        if not np.isfinite(array).all():
            raise UserError(
                f"{path} of the adapter in {run.cfg.lora.from_ or run.cfg.model} holds numbers that"
                " are NaN or infinite; give another adapter"
            )
        place = partial(lambda host, index: host[index], array)
        params[path] = jax.make_array_from_callback(array.shape, run.shardings[path], place)
    status("")
    return {path: params[path] for path in run.leaves if path in wanted}


def _load_members(run: Run, wanted: set[str]) -> Params:
    """Return the adapters of all members [A, ...] before step 0.

    Members that differ in the learning rate alone begin at the same one.
    """
    assert run.sweep
    alike = {name: (one.cfg.seed, one.cfg.lora) for name, one in run.sweep.runs.items()}
    first = {key: name for name, key in alike.items()}
    made = {key: load_params(run.sweep.runs[name], wanted) for key, name in first.items()}
    return stacked([made[key] for key in alike.values()], run.leaves, run.shardings)


def _draw(run: Run, paths: set[str], dtype: Any) -> Params:
    def build() -> Params:
        drawn = flatten(run.opened.build(jax.random.key(run.cfg.seed)))
        kept = {path: drawn[path] for path in sorted(paths)}  # one program on every host
        return {p: x.astype(run.leaves[p].held_in(dtype)) for p, x in kept.items()}

    return jax.jit(build, out_shardings={path: run.shardings[path] for path in paths})()


def _check_batch(cfg: Config, mesh: Mesh) -> None:
    ways, micro = sharding.batch_ways(mesh), cfg.batch_size // cfg.micro_batches
    if micro % ways:
        raise UserError(
            f"batch_size={cfg.batch_size} / micro_batches={cfg.micro_batches} = {micro} rows does"
            f" not divide over data x fsdp = {ways} devices; change one of them"
        )
