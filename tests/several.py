"""Several processes of one run on this machine, as on several hosts, and what they left."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.flax import load_file  # NumPy alone has no bfloat16

from jaxft.core import processes
from tests.interrupted import timeless

ROOT = Path(__file__).resolve().parents[1]
# What its C++ prints, operand by operand: lines of several threads may be torn at any of them.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+|\s"
)


def free_port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start(command, count=1, place=0, port=None, devices=4, **changes):
    """Start `command` as one of `count` processes of `devices` devices in all.

    With a port, the process joins the others there, also where it is the only one. A process that
    does not join sums over its devices in another order than several processes do. All have the
    same number of threads (NPROC): XLA cuts the long sums of a product by that number.
    """
    env = {k: v for k, v in os.environ.items() if k not in processes.CLUSTER}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={devices // count}"
    env["NPROC"] = str(devices)
    if port is not None:
        values = (f"localhost:{port}", str(count), str(place))
        env |= dict(zip(processes.CLUSTER, values, strict=True))
    pipe = subprocess.PIPE
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, env=env | changes, stdout=pipe, stderr=pipe, text=True
    )


def ends(processes, timeout=1800):
    """(exit status, stdout, stderr) of each process; all are over after that."""
    try:
        shown = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(p.returncode, *texts) for p, texts in zip(processes, shown, strict=True)]


def told(stderr):
    """jaxft's own lines."""
    return [line for line in stderr.splitlines() if "jaxft: " in line]


def together(count, *arguments, devices=4, joined=True):
    """Stdout of each of `count` processes of one training, which all succeed."""
    command = ["-m", "jaxft.train", *map(str, arguments)]
    port = free_port() if joined else None
    found = ends([start(command, count, place, port, devices) for place in range(count)])
    assert [code for code, _, _ in found] == [0] * count, found
    assert not any("Traceback" in err for _, _, err in found), found
    return [out for _, out, _ in found]


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def losses(workdir):
    return [record["loss"] for record in records(workdir) if "loss" in record]


def exported(workdir):
    """Every tensor of every file of the export, by file and name."""
    files = sorted((workdir / "export").rglob("*.safetensors"))
    assert files
    return {
        (str(file.relative_to(workdir)), key): np.asarray(tensor)
        for file in files
        for key, tensor in load_file(file).items()
    }


def assert_same(one, two):
    """All records, evaluations included, and all exported weights are equal bit for bit."""
    assert timeless(one) == timeless(two)
    whole, other = exported(one), exported(two)
    assert whole.keys() == other.keys()
    for key, tensor in whole.items():
        assert tensor.tobytes() == other[key].tobytes(), key


def apart(one, two):
    """(of the losses, of the exported weights): the largest differences of two runs.

    Those of losses are relative, and those of a tensor are relative to its largest value.
    """
    pairs = zip(losses(one), losses(two), strict=True)
    loss = max(abs(a - b) / abs(a) for a, b in pairs)
    whole, other = exported(one), exported(two)
    assert whole.keys() == other.keys()
    weights = 0.0
    for key, tensor in whole.items():
        x, y = tensor.astype(np.float32), other[key].astype(np.float32)
        weights = max(weights, np.abs(x - y).max() / max(np.abs(x).max(), 1e-30))
    return loss, float(weights)
