"""One run in two processes, as on two hosts: the numbers and the folder that one process makes.

The gate runs one config so; `pytest -m slow` runs every file of configs/.
"""

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
from safetensors.flax import load_file  # NumPy alone has no bfloat16
from tiny_janus import make_work

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


# ---- every shipped config -------------------------------------------------------------------

TINY = {
    "export.dtype": "float32",  # of bfloat16 one in 60,000 would round to the other side
    "total": "2_steps",
    "batch_size": 8,
    "eval_examples": 8,
    "every.log": "1_steps",
    "every.save": "2_steps",
}
DRAWN = {**TINY, "eval_generated": 8}
SHORT = {
    "llm": {**TINY, "seq_len": 48},
    "autoencoder": TINY,
    "diffusion": {**DRAWN, "sample.steps": 2},
    "image_tokens": {**DRAWN, "sample.prompts": "['red heart']"},
    "janus": {**DRAWN, "resolution": 12, "sample.prompts": "['water']"},
}


@pytest.fixture(scope="module")
def shipped(make_folder, make_flags, tmp_path_factory):
    """`shipped(name)`: flags of that config as it is, on its demo or a tiny folder, made short."""
    work = tmp_path_factory.mktemp("shipped")

    def flags(name):
        keys = {**SHORT[name]}
        if name == "janus":
            pictures = f"folder:{make_work(work) / 'pictures'}"
            keys |= {"model": work / "model", "data.train": pictures, "data.eval": pictures}
        if name not in ("llm", "autoencoder"):
            keys |= {"cache": work / "cache"}
        words = [f"--config.{key}={value}" for key, value in keys.items()]
        if name == "llm":
            words = make_flags(make_folder(tied=True), keys)
        return ["--config", str(ROOT / "configs" / f"{name}.py"), *words]

    return flags


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "configs").glob("*.py")))
def test_case_img_15_a_shipped_config_makes_in_two_processes_what_it_makes_in_one(
    shipped, name, tmp_path
):
    """The mesh is the same, four devices: losses agree to 1e-6 of their size."""
    flags, one, two = shipped(name), tmp_path / "one", tmp_path / "two"
    for count, work in ((1, one), (2, two)):
        codes, shown, errors = together(count, "jaxft.train", *flags, "--workdir", str(work))
        assert codes == [0] * count, (shown, errors)
    assert json.loads((two / "manifest.json").read_text())["processes"] == 2
    losses = [[r["loss"] for r in records(work) if "loss" in r] for work in (one, two)]
    assert len(losses[0]) == len(losses[1]) == 2
    apart = max(abs(a - b) / abs(a) for a, b in zip(*losses, strict=True))
    print(f"{name}: losses {losses[0]}, apart {apart:.1e} relative")
    assert apart < 1e-6
    for a, b in zip(timeless(one), timeless(two), strict=True):
        assert a.keys() == b.keys()
    names = [
        sorted(p.relative_to(work) for p in work.rglob("*.safetensors")) for work in (one, two)
    ]
    assert names[0] == names[1] and names[0]
    for file in names[0]:
        whole, halves = load_file(one / file), load_file(two / file)
        assert whole.keys() == halves.keys()
        for key, tensor in whole.items():
            np.testing.assert_allclose(
                halves[key].astype(np.float32), tensor.astype(np.float32), atol=1e-4, err_msg=key
            )
