"""The lock of a run folder: a second start is refused at once, and a killed owner is none."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jaxft import train
from jaxft.core.errors import UserError
from jaxft.core.guards import lock
from jaxft.core.guards.lock import LOCK, locked
from tests.several import ends, records, start, told

ROOT = Path(__file__).resolve().parents[3]
HOLD = (
    "import sys, time; from pathlib import Path; from jaxft.core.guards.lock import locked\n"
    "with locked(Path(sys.argv[1])): print('held', flush=True); time.sleep(100)"
)


def test_s6_a_second_start_is_refused_at_once(tmp_path, make_folder, make_flags, capsys):
    command = ["--config", str(ROOT / "configs" / "llm.py"), "--workdir", str(tmp_path)]
    flags = make_flags(make_folder(), {"total": "0_steps", "export.kind": "none"})
    with locked(tmp_path):
        capsys.readouterr()
        began = time.monotonic()
        assert train.main([*command, *flags]) == 2
        assert time.monotonic() - began < 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        host = socket.gethostname()
        for words in (f"{tmp_path} is in use by process {os.getpid()} on {host}", "--workdir"):
            assert words in line
        assert [path.name for path in tmp_path.iterdir()] == [LOCK], "nothing else is written"
    assert train.main([*command, *flags]) == 0
    assert not (tmp_path / LOCK).exists()


def test_s6_a_killed_owner_gives_the_lock_back(tmp_path):
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as owner:
        assert owner.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=f"in use by process {owner.pid} on"), locked(tmp_path):
            pass
        owner.send_signal(signal.SIGKILL)
    assert (tmp_path / LOCK).exists()
    with locked(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["process"] == os.getpid()


def test_s6_an_owner_on_another_host_is_told_by_its_counter(tmp_path, monkeypatch):
    """As on a network disk that passes no locks on."""
    monkeypatch.setattr(lock, "OWNER_PATIENCE", 0.6)
    monkeypatch.setattr(lock, "BEAT", 0.1)
    owner = {"host": "elsewhere", "process": 7, "since": "today", "beat": 3}
    file = tmp_path / LOCK
    file.write_text(json.dumps(owner))
    with locked(tmp_path):  # it stood still
        assert json.loads(file.read_text())["host"] == socket.gethostname()
        time.sleep(0.35)
        assert json.loads(file.read_text())["beat"] >= 2
    file.write_text(json.dumps(owner))
    moving = threading.Timer(0.2, file.write_text, [json.dumps({**owner, "beat": 4})])
    moving.start()
    with pytest.raises(UserError, match=r"process 7 on elsewhere, started today"), locked(tmp_path):
        pass
    moving.join()


def test_the_lock_goes_where_an_error_leaves_the_folder(tmp_path):
    for _ in range(2):
        with pytest.raises(KeyError), locked(tmp_path):
            raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_s6_of_two_starts_one_trains(tmp_path, make_folder, make_flags):
    keys = {"total": "3_steps", "data.eval": "", "export.kind": "none", "mesh.fsdp": 1}
    flags = make_flags(make_folder(), keys)
    command = ["-m", "jaxft.train", "--config", "configs/llm.py", "--workdir", str(tmp_path)]
    found = ends([start([*command, *flags], devices=1) for _ in range(2)])
    codes = sorted(code for code, *_ in found)
    assert codes in ([0, 2], [0, 0]), found  # the second may begin when the first has ended
    for code, _, err in found:
        assert "Traceback" not in err
        assert code == 0 or "is in use by process" in told(err)[0]
    assert [record["step"] for record in records(tmp_path)] == [1, 2, 3]
