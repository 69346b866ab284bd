"""Steps that stall end a process with the places of its threads, and idle starts are refused."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxft.core.errors import UserError
from jaxft.core.guards import watchdog
from jaxft.core.guards.watchdog import IDLE_STARTS, STALL, Watchdog, count_start, refuse_idle

ROOT = Path(__file__).resolve().parents[3]
STALLS = """
import sys, time
from pathlib import Path
from jaxft.core.guards.watchdog import Watchdog
with Watchdog(Path(sys.argv[1])) as dog:
    for step in (1, 2):
        dog.arm(step)
    if "paused" in sys.argv:
        dog.pause()
    time.sleep(2.5)
print("over")
"""


def run(folder, seconds, *words):
    command = [sys.executable, "-c", STALLS, str(folder), *words]
    env = {"PYTHONPATH": str(ROOT), STALL: seconds, "JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


def test_r8_a_stalled_step_ends_the_process_with_its_threads(tmp_path):
    end = run(tmp_path, "0.5")
    assert end.returncode == 76 and "over" not in end.stdout
    (line,) = end.stderr.splitlines()
    assert "jaxft: step 2 takes longer than 0.5 s" in line and "stalled-0.txt" in line
    stacks = (tmp_path / "stalled-0.txt").read_text()
    assert stacks.count("hread 0x") >= 2 and 'File "<string>", line 10' in stacks


@pytest.mark.parametrize("words", [("0",), ("0.5", "paused"), ("60",)])
def test_what_is_not_watched_goes_on(tmp_path, words):
    end = run(tmp_path, *words)
    assert end.returncode == 0 and end.stdout == "over\n" and not end.stderr


def test_the_limit_follows_the_usual_step(tmp_path, monkeypatch):
    monkeypatch.delenv(STALL, raising=False)
    now = [100.0]
    monkeypatch.setattr(watchdog, "time", type("Clock", (), {"monotonic": lambda: now[0]}))
    dog = Watchdog(tmp_path)
    dog.arm(1)
    assert dog._until == 100 + 3600, "the usual time is not known"
    now[0] += 1
    dog.arm(2)
    assert dog._until == 101 + 300
    for step in range(3, 9):
        now[0] += 60
        dog.arm(step)
    assert dog._until == now[0] + 600
    dog.pause()
    now[0] += 10_000  # an evaluation is no step
    dog.arm(9)
    assert dog._until == now[0] + 600
    monkeypatch.setenv(STALL, "soon")
    with pytest.raises(UserError, match="JAXFT_STALL_SECONDS='soon' must be a number"):
        Watchdog(tmp_path)


def test_r10_starts_without_progress_are_refused(tmp_path):
    for _ in range(IDLE_STARTS):
        refuse_idle(tmp_path, 40)
        count_start(tmp_path, 40)
    with pytest.raises(UserError, match=r"after step 40.*starts\.json") as error:
        refuse_idle(tmp_path, 40)
    assert error.value.status == 70
    refuse_idle(tmp_path, 50)
    count_start(tmp_path, 50)
    refuse_idle(tmp_path, 50)
    (tmp_path / "starts.json").write_text("[")
    refuse_idle(tmp_path, 50)


def test_arming_costs_microseconds(tmp_path):
    dog = Watchdog(tmp_path)
    began = time.perf_counter()
    for step in range(1000):
        dog.arm(step)
    assert time.perf_counter() - began < 1  # 1 ms a step on a busy machine
