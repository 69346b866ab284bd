"""Full disks: refused before a run, survived within one, and nothing saved before is lost."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.core.guards import room
from jaxft.runs.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[2]
STATE = {"w": jnp.arange(250_000, dtype=jnp.float32)}  # 1 MB
# Six saves of incompressible arrays on a disk of 2.5 MB, where no look at the room warns.
SAVES = """
import sys, numpy as np, jax.numpy as jnp
from jaxft.core import processes
from jaxft.runs import checkpoint
def main(argv):
    checkpoint.lack_of_room = lambda *_: ""
    processes.start()
    saved, rng = checkpoint.Checkpoints(argv[0]), np.random.default_rng(0)
    for step in range(1, 7):
        saved.save(step, {"w": jnp.asarray(rng.random(250_000, np.float32))}, {}, {"step": step})
sys.exit(processes.command(main, sys.argv[1:]))
"""


@pytest.fixture
def disk(monkeypatch):
    """The free bytes of the disk, which a test may change."""
    bytes_ = SimpleNamespace(free=10**9)
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: bytes_)
    return bytes_


def test_s2_a_run_that_would_fill_the_disk_is_refused(disk, tmp_path):
    saved = Checkpoints(tmp_path)
    disk.free = 3_500_000
    with pytest.raises(UserError, match=r"needs 0\.004 GB, 0\.0035 GB are free.* lora\.rank"):
        saved.check_room(STATE, saves=20, best=False)
    saved.check_room(STATE, saves=3, best=True)
    disk.free = 4_500_000
    saved.check_room(STATE, saves=20, best=False)
    with pytest.raises(UserError, match=r"keeps 4 checkpoints needs 0\.005 GB"):
        saved.check_room(STATE, saves=20, best=True)
    disk.free = 3_500_000
    saved.save(1, STATE, {}, {})
    saved.wait()
    saved.check_room(STATE, saves=20, best=False)  # one of the four is there
    saved.check_room(STATE, saves=0, best=True)


def test_s1_a_run_goes_on_without_room_but_not_for_ever(disk, tmp_path, capsys):
    saved = Checkpoints(tmp_path)
    saved.save(1, STATE, {}, {"next_step": 1})
    disk.free = 900_000
    for step in (2, 3):
        saved.save(step, STATE, {}, {})
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" is not")[0] for line in lines] == ["step 2", "step 3"]
    assert "the newest checkpoint is that of step 1; free space, the run goes on" in lines[0]
    disk.free = 10**9
    saved.save(4, STATE, {}, {})
    saved.wait()  # the count starts again
    disk.free = 0
    saved.save(5, STATE, {}, {})
    with pytest.raises(UserError, match=r"last step is not saved.* goes on from step 4"):
        saved.wait()
    saved.save(6, STATE, {}, {})
    with pytest.raises(UserError, match=r"step 7 is not saved.*as 2 saves before.* of step 4"):
        saved.save(7, STATE, {}, {})
    assert Checkpoints(tmp_path).latest() == 4


def test_s1_a_disk_that_fills_while_orbax_writes(tmp_path):
    """A real disk of 2.5 MB. Orbax's own errors and leftovers are gone, and old steps are whole."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2500k", "tmpfs", str(tmp_path)]
    if subprocess.run(["unshare", "-rm", *mount], capture_output=True).returncode:
        pytest.skip("this user may not mount a disk")
    script = f'{" ".join(mount)} && "$0" -c "$1" {tmp_path} && exit; code=$?;'
    script += f" find {tmp_path}/checkpoints -maxdepth 1 -mindepth 1; exit $code"
    command = ["unshare", "-rm", "sh", "-c", script, sys.executable, SAVES]
    end = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    assert end.returncode == 74, end
    *went_on, first, second = end.stdout.splitlines()
    assert {Path(first).name, Path(second).name} == {"1", "2"}
    assert [line.split(" was saved")[0] for line in went_on] == [
        f"the disk was full before step {step}" for step in (3, 4)
    ]
    (line,) = end.stderr.splitlines()
    assert "jaxft: the disk was full before step 5" in line and "of step 2; free space" in line


def test_s1_the_old_steps_are_as_they_were(disk, tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(1, STATE, {}, {"next_step": 1})
    disk.free = 0
    saved.save(2, STATE, {}, {})
    state, position = saved.restore(1, STATE)
    np.testing.assert_array_equal(state["w"], STATE["w"])
    assert position == {"next_step": 1}
