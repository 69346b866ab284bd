"""Which folder an export may replace: none that holds anything but an earlier export."""

import json
import shutil
from pathlib import Path

import pytest

from jaxft import export, train
from jaxft.core.config import flatten_config, load_config
from jaxft.runs.folders.outputs import MARK, PATH_KEYS, begin_output
from jaxft.tasks import OPTIONS

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
ROOT = Path(__file__).resolve().parents[3]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]


@pytest.fixture(scope="module")
def model(make_folder, tmp_path_factory):
    return Path(shutil.copytree(make_folder(), tmp_path_factory.mktemp("models") / "model"))


@pytest.fixture(scope="module")
def work(model, make_flags, tmp_path_factory):
    """A finished run of two steps."""
    place = tmp_path_factory.mktemp("runs") / "run"
    flags = make_flags(model, {"total": "2_steps", "mesh.fsdp": 1, "batch_size": 8})
    assert train.main([*CONFIG, "--workdir", str(place), *flags]) == 0
    return place


def listing(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refuses(work, capsys):
    """`refuses(out, words)`: exit status 2, one line with the words, and nothing deleted."""

    def check(out, *words, flags=(), kept=None):
        kept = kept or out
        before = listing(kept)
        capsys.readouterr()
        code = export.main(["--workdir", str(work), "--out", str(out), *flags])
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and len(lines) == 1, lines
        for word in (str(out), "--out", *words):
            assert word in lines[0], lines
        assert listing(kept) == before

    return check


def test_fault_1_a_folder_of_the_users_is_never_deleted(refuses, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "one.jpg").write_bytes(b"\xff\xd8")
    (photos / "config.json").write_text("{}")  # a foreign model too
    for flags in ((), ("--overwrite",)):
        refuses(photos, "no export of jaxft", flags=flags)
    refuses(photos / "one.jpg", "no folder", kept=photos)


@pytest.mark.parametrize("flags", [(), ("--overwrite",)], ids=["plain", "overwrite"])
def test_fault_1_run_model_data_and_working_directory_are_kept(
    refuses, work, model, records_file, tmp_path, monkeypatch, flags
):
    kept = ((work, "the run"), (work.parent, "the run"), (model, "model"))
    for place, name in (*kept, (records_file.parent, "data.train")):
        (place / MARK).touch()  # even a mark does not give the folder away
        refuses(place, name, flags=flags)
        (place / MARK).unlink()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refuses(Path("."), "working directory", flags=flags)
    refuses(tmp_path, "working directory", flags=flags)
    refuses(work / "checkpoints", "no export", flags=flags)


def test_fault_1_an_earlier_export_is_replaced_when_asked(work, refuses, tmp_path):
    out = tmp_path / "out"
    out.mkdir()  # empty is as good as absent
    arguments = ["--workdir", str(work), "--out", str(out)]
    assert export.main(arguments) == 0
    first = listing(out)
    assert MARK in first
    refuses(out, "--overwrite")
    (out / "parity.json").write_text("{}")
    assert export.main([*arguments, "--overwrite"]) == 0
    assert listing(out) == first
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_fault_1_the_runs_own_export_needs_no_flag(work):
    command = ["--workdir", str(work)]
    first = listing(work / "export")
    (work / "export" / MARK).unlink()  # as a version before the mark wrote it
    for _ in range(2):
        assert export.main(command) == 0
        assert listing(work / "export") == first


def test_fault_1_photos_in_the_place_of_the_runs_own_export_stay(work, model, make_flags, capsys):
    other = work.parent / "other"
    (other / "export").mkdir(parents=True)
    (other / "export" / "one.jpg").write_bytes(b"\xff\xd8")
    flags = make_flags(model, {"total": "2_steps", "mesh.fsdp": 1, "batch_size": 8})
    assert train.main([*CONFIG, "--workdir", str(other), *flags]) == 2
    assert "no export of jaxft" in capsys.readouterr().err
    assert listing(other / "export") == {"one.jpg": b"\xff\xd8"}
    assert not (other / "metrics.jsonl").exists(), "it is said before training"


def test_fault_1_a_run_does_not_replace_its_own_model(work, make_flags, capsys, tmp_path):
    place = tmp_path / "loop"
    shutil.copytree(work / "export", place / "export")
    keys = {"total": "2_steps", "mesh.fsdp": 1, "batch_size": 8}
    flags = make_flags(place / "export", keys)
    assert train.main([*CONFIG, "--workdir", str(place), *flags]) == 2
    assert "would delete model" in capsys.readouterr().err


def test_r2_only_own_leftovers_are_removed(tmp_path):
    out = tmp_path / "out[1]"
    for name in ("out[1].partial-3", "out[1].partial-mine", "out1.partial-3"):
        (tmp_path / name).mkdir()
    (tmp_path / "out[1].partial-4").symlink_to(tmp_path / "out1.partial-3")
    left = begin_output(out)
    left.rename(tmp_path / "out[1].partial-5")
    made = begin_output(out)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["out[1].partial-3", "out[1].partial-mine", "out1.partial-3", "out[1].partial-4", made.name]
    )


NO_PATHS = {  # texts of a config that name no file
    *(
        "base",
        "columns",
        "sweep",
        "compute_dtype",
        "keep.best",
        "export.dtype",
        "export.kind",
        "grow",
        "init",
        "inversion.init",
    ),
    *("inversion.token", "labels", "lora.layers", "lora.ranks", "lora.targets", "lora.tokens"),
    *("loss.adversarial_start", "objective", "optim.lr_by", "optim.name", "optim.schedule"),
    *("mask", "own_loss", "track", "export.push"),
    *("optim.warmup", "param_dtype", "prediction", "problem_type", "prompt", "remat", "total"),
    *("sample.prompts", "sample.sampler", "task", "template", "trainable"),
    *("every.eval", "every.log", "every.sample", "every.save"),
}


@pytest.mark.parametrize("task", OPTIONS)
def test_every_key_with_a_path_is_known(task):
    leaves = flatten_config(load_config(str(ROOT / "configs" / f"{task}.py"), (), OPTIONS))
    texts = {key for key, value in leaves.items() if isinstance(value, str | list)}
    assert texts <= NO_PATHS | set(PATH_KEYS), "is it a path that an export must not delete?"
    assert json.dumps(sorted(NO_PATHS & set(PATH_KEYS))) == "[]"
