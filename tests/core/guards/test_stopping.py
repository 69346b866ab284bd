"""SIGTERM and SIGINT in every phase of a training: exit status 75, and nothing is lost."""

import os
import re
import signal
import time
from pathlib import Path

import pytest

from jaxft import train
from jaxft.core import sharding
from jaxft.runs.checkpoint import Checkpoints
from jaxft.runs.watch import Watch
from tests.interrupted import timeless
from tests.several import ends, free_port, start, told

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]
SIGNALS = [signal.SIGTERM, signal.SIGINT]
ENDING = "the same command resumes"


@pytest.fixture(scope="module")
def flags(make_folder, make_flags):
    keys = {"total": "8_steps", "every.save": "3_steps", "every.eval": "4_steps", "batch_size": 4}
    return make_flags(make_folder(tied=True), {**keys, "lora.rank": 0, "eval_examples": 8})


@pytest.fixture(scope="module")
def straight(flags, tmp_path_factory):
    """The run that no signal reaches."""
    work = tmp_path_factory.mktemp("straight") / "run"
    assert train.main([*CONFIG, "--workdir", str(work), *flags, "--config.mesh.fsdp=1"]) == 0
    return work


def ask(number):
    os.kill(os.getpid(), number)
    time.sleep(0.2)  # until the thread has received it


def when(monkeypatch, place, name, call, number):
    """Send the signal at the start of a call of a function, counted from 1."""
    inner, calls = getattr(place, name), []

    def patched(*given, **named):
        calls.append(name)
        if len(calls) == call:
            ask(number)
        return inner(*given, **named)

    monkeypatch.setattr(place, name, patched)


# Place, function, which of its calls, and the step at which the run stops.
PHASES = {
    "step": (sharding, "place_batch", 2, 2),
    "evaluation": (Watch, "evaluate", 2, 5),
    "save": (Checkpoints, "save", 1, 4),
    "last step": (sharding, "place_batch", 8, 8),
    "last save": (Checkpoints, "close", 1, 8),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("number", SIGNALS, ids=lambda one: one.name)
@pytest.mark.parametrize("phase", PHASES)
def test_r3_the_state_is_saved_and_the_run_goes_on_exactly(
    flags, straight, tmp_path, capsys, phase, number
):
    place, name, call, step = PHASES[phase]
    words = [*CONFIG, "--workdir", str(tmp_path / "run"), *flags, "--config.mesh.fsdp=1"]
    before = [signal.getsignal(one) for one in SIGNALS]
    with pytest.MonkeyPatch.context() as patch:
        when(patch, place, name, call, number)
        assert train.main(words) == 75
    lines = told(capsys.readouterr().err)
    assert len(lines) == 2 and number.name in lines[0] and ENDING in lines[1], lines
    assert f"stopped at step {step} of 8" in lines[1]
    assert Checkpoints(tmp_path / "run").latest() == step
    assert not (tmp_path / "run" / "export").exists()
    assert [signal.getsignal(one) for one in SIGNALS] == before
    assert train.main(words) == 0
    assert timeless(tmp_path / "run") == timeless(straight)
    for file in (straight / "export").iterdir():
        assert (tmp_path / "run" / "export" / file.name).read_bytes() == file.read_bytes()


# The same in a process of its own, which may end at once: argv is the signal and the command.
AT_ONCE = """
import os, signal, sys, time
from jaxft import train
from jaxft.runs import opening
from jaxft.runs.checkpoint import Checkpoints
import jaxft.export
number, phase = signal.Signals(int(sys.argv[1])), sys.argv[2]
def slow(*_):
    for _ in range(2 if phase == "twice" else 1):
        os.kill(os.getpid(), number)
        time.sleep(0.3)
    time.sleep(100)
if phase == "start":
    opening.read_data = slow
elif phase == "export":
    jaxft.export.finish_output = slow
else:
    Checkpoints.save = slow
sys.exit(train.main(sys.argv[3:]))
"""


@pytest.mark.parametrize(
    ("phase", "number", "code", "words"),
    [
        ("start", signal.SIGTERM, 75, "nothing to save"),
        ("export", signal.SIGINT, 75, "nothing to save"),
        ("twice", signal.SIGINT, 130, "the second signal"),
        ("twice", signal.SIGTERM, 143, "the second signal"),
    ],
)
def test_r3_r4_a_process_ends_at_once_where_nothing_is_lost_or_at_the_second_signal(
    flags, straight, tmp_path, phase, number, code, words
):
    command = [*CONFIG, "--workdir", str(tmp_path / "run"), *flags, "--config.mesh.fsdp=1"]
    arguments = ["-c", AT_ONCE, str(int(number)), phase, *command]
    ((found, _, err),) = ends([start(arguments, devices=1)], timeout=90)
    assert found == code and words in told(err)[-1] and "Traceback" not in err, err
    assert not (tmp_path / "run" / "export").exists()
    if phase == "export":
        assert train.main(command) == 0
        assert [path.name for path in (tmp_path / "run").glob("export*")] == ["export"]


# Process 1 alone gets the signal.
ONE_OF_TWO = """
import os, signal, sys, time, jax
from jaxft import train
from jaxft.core import sharding
place, calls = sharding.place_batch, []
def asked(batch, mesh):
    calls.append(batch)
    if jax.process_index() == 1 and len(calls) == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
    return place(batch, mesh)
sharding.place_batch = asked
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_r3_a_signal_to_one_of_two_processes_stops_both_at_one_step(flags, tmp_path):
    words, port = [*CONFIG, "--workdir", str(tmp_path / "run"), *flags], free_port()
    found = ends([start(["-c", ONE_OF_TWO, *words], 2, i, port, devices=2) for i in range(2)])
    steps = set()
    for code, _, err in found:
        assert code == 75 and "Traceback" not in err, err
        steps.add(told(err)[-1])
    (line,) = steps
    step = int(re.search(r"stopped at step (\d) of 8", line)[1])
    assert 2 <= step <= 5 and Checkpoints(tmp_path / "run").latest() == step
