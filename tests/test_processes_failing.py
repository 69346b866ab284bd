"""Several processes of which one fails: all end soon, each with one line and no traceback."""

import signal
import socket
import time

import pytest

from jaxft.core import processes, runtime
from tests.several import ROOT, ends, free_port, start, told

JOIN = [
    "-c",
    "import sys; from jaxft.core import processes, runtime;"
    "sys.exit(processes.command(lambda argv: processes.join(), []))",
]
TIMEOUT = {processes.JOIN_TIMEOUT: "4"}


def line_of(end):
    code, _, err = end
    (line,) = told(err)
    assert code == 2 and "Traceback" not in err and "Check failure" not in err, err
    return line


def test_r9_processes_that_do_not_meet_stop_in_time_and_say_so():
    """Process 1 of 3 is missing, and another run has an address where nobody is."""
    port, began = free_port(), time.monotonic()
    lost = start(JOIN, 2, 1, free_port(), **TIMEOUT)
    processes = [lost, *(start(JOIN, 3, place, port, **TIMEOUT) for place in (0, 2))]
    unreached, first, last = map(line_of, ends(processes))
    assert time.monotonic() - began < 60
    assert "process 1 cannot reach process 0 at JAX_COORDINATOR_ADDRESS=localhost:" in unreached
    assert "Connection refused" in unreached
    for place, line in ((0, first), (2, last)):
        assert f"process {place} waited for all 3 processes at localhost:{port}" in line
        assert "did not meet within 4 s (JAXFT_JOIN_TIMEOUT sets the limit)" in line


@pytest.mark.parametrize(
    ("place", "changes", "line"),
    [
        (2, {}, "JAX_PROCESS_ID=2 must be less than JAX_NUM_PROCESSES=2"),
        (
            1,
            {processes.JOIN_TIMEOUT: "soon"},
            "JAXFT_JOIN_TIMEOUT='soon' must be a number of seconds",
        ),
        (1, {"JAX_COORDINATOR_ADDRESS": "localhost"}, "'localhost', '2', '1': give all three"),
    ],
)
def test_values_with_which_no_run_can_start(monkeypatch, place, changes, line):
    values = dict(zip(processes.CLUSTER, ("localhost:1234", "2", str(place)), strict=True))
    for name, value in (values | changes).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(runtime.UserError, match=line):
        processes.join()


def test_a_port_in_use_is_found_by_the_first_process(monkeypatch):
    with socket.create_server(("", 0)) as server:
        address = f"localhost:{server.getsockname()[1]}"
        for name, value in zip(processes.CLUSTER, (address, "2", "0"), strict=True):
            monkeypatch.setenv(name, value)
        with pytest.raises(runtime.UserError, match=rf"cannot listen on port .*{address} .*in use"):
            processes.join()


def test_sigterm_ends_a_process_that_has_joined():
    code = "import sys, time; from jaxft.core import processes, runtime; processes.join();"
    code += "print('joined', file=sys.stderr, flush=True); time.sleep(100)"
    process = start(["-c", code], 1, 0, free_port())
    for line in process.stderr:
        if "joined" in line:
            break
    process.terminate()
    assert process.wait(timeout=50) == -signal.SIGTERM


# ---- in a training --------------------------------------------------------------------------

# Process 1 has not the file that process 0 reads.
MISSING = """
import sys, jax
from jaxft import train
from jaxft.core.errors import UserError
from jaxft.runs import opening
read = opening.read_data
def missing(run):
    if jax.process_index() == 1:
        raise UserError("texts.jsonl does not exist")
    return read(run)
opening.read_data = missing
sys.exit(train.main(sys.argv[1:]))
"""
# Process 1 ends within the second step, as by a signal.
GONE = """
import os, sys, jax
from jaxft import train
from jaxft.core import sharding
place, steps = sharding.place_batch, []
def gone(batch, mesh):
    steps.append(batch)
    if jax.process_index() == 1 and len(steps) == 4:
        os._exit(9)
    return place(batch, mesh)
sharding.place_batch = gone
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def words(make_folder, make_flags, tmp_path):
    keys = {"total": "9_steps", "data.eval": "", "export.kind": "none"}
    config = str(ROOT / "configs" / "llm.py")
    flags = make_flags(make_folder(tied=True), keys)
    return ["--config", config, "--workdir", str(tmp_path / "run"), *flags]


@pytest.mark.slow
def test_a_file_that_one_host_lacks_stops_all(words):
    port = free_port()
    processes = [start(["-c", MISSING, *words], 2, i, port, devices=2) for i in range(2)]
    for end in ends(processes):
        assert line_of(end).endswith("jaxft: process 1: texts.jsonl does not exist")


@pytest.mark.slow
def test_a_process_that_is_gone_ends_the_others(words):
    port = free_port()
    processes = [start(["-c", GONE, *words], 2, i, port, devices=2) for i in range(2)]
    (code, _, err), (killed, _, _) = ends(processes)
    (line,) = told(err)
    assert killed == 9 and code == 76 and "Traceback" not in err, err
    assert "another process of this run ended" in line and "resumes" in line
