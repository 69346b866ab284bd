"""One run in two processes, as on two hosts: the numbers and the folder that one process makes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from interrupted import timeless
from safetensors.numpy import load_file

from jaxft.core import runtime

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]
DEVICES = 4  # of all processes together
# What its C++ prints, operand by operand: lines of several threads may be torn at any of them.
GLOO = re.compile(
    r"\[Gloo\] Rank | is connected to | peer ranks\. "
    r"|Expected number of connected peer ranks is : |\d+|\s"
)


def start(count, place, port, module, arguments):
    env = {k: v for k, v in os.environ.items() if k not in runtime.CLUSTER}
    env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES // count}"
    if count > 1:
        values = (f"localhost:{port}", str(count), str(place))
        env |= dict(zip(runtime.CLUSTER, values, strict=True))
    command = [sys.executable, "-m", module, *arguments]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=pipe, stderr=pipe, text=True)


def together(count, module, *arguments):
    """(exit code, stdout, jaxft's lines on stderr) of each of `count` processes of one run."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    processes = [start(count, place, port, module, arguments) for place in range(count)]
    try:
        ends = [process.communicate(timeout=600) for process in processes]
    finally:
        for process in processes:
            process.kill()
    errors = [[line for line in err.splitlines() if "jaxft: " in line] for _, err in ends]
    codes = [process.returncode for process in processes]
    assert not any("Traceback" in err for _, err in ends), ends
    return codes, [out for out, _ in ends], errors


@pytest.fixture(scope="module")
def flags(make_folder, make_flags):
    keys = {
        "total": "3_steps",
        "batch_size": 4,
        "lora.rank": 0,
        "eval_examples": 8,
        "every.log": "1_steps",
        "every.save": "2_steps",
    }
    return [*CONFIG, *make_flags(make_folder(tied=True), keys)]


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def tensors(folder):
    return load_file(folder / "model.safetensors")


def test_two_processes_make_what_one_makes(flags, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert together(1, "jaxft.train", *flags, "--workdir", str(one))[0] == [0]
    codes, shown, _ = together(2, "jaxft.train", *flags, "--workdir", str(two))
    assert codes == [0, 0]
    assert shown[0].count("step 3/3") == 1 and "export (merged)" in shown[0]
    assert GLOO.sub("", shown[1]) == "", "the second process is silent"
    assert [r["step"] for r in records(two)] == [0, 1, 2, 3, 3], "each record once"
    for a, b in zip(timeless(one), timeless(two), strict=True):
        assert a.keys() == b.keys()
        np.testing.assert_allclose([*a.values()], [*b.values()], rtol=1e-5)
    assert sorted(p.name for p in one.iterdir()) == sorted(p.name for p in two.iterdir())
    whole, halves = tensors(one / "export"), tensors(two / "export")
    assert whole.keys() == halves.keys()
    for key, tensor in whole.items():
        np.testing.assert_allclose(halves[key], tensor, atol=1e-5, err_msg=key)
    assert json.loads((two / "manifest.json").read_text())["processes"] == 2
    goes_on_in_one_process(flags, two, whole)


def goes_on_in_one_process(flags, workdir, whole):
    """One process takes the checkpoint of step 2 that two saved, and ends where one would."""
    shutil.rmtree(workdir / "checkpoints" / "3")
    shutil.rmtree(workdir / "export")
    codes, shown, _ = together(1, "jaxft.train", *flags, "--workdir", str(workdir))
    assert codes == [0] and "resumed from step 2" in shown[0]
    for key, tensor in tensors(workdir / "export").items():
        np.testing.assert_allclose(tensor, whole[key], atol=1e-5, err_msg=key)
