"""What the benchmarks share: contestants in interleaved rounds, watched commands, the report."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs"
PACKAGES = ("jax", "flax", "torch", "transformers", "diffusers", "peft", "trl")
STILL = 1e-12  # a learning rate that moves no fp32 weight: every step is the same work
FIGURES = ("median_s", "min_s", "cpu_s")
STILL_OPTIM = {
    "optim.lr": STILL,
    "optim.schedule": "constant",
    "optim.warmup": "0_steps",
    "optim.clip": 0.0,
}


class Contestant(NamedTuple):
    """One way to do a training step; `step` returns the loss when all of it is done."""

    name: str
    step: Callable[[], float]
    compile_s: float = 0.0  # ahead of the first step; what the first call adds comes on top


# ---- one step, jaxft's and torch's --------------------------------------------------------


def start(gpu: bool) -> None:
    """Set up this process before jax and torch are imported; may start it anew (huge pages)."""
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compile times are to be real ones
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if gpu:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxft.core import processes

    processes.restart_with_huge_pages()


def open_run(name: str, changes: Mapping[str, Any]) -> Any:
    """The run of configs/NAME.py with these keys; no step of it moves a weight."""
    from jaxft.core.config import load_config
    from jaxft.tasks import OPTIONS
    from tests import whole as runs

    still = {**changes, "data.eval": "", "export.kind": "none", **STILL_OPTIM}
    given = [(key, str(value)) for key, value in still.items()]
    return runs.open_run(load_config(str(ROOT / "configs" / f"{name}.py"), given, OPTIONS))


def jaxft_contestants(
    run: Any, batches: Mapping[str, dict], params: dict | None = None
) -> list[Contestant]:
    """The step that `jaxft.train` compiles, on each of these fixed batches.

    They share weights, but each counts its own steps, since what is drawn depends on the count.
    """
    import jax
    import jax.numpy as jnp

    from jaxft.core.sharding import place_batch
    from tests import whole as runs

    plan = runs.make_plan(run)
    with jax.set_mesh(run.mesh):
        params = params or runs.load_params(run)
        frozen = {path: x for path, x in params.items() if path not in run.chosen}
        state = runs.fresh_state(run, plan.tx, {path: params[path] for path in run.chosen})
        step_fn = runs.make_step(run, plan)

        def contestant(name: str, batch: dict) -> Contestant:
            placed = place_batch(batch, run.mesh)
            began = time.perf_counter()
            compiled = step_fn.lower(state, frozen, placed).compile()
            compile_s, count = time.perf_counter() - began, jnp.copy(state.step)

            def step() -> float:
                nonlocal state, count
                state, sums = compiled(state._replace(step=count), frozen, placed)
                count = state.step
                jax.block_until_ready((state, sums))
                return float(sums["loss"])

            return Contestant(name, step, compile_s)

        return [contestant(name, batch) for name, batch in batches.items()]


def torch_contestant(name: str, loss_of: Callable, optimizer: Any, gpu: bool) -> Contestant:
    """The plain loop's step: loss, gradients, update."""
    import torch

    def step() -> float:
        loss = loss_of()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if gpu:
            torch.cuda.synchronize()
        return loss.item()

    return Contestant(name, step)


def torch_contestants(
    loss_of: Callable, inputs: tuple, optimizer: Any, gpu: bool, compiled: bool = True
) -> list[Contestant]:
    """The plain loop's step as it is and, if `compiled`, through torch.compile."""
    import torch

    calls = {"torch eager": loss_of}
    if compiled:
        calls["torch compile"] = torch.compile(loss_of)
    return [
        torch_contestant(name, partial(call, *inputs), optimizer, gpu)
        for name, call in calls.items()
    ]


def torch_adamw(model: Any) -> Any:
    """PyTorch's fastest AdamW, on what of the model trains."""
    import torch

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(trained, lr=STILL, weight_decay=0.0, fused=True)


