"""Plan: `python -m jaxft.plan --config configs/llm.py --topology h200:8 [--config.KEY=…]`.

Compiles the step of a run for devices that need not be here, and prints memory, time and limits.
It reads the model's config, and neither weights nor data.
"""

import json
import os
import sys
from math import prod
from pathlib import Path
from typing import Any

from jaxft.core import config as configs
from jaxft.core import processes, runtime
from jaxft.core.cli.arguments import parse
from jaxft.core.errors import UserError
from jaxft.core.metrics import table
from jaxft.tasks import OPTIONS, check_task


def main(argv: list[str] | None = None) -> int:
    """Plan a run. Returns exit status 0, or 2 for a user's mistake."""
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    options, overrides = parse("plan", argv, OPTIONS)
    if "config" not in options:
        raise UserError("--config is missing: python -m jaxft.plan --config configs/llm.py")
    config = configs.load_config(options["config"], overrides, OPTIONS)
    check_task(config.get("task"))
    configs.read_config(config, OPTIONS[config["task"]])
    name = options.get("topology", "here")
    if name != "here":  # the devices of this machine are not used
        os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxft.runs.opening import open_run
    from jaxft.runs.planning import estimate, topology

    config, devices = {**config, "init": "random"}, topology.open_topology(name)
    with topology.traced_for(name):
        if "search" in options:
            plans = search(config, devices, _whole(options["search"], "--search"))
        else:
            run = open_run(config, devices)
            plans = [(run, estimate.estimate(run))]
    if not plans:
        raise UserError(
            f"no setting of mesh, micro_batches and remat fits {len(devices)} devices among those"
            " compiled; take more devices, a smaller batch_size or lora.rank=16, or raise --search"
        )
    print(describe(*plans[0]))
    if "json" in options:
        records = [record(*one) for one in plans]
        content = records if "search" in options else records[0]
        Path(options["json"]).write_text(json.dumps(content, indent=2) + "\n")


def _whole(text: str, name: str) -> int:
    if not text.isdigit() or not int(text):
        raise UserError(f"{name}={text!r} must be a whole number of steps to compile, such as 4")
    return int(text)


def search(config: dict[str, Any], devices: Any, most: int) -> list[tuple[Any, Any]]:
    """Compile up to `most` settings that may fit. Returns those that do, the fastest first.

    Prints a line for each. A setting is skipped if its state and gradients alone exceed the memory,
    or if it differs only by more replicas (mesh.data) from one that does not fit.
    """
    from jaxft.runs.opening import open_run
    from jaxft.runs.planning import estimate

    plans: list[tuple[Any, Any]] = []
    full = set()  # settings that do not fit, without data and fsdp; fewer replicas come first
    for setting in estimate.settings(len(devices), config["batch_size"]):
        rest = setting._replace(data=0, fsdp=0)
        if not most:
            break
        if rest in full:
            continue
        shown = ", ".join(f"{name}={value}" for name, value in setting._asdict().items())
        try:
            run, found = open_run(setting.applied(config), devices), None
        except UserError as error:
            print(f"{shown}: {error}", flush=True)
            continue
        limit = runtime.memory_limit(run.mesh)
        if not limit or estimate.held(run) <= limit:
            most -= 1
            found = _estimated(run, shown)
        if found is not None and found.memory.fits:
            plans.append((run, found))
        else:
            full.add(rest)
    return sorted(plans, key=lambda one: one[1].step)


def _estimated(run: Any, shown: str) -> Any:
    """Print a line on a setting. Returns its estimate, or None if the compiler refuses it."""
    from jaxft.runs.planning import estimate

    try:
        found = estimate.estimate(run)
    except UserError as error:
        print(f"{shown}: {error}", flush=True)
        return None
    print(f"{shown}: {1e3 * found.step:.1f} ms, {_gib(found.memory.total)} GiB", flush=True)
    return found


def describe(run: Any, found: Any) -> str:
    """Return the lines that a plan prints."""
    from jaxft.core.params import unpacked

    cfg, memory = run.cfg, found.memory
    lines = [
        f"model {cfg.model}, {run.opened.describe()}: {_count(unpacked(run.leaves))} parameters,"
        f" {_count(run.trained_leaves)} train",
        f"devices {runtime.describe_devices(run.mesh)}, mesh {dict(run.mesh.shape)}; batch_size"
        f" {cfg.batch_size}, micro_batches {cfg.micro_batches}, remat {found.remat}",
        "",
        table(
            [(name, _gib(getattr(memory, name))) for name in memory._fields[:4]]
            + [("total", _gib(memory.total)), ("limit", _gib(memory.limit))],
            ("memory of a device", "GiB"),
        ),
    ]
    if found.chip is not None:
        lines += ["", _times(found), "", _verdict(run, found)]
    if found.kernels:
        calls = ", ".join(f"{count} x {name}" for name, count in sorted(found.kernels.items()))
        lines += [f"kernels: {calls}"]
    return "\n".join(lines)


def _times(found: Any) -> str:
    rows = [
        (name, f"{1e3 * found.seconds[name]:.1f}", _gib(found.traffic[name]))
        for name in sorted(found.seconds, key=lambda name: -found.seconds[name])
    ]
    link = found.chip.link
    rows += [
        (f"{name} x {count:.0f}", f"{1e3 * moved / link:.1f}", _gib(moved))
        for name, (count, moved) in sorted(found.collectives.items())
    ]
    return table(rows, ("work of a step", "ms at least", "GiB moved"))


def _verdict(run: Any, found: Any) -> str:
    """Return whether the step fits, its best time, and what bounds it."""
    parts = []
    if not found.memory.fits:
        parts.append(f"does not fit: {_knob(run, found.remat)}")
    if found.communication > found.compute:
        limit = "communication"
    else:
        limit = max(found.seconds, key=lambda name: found.seconds[name])
    parts.append(
        f"at least {1e3 * found.step:.1f} ms a step, at most {found.mfu:.0%} MFU; most of it is"
        f" {limit}"
    )
    return "\n".join(parts)


def _knob(run: Any, remat: str) -> str:
    """Return the next setting to change for a step that needs less memory."""
    if remat != "full":
        return "set remat=full"
    if run.cfg.batch_size > run.cfg.micro_batches * run.mesh.size:
        return f"set micro_batches={2 * run.cfg.micro_batches}"
    return "take more devices, or lora.rank=16"


def record(run: Any, found: Any) -> dict[str, Any]:
    """Return the figures of a plan as JSON values. Sizes are bytes, times seconds."""
    kept = {name: getattr(found, name) for name in ("seconds", "traffic", "collectives", "kernels")}
    return {
        "model": run.cfg.model,
        "devices": runtime.describe_devices(run.mesh),
        "mesh": dict(run.mesh.shape),
        "batch_size": run.cfg.batch_size,
        "micro_batches": run.cfg.micro_batches,
        "remat": found.remat,
        "memory": {**found.memory._asdict(), "total": found.memory.total},
        "fits": found.memory.fits,
        "model_flops": found.model_flops,
        **kept,
        "step_seconds": found.step,
        "mfu": found.mfu,
    }


def _count(leaves: Any) -> str:
    count = sum(prod(leaf.shape) for leaf in leaves.values())
    return f"{count / 1e9:.2f} G" if count >= 1e9 else f"{count / 1e6:.1f} M"


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f}"


if __name__ == "__main__":
    sys.exit(main())
