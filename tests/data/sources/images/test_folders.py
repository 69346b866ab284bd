"""Folders of pictures as people keep them: endings, captions, lists, kohya's names."""

import csv
import io
import json
import os

import numpy as np
import pytest
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.images.dataset import ImageSet
from jaxft.data.sources.images.records import SUFFIXES
from jaxft.data.sources.schemes import open_images


def encoded(seed=0, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), seed, np.uint8)).save(buffer, format)
    return buffer.getvalue()


def add(folder, names, caption="c"):
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
        if caption:
            path.with_suffix(".txt").write_text(caption)
    return folder


def one_line_error(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


FORMATS = {
    "jfif": "JPEG", "jpe": "JPEG", "pjpeg": "JPEG", "JPG": "JPEG", "apng": "PNG", "jp2": "JPEG2000",
    "j2k": "JPEG2000", "dib": "DIB", "ppm": "PPM", "tga": "TGA", "qoi": "QOI", "avif": "AVIF",
}  # fmt: skip


def test_case_img_11_usual_endings_are_read(tmp_path):
    Image.init()
    assert set(SUFFIXES) - set(Image.registered_extensions()) <= {
        ".jfi", ".jif", ".pjpeg", ".pjp"
    }  # fmt: skip
    for i, (ending, format) in enumerate(FORMATS.items()):
        if format not in Image.SAVE:
            continue
        (tmp_path / f"{i}.{ending}").write_bytes(encoded(i, format))
        (tmp_path / f"{i}.txt").write_text("c")
    images = ImageSet(open_images(f"folder:{tmp_path}"), 8, 8, True)
    assert len(images) == sum(format in Image.SAVE for format in FORMATS.values()) > 9


def test_case_img_11_unreadable_formats_are_counted_and_named(tmp_path, capsys):
    add(tmp_path, ["a.png"])
    for name in ("b.heic", "c.HEIC", "d.jxl", "e.svg", "f.psd", "g.cr2", "._h.heic"):
        (tmp_path / name).write_bytes(b"x")
    records = open_images(f"folder:{tmp_path}")
    said = capsys.readouterr().out
    assert len(records) == 1 and len(records.left_out) == 6
    assert "6 in formats that are not read (1 .cr2, 2 .heic, 1 .jxl, 1 .psd, 1 .svg" in said
    assert "b.heic" in said and "convert them to PNG or JPEG" in said
    images = ImageSet(records, 8, 8, True)
    assert images.report["images"] == 1 and images.report["not_read"] == 6
    assert images.report["bad"] == 0 and len(images.bad) == 6
    assert images.bad[0].error.endswith(
        "b.heic: .heic pictures are not read: convert it to PNG or JPEG"
    )
    (tmp_path / "a.png").unlink()
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert "holds no image" in error and "2 .heic" in error and "convert" in error


HIDDEN = [
    "._0.png", "__MACOSX/._0.png", ".ipynb_checkpoints/0-checkpoint.png", "@eaDir/0.png/SYNO.jpg",
    ".trash/0.png",
]  # fmt: skip


@pytest.mark.parametrize("name", HIDDEN)
def test_case_img_06_hidden_pictures_are_no_part_of_a_folder(tmp_path, name):
    add(tmp_path, ["0.png", "1.png"])
    add(tmp_path, [name])
    assert len(open_images(f"folder:{tmp_path}")) == 2


def test_case_img_04_a_folder_of_splits_is_refused(tmp_path):
    add(tmp_path, ["train/a.png", "val/a.png"])
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert f"mixes the splits train, validation: name one, such as folder:{tmp_path}/train" in error
    assert len(open_images(f"folder:{tmp_path}/train")) == 1
    for split in ("train", "val"):
        line = json.dumps({"file_name": "a.png", "text": "x"})
        (tmp_path / split / "metadata.jsonl").write_text(line)
    assert "mixes the splits" in one_line_error(lambda: open_images(f"folder:{tmp_path}"))


def test_captions_of_kohya_and_its_folders(tmp_path, capsys):
    add(tmp_path, ["10_red fox/a.png", "2_cat/b.png"], caption="")
    (tmp_path / "10_red fox/a.caption").write_text("a fox")
    (tmp_path / "2_cat/b.txt").write_text("a cat")
    (tmp_path / "2_cat/b.caption").write_text("not this one")
    records = open_images(f"folder:{tmp_path}")
    assert [records.caption(i) for i in range(2)] == ["a fox", "a cat"]
    assert "every picture counts once" in (said := capsys.readouterr().out) and "10_red fox" in said


def test_endings_of_captions_may_be_large(tmp_path):
    (tmp_path / "A.JPG").write_bytes(encoded(0, "JPEG"))
    (tmp_path / "A.TXT").write_text("a")
    assert open_images(f"folder:{tmp_path}").caption(0) == "a"


def test_every_picture_without_a_caption_is_named_at_once(tmp_path):
    add(tmp_path, [f"{i}.png" for i in range(5)], caption="")
    (tmp_path / "3.txt").write_text("fine")
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert error.startswith("4 of 5 images have no caption")
    assert all(f"{i}.png has no caption" in error for i in (0, 1, 2, 4))


def test_a_list_may_name_files_in_other_folders(tmp_path, capsys):
    add(tmp_path, ["set/x.png", "other/a.png", "set/in/b.png", "c.png"], caption="")
    rows = [
        {"file_name": "../other/a.png", "text": "a"},
        {"file_name": "in\\b.png", "text": "b"},
        {"file_name": str(tmp_path / "c.png"), "text": "c"},
    ]
    (tmp_path / "set/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    records = open_images(f"folder:{tmp_path}")
    assert [records[i].content for i in range(3)] == [encoded(1), encoded(2), encoded(3)]
    said = capsys.readouterr().out
    assert "left out 1 images" in said and "metadata.jsonl does not list" in said
    assert "x.png" in said
    # A list of a foreign set could otherwise name any picture of this machine.
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}/set"))
    assert error.startswith("2 rows of metadata are bad") and "name the folder that holds" in error
    os.symlink(tmp_path / "other", tmp_path / "set" / "linked")
    row = {"file_name": "linked/a.png", "text": "a"}
    (tmp_path / "set/metadata.jsonl").write_text(json.dumps(row))
    assert open_images(f"folder:{tmp_path}/set")[0].content == encoded(1), "links are the user's"


def test_a_list_may_be_csv_as_imagefolder_has_it(tmp_path):
    add(tmp_path, ["a.png", "b/c.png"], caption="")
    with open(tmp_path / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        rows = [("file_name", "text"), ("a.png", 'one, "two"\nlines'), ("b/c.png", "猫")]
        csv.writer(file).writerows(rows)
    records = open_images(f"folder:{tmp_path}")
    assert [records.caption(i) for i in range(2)] == ['one, "two"\nlines', "猫"]
    (tmp_path / "metadata.csv").write_text("file_name;text\na.png;x\n")
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert 'metadata.csv:2: "file_name" is missing' in error and "'file_name;text'" in error
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.png,\xff\n")
    assert "save it as UTF-8" in one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert "both list pictures: keep one" in error


def test_a_list_as_parquet_is_refused_by_name(tmp_path):
    add(tmp_path, ["a.png"])
    (tmp_path / "metadata.parquet").write_bytes(b"PAR1")
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert "metadata.parquet is not read: write it as metadata.jsonl" in error


def test_a_list_in_a_folder_below_counts(tmp_path):
    add(tmp_path, ["train/a.png"], caption="")
    (tmp_path / "train/metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}')
    assert open_images(f"folder:{tmp_path}").caption(0) == "x"


def test_every_bad_row_of_a_list_is_named_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    add(tmp_path, ["a.png"], caption="")
    lines = ['{"file_name": "a.png", "text": "x"}', '{"file_name": "gone.png", "text": "x"}', "{"]
    lines += [f'{{"file_name": "no{i}.png", "text": "x"}}' for i in range(60)]
    (tmp_path / "metadata.jsonl").write_text("\n".join(lines))
    error = one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert error.startswith("62 rows of metadata are bad") and "all 62 are listed in" in error
    listed = error.rpartition("listed in ")[2].partition(", one a line")[0]
    with open(listed) as file:
        rows = [json.loads(line) for line in file]
    assert len(rows) == 62 and any("gone.png does not exist" in row["error"] for row in rows)
