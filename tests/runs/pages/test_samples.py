"""Sheets and tables on disk: the column before training, also for a resumed run."""

import base64
import io
import json

import numpy as np
from PIL import Image

from jaxft.runs.pages.samples import LOSSLESS, THUMB, Samples, kept_samples, thumbnail
from jaxft.tasks import NOW, Sheet

SIDE = 8


def flat(*levels):
    return np.stack([np.full((SIDE, SIDE, 3), level, np.uint8) for level in levels])


def sheet(level):
    return Sheet(("a red apple", "b"), {"target": flat(10, 20), NOW: flat(level, level)})


def columns(workdir, step):
    file = workdir / "samples" / f"held-out-{step:06}.json"
    return {k: [decoded(x) for x in v] for k, v in json.loads(file.read_text())["columns"].items()}


def decoded(uri):
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64"
    return int(np.asarray(Image.open(io.BytesIO(base64.b64decode(data))))[0, 0, 0])


def test_the_first_sheet_shows_before_and_later_ones_before_and_now(tmp_path):
    samples = Samples(tmp_path)
    first = samples.write_sheet(0, "held-out", sheet(50))
    later = samples.write_sheet(4, "held-out", sheet(90))
    assert columns(tmp_path, 0) == {"target": [10, 20], "before": [50, 50]}
    assert columns(tmp_path, 4) == {"target": [10, 20], "before": [50, 50], "now": [90, 90]}
    assert first.shape[1] < later.shape[1], "one column less"
    on_disk = np.asarray(Image.open(tmp_path / "samples" / "held-out-000004.png"))
    assert (on_disk == later).all()


def test_a_resumed_run_shows_the_pictures_of_step_0(tmp_path):
    Samples(tmp_path).write_sheet(0, "held-out", sheet(50))
    Samples(tmp_path).write_sheet(4, "held-out", sheet(90))
    assert columns(tmp_path, 4)["before"] == [50, 50]
    (tmp_path / "samples" / "before-held-out.npz").write_bytes(b"torn")
    Samples(tmp_path).write_sheet(6, "held-out", sheet(90))
    assert "before" not in columns(tmp_path, 6), "no false one"


def test_a_sheet_of_other_prompts_has_no_column_before(tmp_path):
    samples = Samples(tmp_path)
    samples.write_sheet(0, "held-out", sheet(50))
    samples.write_sheet(4, "held-out", Sheet(("c",), {NOW: flat(90)}))
    assert columns(tmp_path, 4) == {"now": [90]}


def test_a_sheet_without_a_model_stays_as_it_is(tmp_path):
    given = Sheet(("a (25.2 dB)",), {"target": flat(1), "reconstruction": flat(2)})
    Samples(tmp_path).write_sheet(0, "held-out", given)
    assert columns(tmp_path, 0) == {"target": [1], "reconstruction": [2]}


def test_records_are_listed_by_step_and_other_files_are_not(tmp_path):
    samples = Samples(tmp_path)
    samples.write_rows(20, "texts", ("prompt", "answer"), [("a", "b")])
    samples.write_rows(3, "texts", ("prompt", "answer"), [("a", "c")])
    samples.write_sheet(0, "held-out", sheet(1))
    (tmp_path / "samples" / "grid.json").write_text("{}")
    assert [(x.name, x.step) for x in kept_samples(tmp_path)] == [
        ("held-out", 0), ("texts", 3), ("texts", 20)
    ]  # fmt: skip
    assert json.loads((tmp_path / "samples" / "texts-000020.json").read_text()) == {
        "step": 20, "headers": ["prompt", "answer"], "rows": [["a", "b"]]
    }  # fmt: skip


def test_large_pictures_become_small_ones_in_records():
    uri = thumbnail(np.zeros((2 * THUMB, 4 * THUMB, 3), np.uint8))
    head, _, data = uri.partition(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (THUMB, THUMB // 2)
    assert thumbnail(np.zeros((LOSSLESS, 4, 3), np.uint8)).startswith("data:image/png")
