"""A sweep: several adapters over one frozen base, whose arrays have a leading axis of members A.

Only what trains has this axis: parameters, moments and averages. The members share the base, the
batches and the noise of the run, and each has its own rate, rank, alpha and first adapter. Smaller
ranks are filled up with zeros, which have no gradient and stay zero.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxft.core.configs.sweep import Member
from jaxft.core.errors import UserError
from jaxft.core.guards.stopping import STOP_FLAG
from jaxft.core.metrics import OF_MEMBERS, WORST_MEMBER
from jaxft.core.params import ADAPTER_ROLE, SCALE_ROLE, Leaf, Params, named
from jaxft.core.step import Batch, Metrics, State
from jaxft.tasks import Look, Preview, Report, Request, Unread
from jaxft.weights.adapters import ranks

BY_MATRIX = ("adafactor", "adamw_8bit", "muon")  # whose steps depend on the size of an array
MEMBER_AXES = State._make((None, 0, 0, 0))  # of the members in a state, for jax.vmap


class Sweep(NamedTuple):
    """The members of a sweep by name, each opened as a run of its own.

    rates: learning rates [A], as factors of the sweep's. scales: alpha / rank of each adapter
    [A, ...], by the path of the parameter that holds it.
    """

    members: tuple[Member, ...]
    runs: Mapping[str, Any]
    rates: np.ndarray
    scales: Mapping[str, np.ndarray]

    def one(self, params: Params, chosen: set[str], place: int) -> Params:
        """Return the parameters of a member, filled up to the rank of the sweep."""
        own = {path: x[place] for path, x in params.items() if path in chosen}
        return {**params, **own, **{path: jnp.asarray(x[place]) for path, x in self.scales.items()}}

    def own(self, params: Params, name: str) -> Params:
        """Return what trains of a member, in the shapes of its own run."""
        run, place = self.runs[name], list(self.runs).index(name)
        windows = {path: tuple(map(slice, run.leaves[path].shape)) for path in run.chosen}
        return {path: params[path][place][window] for path, window in windows.items()}


def make_sweep(run: Any, members: tuple[Member, ...], runs: Mapping[str, Any]) -> Sweep:
    """Return the sweep of a run that was opened with the largest rank and rate of its members.

    Raises: UserError for a config that trains more than adapters, or exports whole models.
    """
    text, writer = run.cfg.own["sweep"], run.task.writers.get(run.cfg.export.kind)
    if not any(leaf.role == ADAPTER_ROLE for leaf in run.leaves.values()):
        raise UserError(f"sweep={text!r} trains adapters, and needs lora.rank > 0; set it")
    if more := sorted(path for path in run.chosen if run.leaves[path].role != ADAPTER_ROLE):
        raise UserError(
            f"sweep={text!r} trains adapters alone, and not {named(more)}; leave trainable and"
            " lora.tokens empty"
        )
    if writer and writer.made_of != ADAPTER_ROLE:
        raise UserError(
            f"sweep={text!r} with export.kind={run.cfg.export.kind!r} would write the whole model"
            f" {len(runs)} times; use export.kind=adapter"
        )
    if run.cfg.optim.name in BY_MATRIX and "lora.rank" in members[0].values:
        raise UserError(
            f"sweep={text!r}: optim.name={run.cfg.optim.name} would count the zeros that fill up"
            " smaller ranks; sweep other keys, or take optim.name=adamw"
        )
    first = min(run.chosen)
    if members[0].values.keys() - {"optim.lr"} and first in run.opened.initial({first}):
        raise UserError(
            f"sweep={text!r}, but training continues an adapter, which has its own rank, alpha and"
            " numbers; sweep optim.lr alone"
        )
    scales = {}
    for path, leaf in run.leaves.items():
        if leaf.role == SCALE_ROLE:
            linear, layers = path.rpartition(".")[0], leaf.shape[0] if leaf.shape else 0
            found = [ranks.scales(one.cfg.lora, linear, layers) for one in runs.values()]
            scales[path] = np.array(found, np.float32).reshape(len(runs), *leaf.shape)
    rates = [one.cfg.optim.lr / (run.cfg.optim.lr or 1.0) for one in runs.values()]
    return Sweep(members, runs, np.array(rates, np.float32), scales)


def stacked(
    found: Sequence[Params], leaves: Mapping[str, Leaf], places: Mapping[str, NamedSharding]
) -> Params:
    """Return the parameters of all members [A, ...], each filled up with zeros to its leaf."""

    def widened(path: str, x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, n - m) for n, m in zip(leaves[path].shape, x.shape, strict=True)])

    def stack(found: Sequence[Params]) -> Params:
        return {path: jnp.stack([widened(path, one[path]) for one in found]) for path in found[0]}

    return jax.jit(stack, out_shardings={path: with_axis(places[path]) for path in found[0]})(found)


def with_axis(place: NamedSharding) -> NamedSharding:
    """Return the sharding of an array with a leading axis of members, whole on every device."""
    return NamedSharding(place.mesh, PartitionSpec(None, *place.spec))


def over_members(
    sweep: Sweep, update_at: Callable[[jax.Array], Callable[[State, Params, Batch], Any]]
) -> Callable[[State, Params, Batch], tuple[State, Metrics]]:
    """Return the update of all members. `update_at(rate)` returns that of one.

    A member whose step is not finite stays as it was, and the others go on.
    """

    def update(state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        def one(state: State, rate: jax.Array, scales: Params) -> tuple[State, Metrics]:
            return update_at(rate)(state, {**frozen, **scales}, batch)

        each = jax.vmap(one, in_axes=(MEMBER_AXES, 0, 0), out_axes=(MEMBER_AXES, 0))
        scales = {path: jnp.asarray(x) for path, x in sweep.scales.items()}
        after, report = each(state, jnp.asarray(sweep.rates), scales)
        return after, _gathered(report, tuple(sweep.runs))

    return update


def _gathered(report: Metrics, names: tuple[str, ...]) -> Metrics:
    """Return the metrics of the member with the lowest loss, and the losses of all.

    report: metrics of all members, [A] each.
    """
    losses = report["loss"]  # [A]
    best = jnp.argmin(jnp.where(jnp.isfinite(losses), losses, jnp.inf))
    made = {name: x[best] for name, x in report.items()}
    made[WORST_MEMBER] = jnp.max(losses)
    flag = {STOP_FLAG: made.pop(STOP_FLAG)} if STOP_FLAG in made else {}
    return {**made, **{f"loss/{name}": losses[i] for i, name in enumerate(names)}, **flag}


class SweepPreview:
    """Evaluation and samples of each member. Implements `jaxft.tasks.Preview`.

    `params` have the axis of members where they train.
    """

    def __init__(self, preview: Preview, sweep: Sweep, chosen: set[str]):
        self.preview, self.sweep, self.chosen = preview, sweep, chosen

    @property
    def unread(self) -> Unread:
        return self.preview.unread

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Return the metrics of the member with the lowest loss, and a table, this one first."""
        found = self._each(params, partial(self.preview.evaluate, mesh=mesh))
        if not all(report.metrics for report in found.values()):
            return Report({})
        losses = {name: report.metrics["loss"] for name, report in found.items()}
        order = sorted(losses, key=lambda name: (not losses[name] < np.inf, losses[name]))
        metrics = {**found[order[0]].metrics, WORST_MEMBER: losses[order[-1]]}
        for name, report in found.items():
            own = {f"{key}/{name}": value for key, value in report.metrics.items()}
            metrics |= {key: x for key, x in own.items() if key.startswith(OF_MEMBERS)}
        values = {member.name: member.values for member in self.sweep.members}
        keys = tuple(values[order[0]])
        rows = [
            (name, *(f"{values[name][key]:g}" for key in keys), f"{losses[name]:.4g}")
            for name in order
        ]
        return Report(metrics, ("member", *keys, "loss"), tuple(rows))

    def sample(self, params: Params) -> Look:
        """Return the sample of the first prompt by each member."""
        found = self._each(params, self.preview.sample)
        first = next(iter(found.values()))
        if not first.rows:
            return first
        rows = [(*look.rows[0][:-1], name, look.rows[0][-1]) for name, look in found.items()]
        return Look(headers=(*first.headers[:-1], "member", first.headers[-1]), rows=tuple(rows))

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        """Return a sample for each prompt: the texts of all members, below their names."""
        call = partial(self.preview.complete, prompts=prompts, request=request)
        found = self._each(params, call)
        texts = zip(*(looks for looks in found.values()), strict=True)
        return [
            Look("\n".join(f"[{name}] {one.text}" for name, one in zip(found, some, strict=True)))
            for some in texts
        ]

    def _each(self, params: Params, call: Callable[[Params], Any]) -> dict[str, Any]:
        names = enumerate(self.sweep.runs)
        return {name: call(self.sweep.one(params, self.chosen, i)) for i, name in names}
