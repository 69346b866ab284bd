"""Rows of Python become files of a run folder, the same ones each time."""

import json

import numpy as np
import pytest
from PIL import Image

from jaxft.api.rows import write_rows
from jaxft.core.errors import UserError

GREY = np.full((2, 2, 3), 7, np.uint8)


def test_texts_are_lines_of_json(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "hé"}]}, {"text": "a\nb"}]
    place = write_rows(iter(rows), tmp_path, "train", False, False)
    file = tmp_path / "rows" / "train.jsonl"
    assert place == f"jsonl:{file}"
    assert [json.loads(line) for line in file.open(encoding="utf-8")] == rows


def test_pictures_are_files_of_a_folder_with_a_list(tmp_path):
    rows = [{"image": GREY, "text": "a"}, {"image": Image.fromarray(GREY), "source": GREY}]
    place = write_rows(rows, tmp_path, "eval", True, False)
    folder = tmp_path / "rows" / "eval"
    assert place == f"folder:{folder}"
    assert [json.loads(line) for line in (folder / "metadata.jsonl").open()] == [
        {"file_name": "0000000-image.png", "text": "a"},
        {"file_name": "0000001-image.png", "source": "0000001-source.png"},
    ]
    for name in ("0000000-image.png", "0000001-image.png", "0000001-source.png"):
        np.testing.assert_array_equal(np.asarray(Image.open(folder / name)), GREY)


@pytest.mark.parametrize("images", [False, True])
def test_rows_of_a_run_that_has_begun_stay(tmp_path, images):
    rows = [{"image": GREY, "text": "a"}] if images else [{"text": "a"}]
    place = write_rows(rows, tmp_path, "train", images, False)
    assert write_rows(rows, tmp_path, "train", images, True) == place
    other = [{**rows[0], "text": "b"}]
    with pytest.raises(UserError, match=r"rows for train differ from those in .*rows/train"):
        write_rows(other, tmp_path, "train", images, True)
    assert write_rows(rows, tmp_path, "train", images, True) == place
    assert write_rows(other, tmp_path, "train", images, False) == place  # before the first save
    with pytest.raises(UserError, match="differ"):
        write_rows(rows, tmp_path, "train", images, True)


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"text": "a"}, r"train row 0: \"image\" is missing.*found 'text'"),
        ({"image": "absent.png"}, r"train row 0: \"image\" is 'absent.png': expected a picture"),
        ({"image": np.zeros((2, 2, 3))}, r"train row 0: \"image\" is an array of float64.*uint8"),
        ({"image": np.zeros((2, 2, 7), np.uint8)}, r"train row 0: \"image\".*uint8 \[Y, X, 3\]"),
    ],
    ids=["absent", "file", "floats", "channels"],
)
def test_what_is_no_picture_is_named(tmp_path, row, error):
    with pytest.raises(UserError, match=error):
        write_rows([row], tmp_path, "train", True, False)