def compare(
    ours: list[Contestant],
    peers: list[Contestant],
    rounds: int,
    tolerance: float,
    what: str = "loss",
) -> dict[str, Any]:
    """Figures of every contestant's steps, and what its first step returned; these must agree.

    The ratios are the best peer's figures over those of our first: above 1 ours is faster.
    """
    figures, losses = {}, {}
    for one in (*ours, *peers):
        began = time.perf_counter()
        losses[one.name] = one.step()
        figures[one.name] = {"first_s": one.compile_s + time.perf_counter() - began}
        print(f"{one.name}: first {what} {losses[one.name]:.7f}", flush=True)
    low, high = min(losses.values()), max(losses.values())
    if not high - low <= tolerance * abs(low):
        raise SystemExit(f"not the same work: {what} of the first step is {losses}")
    for name, rows in _time_rounds([*ours, *peers], rounds).items():
        walls, cpus = ([row[i] for row in rows] for i in (0, 1))
        figures[name] |= {
            "median_s": statistics.median(walls),
            "min_s": min(walls),
            "cpu_s": statistics.median(cpus),
        }
        figures[name]["compile_s"] = max(figures[name].pop("first_s") - min(walls), 0.0)
    best = {key: min(figures[peer.name][key] for peer in peers) for key in FIGURES}
    ratios = {f"ratio_{key}": best[key] / figures[ours[0].name][key] for key in FIGURES}
    return {"steps": figures, "first_losses": losses, **ratios}


def _time_rounds(contestants: list[Contestant], rounds: int) -> dict[str, list[tuple]]:
    """(wall, CPU) seconds of every step; A B C A B C …, so that a noisy machine hits all alike.

    Before each comes one that is not timed, as a training step follows one of its own kind: caches
    and freed pages are not the last contestant's.
    """
    times: dict[str, list[tuple]] = {one.name: [] for one in contestants}
    for _ in range(rounds):
        for one in contestants:
            one.step()
            wall, cpu = time.perf_counter(), time.process_time()
            one.step()
            times[one.name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


# ---- a whole command ----------------------------------------------------------------------


def watch(command: list[str]) -> tuple[dict[str, float], str]:
    """Run a command that prints "step K/N"; its cost a step between two such lines, its peak
    memory, and its last line. CPU time is read from /proc as the lines come (Linux)."""
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    marks: list[tuple[int, float, float]] = []
    last, began = "", time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=ROOT
        )
        assert child.stdout
        for line in child.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            if found := re.search(r"\bstep (\d+)/\d+", line):
                marks.append((int(found[1]), time.perf_counter(), _cpu_seconds(child.pid)))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    (first, *_), (end, *_) = marks[0], marks[-1]
    wall, cpu = ((marks[-1][i] - marks[0][i]) / max(end - first, 1) for i in (1, 2))
    return {
        "cpu_s_per_step": cpu,
        "wall_s_per_step": wall,
        "peak_rss_gb": usage.ru_maxrss * 1024 / 1e9,
        "total_s": time.perf_counter() - began,
        "total_cpu_s": usage.ru_utime + usage.ru_stime,
    }, last


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# ---- what all of them write ---------------------------------------------------------------


def steps_table(results: Mapping[str, dict[str, Any]]) -> list[str]:
    """Rows for every contestant of every comparison, and its ratio."""
    lines = [
        "| | wall s (median) | wall s (min) | CPU-s | compile s |",
        "|---|---|---|---|---|",
    ]
    for kind, result in results.items():
        for name, row in result["steps"].items():
            cells = (row[key] for key in (*FIGURES, "compile_s"))
            lines.append(f"| {kind}, {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
        found = (result[f"ratio_{key}"] for key in FIGURES)
        lines.append(f"| **{kind}, ratio** | {' | '.join(f'{one:.2f}' for one in found)} | |")
    return lines


def machine() -> dict[str, Any]:
    """The machine and the versions; nothing that names the machine or a place on it."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [name for name in gpus if name],
        "python": platform.python_version(),
        "glibc_tunables": "glibc.malloc.hugetlb=1 (huge pages) on both sides",
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
    }


def machine_line(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    where = ", ".join([f"{about['cores']} cores of {about['cpu']}", *about["gpus"]])
    return f"{where}; Python {about['python']}, {versions}; {about['glibc_tunables']}."


def report(name: str, record: dict[str, Any], text: str, out: Path | None) -> None:
    """Save the figures and their section of docs/performance.md; with `out`, only the figures."""
    file = out or DOCS / "performance" / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(f"\n{text}\n\nwritten to {file}")
    if out is None:
        _write_section(name, text)


def _write_section(name: str, text: str) -> None:
    """Put a table between its markers in docs/performance.md, at the end if it has none yet."""
    file = DOCS / "performance.md"
    page = file.read_text() if file.exists() else "# Performance\n"
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    block = f"{start}\n{text}\n{end}"
    if start in page:
        head, _, rest = page.partition(start)
        page = head + block + rest.partition(end)[2]
    else:
        page = f"{page.rstrip()}\n\n## {name}\n\n{block}\n"
    file.write_text(page)
    print(f"and to {file.name}")
