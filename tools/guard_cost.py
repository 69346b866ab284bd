"""Measure what the guards of a run cost: at a save, in a step, and at a restore.

python tools/guard_cost.py    # trains all of the 135 M-parameter demo for 12 steps on this machine
"""

import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxft import train
from jaxft.core import processes
from jaxft.core.config import load_config
from jaxft.runs import checkpoint

STEPS, PAIRS = 12, 6
CONFIG = Path(__file__).resolve().parent.parent / "configs" / "llm.py"
CHANGES = {
    "lora.rank": "0",
    "total": f"{STEPS}_steps",
    "every.save": "3_steps",
    "every.log": "1_steps",
    "export.kind": "none",
    "data.eval": "",
}


def main() -> int:
    spent: dict[str, list[float]] = {}
    for name in ("fingerprints", "not_finite"):
        setattr(checkpoint, name, partial(_timed, getattr(checkpoint, name), spent))
    starts, arm = [], train.Watchdog.arm
    train.Watchdog.arm = lambda self, step: (starts.append(time.perf_counter()), arm(self, step))[1]
    with tempfile.TemporaryDirectory() as folder:
        changes = [f"--config.{key}={value}" for key, value in CHANGES.items()]
        if code := train.main(["--config", str(CONFIG), "--workdir", folder, *changes]):
            return code
        pairs = _restores(Path(folder))
    # Two of three steps have no save between them.
    step = statistics.median(after - before for before, after in itertools.pairwise(starts))
    save = sum(statistics.median(times[1:]) for times in spent.values())  # the first compiles
    every = int(load_config(str(CONFIG))["every"]["save"].split("_")[0])
    share = save / (every * step + save)
    print(f"a step {step:.2f} s; fingerprints and the search for NaN {save:.2f} s a save")
    print(f"with a save every {every} steps, as in {CONFIG.name}: {100 * share:.2f} % of the time")
    with_, without = (statistics.median(times) for times in zip(*pairs, strict=True))
    ratio = statistics.median(a / b for a, b in pairs)
    print(f"restore {with_:.2f} s with the comparison, {without:.2f} s without: {ratio:.2f} times")
    return 0


def _timed(measured: Callable[[Any], Any], spent: dict[str, list[float]], tree: Any) -> Any:
    jax.block_until_ready(tree)  # the step before is no cost of a save
    start = time.perf_counter()
    made = measured(tree)
    spent.setdefault(measured.__name__, []).append(time.perf_counter() - start)
    return made


def _restores(workdir: Path) -> list[list[float]]:
    """Return the seconds of restores with and without the comparison, each in a new process."""
    pairs = []
    for _ in range(PAIRS):
        pair = []
        for compared in ("yes", ""):
            command = [sys.executable, __file__, str(workdir), compared]
            pair.append(float(subprocess.check_output(command, text=True).splitlines()[-1]))
        pairs.append(pair)
    return pairs


def _restore(workdir: Path, compared: bool) -> None:
    """Print the seconds of a restore of the newest step, in a process as that of a command."""
    processes.start()
    saved = checkpoint.Checkpoints(workdir)
    step = saved.latest()
    assert step is not None
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    found = ocp.StandardCheckpointer().metadata(saved.folder / str(step) / "state")
    assert found.item_metadata is not None
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
        found.item_metadata.tree,
    )
    if not compared:
        checkpoint.fingerprints = lambda state: {}
    start = time.perf_counter()
    jax.block_until_ready(saved.restore(step, abstract)[0])
    print(time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(_restore(Path(sys.argv[1]), bool(sys.argv[2])) if sys.argv[1:] else main())
