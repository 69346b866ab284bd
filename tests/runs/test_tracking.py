"""Trackers get the numbers of metrics.jsonl, over all starts of a run, and end no training."""

import json
import os
import sqlite3
import struct
import subprocess
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest

from jaxft import train
from jaxft.core.errors import UserError
from jaxft.runs.tracking import open_tracker
from jaxft.tasks.checking import TRACKERS, check_track

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]


@pytest.fixture
def fake(monkeypatch):
    """A client named wandb, which keeps what it is given."""
    client = ModuleType("wandb")
    client.__spec__ = ModuleSpec("wandb", None)
    client.logged, client.opened = [], []
    client.Image = lambda picture: f"picture {picture.shape}"
    run = ModuleType("run")
    run.log = lambda values, step: client.logged.append((step, values))
    run.finish = lambda: client.logged.append("finished")
    client.init = lambda **given: client.opened.append(given) or run
    monkeypatch.setitem(sys.modules, "wandb", client)
    return client


@pytest.fixture
def flags(make_folder, make_flags):
    model = make_folder(tied=True)
    base = {"total": "2_steps", "lora.rank": 0, "optim.schedule": "constant"}
    return lambda **changes: make_flags(model, {**base, **changes})


def numbers(work):
    """{step: {group/name: value}} of metrics.jsonl, as trackers get it."""
    found: dict[int, dict[str, float]] = {}
    for line in (work / "metrics.jsonl").open():
        record = json.loads(line)
        group = "eval" if any(key.startswith("eval_") for key in record) else "train"
        named = {
            f"{group}/{key.removeprefix('eval_')}": value
            for key, value in record.items()
            if key != "step" and isinstance(value, int | float)
        }
        found.setdefault(record["step"], {}).update(named)
    return found


def test_a_run_and_its_continuation_are_one_run_of_the_service(fake, flags, tmp_path):
    work = tmp_path / "mine"
    arguments = [*CONFIG, "--workdir", str(work)]
    assert train.main([*arguments, *flags(track="wandb:words")]) == 0
    assert train.main([*arguments, *flags(track="wandb:words", total="3_steps")]) == 0
    first, second = fake.opened
    assert first["id"] == second["id"] == json.loads((work / "track.json").read_text())["wandb"]
    assert first["project"] == "words" and first["name"] == "mine"
    assert first["config"]["optim"]["schedule"] == "constant"
    assert fake.logged.count("finished") == 2
    got: dict[int, dict[str, float]] = {}
    for step, values in (one for one in fake.logged if one != "finished"):
        got.setdefault(step, {}).update(values)
    assert {3} < got.keys() and got == numbers(work)


def test_a_service_that_fails_ends_the_tracking_alone(fake, flags, tmp_path, capsys):
    def lost(values, step):
        raise ConnectionError("no route to host\nand more")

    fake.init().log = lost
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "a"), *flags(track="wandb")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("wandb gets no more of this run: no route to host\n") == 1
    fake.init = lambda **given: lost({}, 0)
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "b"), *flags(track="wandb")]) == 0
    assert "wandb gets no more of this run: no route" in capsys.readouterr().out
    assert not (tmp_path / "b" / "track.json").exists()


def test_no_service_by_default(tmp_path):
    assert open_tracker("none", tmp_path) is None and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("track", "error"),
    [
        ("wandbb", r"track='wandbb' is not known; did you mean 'wandb'"),
        (
            "neptune:me",
            r"track='neptune:me' is not known; it is one of mlflow, none, trackio",
        ),
        ("trackio", r"track=trackio needs its package; run `pip install trackio`"),
    ],
)
def test_mistakes(monkeypatch, track, error):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=error):
        check_track(track)


def wandb_records(data):
    """The records of a .wandb file: LevelDB's log format, in blocks of 32 KiB after 7 bytes."""
    place, parts = 7, b""
    while place < len(data):
        if (left := 2**15 - place % 2**15) < 7:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or the last part of one
            yield parts
            parts = b""


def stored(name, place, project, run):
    """{step: {name: value}} of a service's own files."""
    found: dict[int, dict[str, float]] = {}
    if name == "mlflow":
        client = import_module("mlflow").MlflowClient()
        for key in client.get_run(run).data.metrics:
            for one in client.get_metric_history(run, key):
                found.setdefault(one.step, {})[key] = one.value
    elif name == "trackio":
        rows = sqlite3.connect(place / f"{project}.db").execute(
            "select step, metrics from metrics where run_name = ?", (run,)
        )
        for step, values in rows:
            found.setdefault(step, {}).update(json.loads(values))
    else:
        kind = import_module("wandb.proto.wandb_internal_pb2").Record
        for file in sorted(place.glob("wandb/offline-run-*/*.wandb")):
            for data in wandb_records(file.read_bytes()):
                record = kind.FromString(data)
                values = {
                    "/".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in record.history.item
                }
                if values:
                    found.setdefault(values["_step"], {}).update(values)
    return found


def environment(place):
    return {
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(place),
        "MLFLOW_TRACKING_URI": f"file:{place}",
        "MLFLOW_ALLOW_FILE_STORE": "true",
    }


@pytest.mark.parametrize("name", TRACKERS)
def test_the_real_clients_store_the_numbers_of_a_run(name, flags, tmp_path, monkeypatch):
    """Offline. A continuation goes into the same run, and each picture is kept."""
    pytest.importorskip(name)
    work, place = tmp_path / "mine", tmp_path / "service"
    for variable, value in environment(place).items():
        monkeypatch.setenv(variable, value)
    command = [sys.executable, "-m", "jaxft.train", *CONFIG, "--workdir", str(work)]
    for total in ("2_steps", "3_steps"):
        changes = flags(track=f"{name}:words", total=total)
        subprocess.run([*command, *changes], check=True, cwd=ROOT, env=os.environ)
    run = json.loads((work / "track.json").read_text())[name]
    got = stored(name, work if name == "wandb" else place, "words", run)
    wanted = numbers(work)
    assert len(wanted) == 4
    for step, values in wanted.items():
        assert values.items() <= got[step].items(), step
    code = (
        "import sys, numpy; from pathlib import Path; from jaxft.runs.tracking import open_tracker;"
        f"tracker = open_tracker('{name}:words', Path(sys.argv[1]));"
        "tracker.image(9, 'grid', numpy.zeros((4, 4, 3), numpy.uint8)); tracker.close()"
    )
    subprocess.run([sys.executable, "-c", code, str(work)], check=True, cwd=ROOT, env=os.environ)
    assert list(tmp_path.rglob("*.png"))
