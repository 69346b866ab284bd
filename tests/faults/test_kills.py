"""SIGKILL in every phase of real processes: no loss and no exported byte differs afterwards.

The gate kills one process six times in 300 steps, and two processes three times. `pytest -m slow`
kills a hundred times.
"""

import contextlib
import signal
from pathlib import Path

import numpy as np
import pytest

from jaxft.core.guards.faults import FAULTS
from tests.several import ROOT, assert_same, ends, free_port, start, together

MARK = "JAXFT_TEST_RUN"  # a variable that the children of a training inherit
KILLED = -signal.SIGKILL
PEER_LOST = 76  # a process that was not killed itself
KEYS = {
    "batch_size": 4,
    "seq_len": 24,
    "eval_examples": 4,
    "optim.ema": 0.9,
    "every.log": "100_steps",
    "every.sample": "0_steps",
}
ADAPTER = {**KEYS, "lora.rank": 2, "lora.dropout": 0.1}
FULL = {**KEYS, "lora.rank": 0}


@pytest.fixture(autouse=True)
def quickly_compiled(monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")


@pytest.fixture(scope="module")
def command(make_folder, make_flags):
    """`command(steps, keys)`: a training of the smallest decoder."""
    folder = make_folder(
        tied=True, hidden_size=16, intermediate_size=16, num_attention_heads=2,
        num_key_value_heads=1,
    )  # fmt: skip
    words = ["-m", "jaxft.train", "--config", str(ROOT / "configs" / "llm.py")]

    def make(steps, keys):
        period = {"every.save": f"{steps // 12}_steps", "every.eval": f"{steps // 3}_steps"}
        return [*words, *make_flags(folder, {**period, **keys, "total": f"{steps}_steps"})]

    return make


def newest(work):
    steps = [int(path.name) for path in (work / "checkpoints").glob("*") if path.name.isdigit()]
    return max(steps, default=0)


def orphans(work):
    """Ids of the processes that have the mark of a run in their environment."""
    found = []
    for file in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if f"{MARK}={work}\0".encode() in file.read_bytes():
                found.append(file.parent.name)
    return found


def kill(command, work, fault, count=1):
    """Start a training that `fault` kills."""
    port, words = free_port(), [*command, "--workdir", str(work)]
    port = port if count > 1 else None
    env = {FAULTS: fault, MARK: str(work)}
    running = [start(words, count, i, port, count, **env) for i in range(count)]
    marked = []
    while len(marked) < count and any(one.poll() is None for one in running):
        marked = orphans(work)  # the mark is there once a process has begun
    assert len(marked) == count
    found = ends(running)
    codes = [code for code, *_ in found]
    assert KILLED in codes and set(codes) <= {KILLED, PEER_LOST}, (fault, found)
    assert not any("Traceback" in err for *_, err in found), found
    assert not orphans(work), "processes that outlive the training"


def faults(rng, places, steps, work):
    """Yield a fault for each place, where the run will come to. A step is one of the next 50.

    Without a checkpoint there is no restore, and a step takes its place.
    """
    for place in places:
        place = place if place != "restore" or newest(work) else "step"
        number = int(rng.integers(1, 4)) if place == "save" else 1
        if place.endswith("step"):
            number = newest(work) + int(rng.integers(1, max(2, steps // 6)))
        yield f"kill@{place}:{number}"


def test_r1_r2_r11_six_kills_of_one_process(command, tmp_path):
    words, seed = command(300, ADAPTER), 19
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    together(1, *words[2:], "--workdir", whole, devices=1, joined=False)
    places = ("step", "save", "restore", "step", "save", "export")
    for fault in faults(np.random.default_rng(seed), places, 300, broken):
        print(f"seed {seed}, from step {newest(broken)}: {fault}")
        kill(words, broken, fault)
    together(1, *words[2:], "--workdir", broken, devices=1, joined=False)
    assert_same(whole, broken)
    assert not list(broken.glob("*.partial-*"))


def test_r1_r7_three_kills_of_two_processes(command, tmp_path):
    """Both are killed in a step, one in a step, and both in a save."""
    words, seed = command(300, FULL), 7
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    together(2, *words[2:], "--workdir", whole, devices=2)
    for fault in faults(np.random.default_rng(seed), ("step", "rank1:step", "save"), 300, broken):
        print(f"seed {seed}, from step {newest(broken)}: {fault}")
        kill(words, broken, fault, count=2)
    together(2, *words[2:], "--workdir", broken, devices=2)
    assert_same(whole, broken)


@pytest.mark.slow
def test_r1_a_hundred_kills(command, tmp_path):
    words, seed = command(3000, {**ADAPTER, "every.save": "10_steps"}), 100
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    together(1, *words[2:], "--workdir", whole, devices=1, joined=False)
    rng = np.random.default_rng(seed)
    places = [str(place) for place in rng.choice(["step", "save", "restore"], 98)]
    for fault in faults(rng, ["step", *places, "export"], 250, broken):
        print(f"seed {seed}, from step {newest(broken)}: {fault}")
        kill(words, broken, fault)
    together(1, *words[2:], "--workdir", broken, devices=1, joined=False)
    assert_same(whole, broken)
