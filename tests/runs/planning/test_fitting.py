"""Runs that do not fit are refused in one line, with the keys that need less and how much."""

import re
from pathlib import Path

import jax
import pytest

from jaxft import train
from jaxft.core import runtime
from jaxft.core.config import load_config
from jaxft.runs import compiling
from jaxft.runs.opening import open_run
from jaxft.runs.planning.estimate import estimate, held
from jaxft.runs.planning.fitting import Room, remedies
from jaxft.tasks import OPTIONS

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "llm.py")
CHANGES = {"lora.rank": 0, "batch_size": 16, "seq_len": 256, "total": "1_steps", "pack": "False"}


@pytest.fixture(scope="module")
def model(make_folder):
    return make_folder(tied=True)


@pytest.fixture
def config(model, make_flags):
    pairs = [flag.removeprefix("--config.").split("=", 1) for flag in make_flags(model, CHANGES)]
    return load_config(CONFIG, pairs, OPTIONS)


@pytest.fixture
def refused(model, make_flags, tmp_path, capsys):
    def check():
        flags = make_flags(model, CHANGES)
        assert train.main(["--config", CONFIG, "--workdir", str(tmp_path / "run"), *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return check


def sizes(line):
    """The estimates of a line in MiB, by flag."""
    found = re.findall(r"--config\.([\w.]+)=\S+ \(([\d.]+) GiB\)", line)
    return {flag: float(size) for flag, size in found}


@pytest.mark.usefixtures("quick")
def test_a_state_that_does_not_fit_is_refused_before_anything_loads(refused, monkeypatch, tmp_path):
    monkeypatch.setattr(runtime, "memory_limit", lambda mesh: 2**14)
    monkeypatch.setattr(compiling.Compiled, "prepare", None)
    line = refused()
    assert "parameters, gradients and moments need 0.00 GiB of the 0.00 GiB" in line
    assert line.endswith("give --config.lora.rank=16 (0.00 GiB) or more devices")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.usefixtures("quick")
def test_a_step_that_does_not_fit_names_four_keys_and_what_each_needs(config, refused, monkeypatch):
    limit = held(open_run(config)) + 2**20
    monkeypatch.setattr(runtime, "memory_limit", lambda mesh: limit)
    line = refused()
    assert re.search(r"jaxft: a step needs 0\.\d\d GiB of the 0\.00 GiB of a device; give", line)
    assert sizes(line).keys() == {"micro_batches", "seq_len", "lora.rank", "remat"}


@pytest.mark.usefixtures("quick")
def test_a_memory_that_is_full_at_run_time_is_the_same_line(refused, monkeypatch):
    def full(self, state, frozen, batch):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes.")

    monkeypatch.setattr(compiling.Compiled, "__call__", full)
    line = refused()
    assert line.startswith("jaxft: the memory of a device is exhausted; give --config.micro")
    assert sizes(line).keys() == {"micro_batches", "seq_len", "lora.rank", "remat"}


@pytest.mark.usefixtures("quick")
def test_the_estimates_are_near_the_compiled_steps(config):
    needed = estimate(open_run(config)).memory.total
    found = sizes(remedies(Room(open_run(config), config, needed * 2**10)))  # GiB show two digits
    assert found["micro_batches"] < found["seq_len"] < found["lora.rank"]
    half = estimate(open_run({**config, "seq_len": 128})).memory.total
    assert found["seq_len"] / 2**10 * 2**30 == pytest.approx(half, rel=0.35)


def test_the_memory_of_a_cpu_device_is_its_share_of_the_machine(monkeypatch, tmp_path):
    (tmp_path / "max").write_text("1000000\n")
    monkeypatch.setattr(runtime, "CONTAINER_LIMIT", tmp_path / "max")
    mesh = jax.make_mesh((8,), ("data",))
    assert runtime.host_memory() == 1000000 and runtime.memory_limit(mesh) == 125000
    (tmp_path / "max").write_text("max\n")
    assert runtime.host_memory() > 2**28
