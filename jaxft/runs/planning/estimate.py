"""Estimate of a training step from its compiled program: memory, time and what bounds it."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.core import runtime
from jaxft.core.runtime import Chip, find_chip
from jaxft.core.sharding import batch_sharding
from jaxft.runs.compiling import ACCELERATOR_REMATS, Compiled, make_steps
from jaxft.runs.opening import Run
from jaxft.runs.planning.hlo import Cost, costs
from jaxft.runs.state import abstract_state, make_plan

# Shares of the published peaks that good kernels reach.
PRODUCT_SHARE, MEMORY_SHARE = 0.75, 0.85
SCOPES = ("vocabulary_loss", "attention", "optimizer")  # jax.named_scope of kernels and step


class DeviceMemory(NamedTuple):
    """Bytes of one device.

    parameters: trained ones, and frozen ones that a step reads. optimizer: moments and averages.
    batch: its rows. temporaries: gradients, saved activations and scratch space. limit: 0 where it
    is not known.
    """

    parameters: int
    optimizer: int
    batch: int
    temporaries: int
    limit: int

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.batch + self.temporaries

    @property
    def fits(self) -> bool:
        return not self.limit or self.total <= self.limit


class Estimate(NamedTuple):
    """Figures of one step on one device, and the published figures of that device.

    model_flops: FLOPs of the model, without recomputation. seconds, traffic: by kind of work.
    collectives: number and bytes by kind. kernels: number of calls of each custom kernel.
    """

    memory: DeviceMemory
    remat: str
    chip: Chip | None
    model_flops: float
    seconds: Mapping[str, float]
    traffic: Mapping[str, float]
    collectives: Mapping[str, tuple[float, float]]
    kernels: Mapping[str, int]

    @property
    def compute(self) -> float:
        """Seconds of a step without communication: each instruction at its own bound, in turn."""
        return sum(self.seconds.values())

    @property
    def communication(self) -> float:
        """Seconds that the collectives take if nothing else runs."""
        moved = sum(size for _, size in self.collectives.values())
        return moved / self.chip.link if self.chip else 0.0

    @property
    def step(self) -> float:
        """Seconds of a step, if communication overlaps with work."""
        return max(self.compute, self.communication)

    @property
    def mfu(self) -> float:
        """Upper bound on the share of the peak that the model's own FLOPs can reach."""
        return self.model_flops / self.chip.flops / self.step if self.chip and self.step else 0.0


def estimate(run: Run) -> Estimate:
    """Compile the step of a run for its mesh, and return its figures. Reads no data.

    Raises: UserError for a step that the compiler refuses because it does not fit.
    """
    rows = run.task.plan(run.opened)
    plan = make_plan(run, len(rows))
    state, frozen = abstract_state(run, plan.tx), _frozen(run, rows.unread)
    place = batch_sharding(run.mesh)
    batch = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
        for name, x in rows.shapes.items()
    }
    with jax.set_mesh(run.mesh):
        objective = run.task.objective(run.opened, rows)
        limit = runtime.memory_limit(run.mesh)
        step = Compiled(make_steps(run, plan, objective), limit)
        (compiled,) = step.prepare(state, frozen, batch)
    chip = find_chip(runtime.device(run.mesh).kind)
    memory = DeviceMemory(
        device_bytes((state.params, frozen)),
        device_bytes((state.opt, state.ema)),
        device_bytes(batch),
        compiled.memory_analysis().temp_size_in_bytes,
        limit,
    )
    host = {name: np.broadcast_to(np.ones((), x.dtype), x.shape) for name, x in batch.items()}
    units = run.copies * objective.units(host) / run.mesh.size
    flops = objective.flops(run.trained_leaves) * units
    return Estimate(memory, step.remat, chip, flops, *counted(costs(compiled.as_text()), chip))


def _frozen(run: Run, unread: tuple[str, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    """Return the frozen parameters that a step reads."""
    dtype = runtime.resolve_dtype(run.cfg.param_dtype)
    return {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.held_in(dtype), sharding=run.shardings[path])
        for path, leaf in run.leaves.items()
        if path not in run.chosen and not path.startswith(unread)
    }


def device_bytes(tree: Any) -> int:
    """Return the bytes on one device of a tree of shapes with shardings."""
    return sum(
        prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def counted(
    every: Sequence[Cost], chip: Chip | None
) -> tuple[dict[str, float], dict[str, float], dict[str, tuple[float, float]], dict[str, int]]:
    """Return seconds and traffic by kind, collectives by kind, and calls of custom kernels."""
    seconds: dict[str, float] = defaultdict(float)
    traffic: dict[str, float] = defaultdict(float)
    collectives: dict[str, tuple[float, float]] = {}
    kernels: dict[str, int] = defaultdict(int)
    for cost in every:
        if cost.moved:
            name = cost.op.opcode.removesuffix("-start")
            count, moved = collectives.get(name, (0.0, 0.0))
            collectives[name] = count + cost.times, moved + cost.times * cost.moved
            continue
        kind = work_kind(cost)
        traffic[kind] += cost.times * cost.traffic
        if chip:
            seconds[kind] += cost.times * bound(cost, chip)
        if cost.op.target:
            kernels[cost.op.target] += round(cost.times)
    return dict(seconds), dict(traffic), collectives, dict(kernels)


def bound(cost: Cost, chip: Chip) -> float:
    """Return the least seconds of one instruction: for its FLOPs or for its bytes."""
    return max(
        cost.flops / (PRODUCT_SHARE * chip.flops), cost.traffic / (MEMORY_SHARE * chip.bandwidth)
    )


def work_kind(cost: Cost) -> str:
    """Return the kind of work: a named scope of the step, products, or elementwise."""
    for scope in SCOPES:
        if scope in cost.op.scope:
            return scope
    return "products" if cost.flops else "elementwise"


# ---- search ------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """Values that a search varies: mesh shape, micro-batches and remat policy."""

    data: int
    fsdp: int
    tensor: int
    micro_batches: int
    remat: str

    def applied(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the config with this setting."""
        mesh = {"data": self.data, "fsdp": self.fsdp, "tensor": self.tensor}
        return {**config, "mesh": mesh, "micro_batches": self.micro_batches, "remat": self.remat}


def settings(devices: int, batch_size: int) -> list[Setting]:
    """Return settings for a number of devices, those with the least expected work first.

    Tensor parallelism communicates in every layer, micro-batches gather the weights once each, and
    remat=full computes a third of the products again. Replicas save a part of the gathers and hold
    the state more often.
    """
    found = [
        Setting(data, devices // (data * tensor), tensor, micro, remat)
        for tensor in (1, 2, 4, 8)
        for data in (1, 2, 4, 8)
        for micro in (1, 2, 4, 8, 16)
        for remat in ACCELERATOR_REMATS
        if devices % (data * tensor) == 0
        and batch_size % micro == 0
        and batch_size // micro % (devices // tensor) == 0
    ]
    return sorted(found, key=lambda one: (one.tensor, one.remat == "full", one.micro_batches))


def held(run: Run) -> int:
    """Return the bytes of a device that any setting of this mesh needs: state and gradients."""
    state, frozen = abstract_state(run), _frozen(run, run.task.plan(run.opened).unread)
    return device_bytes((state, frozen, state.params))
