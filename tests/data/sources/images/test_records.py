"""Records: captions by key, and bad samples of which all are named in one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.images.folders import ImageFiles
from jaxft.data.sources.images.records import (
    SUFFIXES,
    UNREADABLE,
    Bad,
    Records,
    caption_of,
    count_unreadable,
    name_all,
    refuse_bad,
    unreadable,
)


def test_endings_are_read_or_named():
    assert not set(SUFFIXES) & set(UNREADABLE)
    assert {".heic", ".heif", ".jxl", ".svg", ".psd", ".cr2", ".nef", ".dng"} <= set(UNREADABLE)


def test_captions_by_key():
    assert caption_of({"caption": " a "}, "x:1", True) == "a"
    assert caption_of({"text": "b", "caption": "a"}, "x:1", True) == "b"
    assert caption_of({}, "x:1", False) == ""
    with pytest.raises(UserError, match=r"x:1: the caption is missing.*found 'prompt'"):
        caption_of({"prompt": "a"}, "x:1", True)


def test_few_bad_samples_are_named_and_many_are_listed_in_a_file(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    few = [Bad(f"{i}.png", f"{i}.png: broken") for i in range(9)]
    assert name_all(few) == "; ".join(bad.error for bad in few)
    more = [Bad(f"{i}.png", f"{i}.png: broken") for i in range(40)]
    assert all(bad.name in name_all(more) for bad in more) and name_all(more).count("broken") == 3
    many = [Bad(f"猫{i}.png", f"猫{i}.png: broken") for i in range(500)]
    line = name_all(many)
    assert len(line) < 300 and "\n" not in line and "猫0.png: broken; 猫1.png" in line
    path = Path(line.rpartition("listed in ")[2].partition(", one a line")[0])
    rows = [json.loads(row) for row in path.read_text(encoding="utf-8").splitlines()]
    assert rows == [bad._asdict() for bad in many]


def test_one_bad_sample_is_its_own_error():
    refuse_bad([], "x")
    with pytest.raises(UserError, match=r"^a: b$"):
        refuse_bad([Bad("a", "a: b")], "rows")
    with pytest.raises(UserError, match=r"^2 rows are bad: a: b; c: d$"):
        refuse_bad([Bad("a", "a: b"), Bad("c", "c: d")], "rows are bad")


def test_unreadable_pictures_are_counted_by_ending():
    left = [unreadable(name) for name in ("a.heic", "b.HEIC", "c.jxl")]
    assert "2 .heic, 1 .jxl; first: a.heic" in count_unreadable(left)


def test_kept_records_keep_their_sizes_and_what_was_left_out(tmp_path):
    files = ImageFiles([tmp_path / "a", tmp_path / "b"], ["a", "b"])
    sizes = np.asarray([[1, 2], [3, 4]])
    kept = Records("x", files, None, (Bad("c", "d"),), sizes, (b"e", b"f")).keep([1])
    assert kept.digests == (b"f",)
    assert kept.caption(0) == "b" and kept.sizes.tolist() == [[3, 4]] and len(kept.left_out) == 1
