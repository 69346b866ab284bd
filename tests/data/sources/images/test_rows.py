"""Image sources: the same records from a folder, tars, tables and TFDS, read when asked for."""

import io
import json
import subprocess
import sys
import tarfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_images

NAMES = ["a", "b", "c"]


def png(seed):
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def one_line_error(action):
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_records(records, suffix=".png"):
    assert len(records) == 3
    for i in (2, 0, 1):
        record = records[i]
        assert record.content == png(i) and record.caption == records.caption(i) == f"caption {i}"
        assert record.name == records.name(i)


@pytest.fixture
def folder(tmp_path):
    for i, name in enumerate(NAMES):
        (tmp_path / f"{name}.png").write_bytes(png(i))
    return tmp_path


def add_metadata(folder, key="text", names=NAMES):
    rows = [{"file_name": f"{n}.png", key: f"caption {i}"} for i, n in enumerate(names)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))


def add_texts(folder):
    for i, name in enumerate(NAMES):
        (folder / f"{name}.txt").write_text(f" caption {i}\n")


@pytest.mark.parametrize("key", ["text", "caption"])
def test_a_folder_with_metadata(folder, key):
    add_metadata(folder, key)
    (folder / "unlisted.png").write_bytes(b"")
    records = open_images(f"folder:{folder}")
    assert_records(records)
    assert records.name(1) == str(folder / "b.png")
    assert repr(records) == f"Records('folder:{folder}', 3 images)"


def test_a_folder_with_a_text_beside_each_image(folder):
    add_texts(folder)
    (folder / "notes.md").write_text("no image")
    assert_records(open_images(f"folder:{folder}"))


def test_bytes_are_read_when_asked_for(folder):
    add_metadata(folder)
    records = open_images(f"folder:{folder}")
    (folder / "a.png").unlink()
    assert records.caption(0) == "caption 0"
    assert "cannot read" in one_line_error(lambda: records[0])
    assert records[1].content == png(1)


def test_captions_are_needed_unless_the_task_needs_none(folder):
    error = one_line_error(lambda: open_images(f"folder:{folder}"))
    assert "a.png has no caption" in error and "metadata.jsonl" in error
    assert [open_images(f"folder:{folder}", captions=False)[i].caption for i in range(3)] == [
        ""
    ] * 3
    add_texts(folder)
    assert_records(open_images(f"folder:{folder}", captions=False))
    (folder / "b.txt").write_text(" \n")
    assert "b.txt is empty" in one_line_error(lambda: open_images(f"folder:{folder}"))
    (folder / "b.txt").write_bytes(b"\xff")
    assert "b.txt: invalid UTF-8" in one_line_error(lambda: open_images(f"folder:{folder}"))


@pytest.mark.parametrize(
    "line, words",
    [
        ('{"text": "x"}', '"file_name" is missing'),
        ('{"file_name": "gone.png", "text": "x"}', "gone.png does not exist"),
        ('{"file_name": "a.png"}', "the caption is missing"),
        ('{"file_name": "a.png", "text": 3}', "caption 'text' must be a text"),
        ('{"file_name": "a.png", "text": "  "}', "caption 'text' must be a text"),
        ('{"file_name": ', "invalid JSON"),
    ],
)
def test_bad_metadata_names_its_line(folder, line, words):
    (folder / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "fine"}\n' + line)
    error = one_line_error(lambda: open_images(f"folder:{folder}"))
    assert "metadata.jsonl:2" in error and words in error


@pytest.mark.parametrize("spec", ["", "x", "folder:", "csv:a", "wds:", "hf:", "tfds:"])
def test_an_unknown_spec_lists_what_there_is(spec):
    assert "wds:TARS" in one_line_error(lambda: open_images(spec))


def test_near_misses_are_explained(tmp_path):
    assert f"folder:{tmp_path}" in one_line_error(lambda: open_images(str(tmp_path)))
    assert "holds no image" in one_line_error(lambda: open_images(f"folder:{tmp_path}"))
    assert "is no folder" in one_line_error(lambda: open_images(f"folder:{tmp_path}/gone"))
    message = one_line_error(lambda: open_images("demo:emojis"))
    assert "demo:emoji/train" in message and "demo:stickers/valid" in message
    assert "shard-*.tar" in one_line_error(lambda: open_images(f"wds:{tmp_path}/*.tar"))


def write_tar(path, members, **options):
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def tars(tmp_path):
    long = "x" * 150  # a name that takes a header of its own
    write_tar(tmp_path / "s-1.tar", {"c.json": b'{"caption": "caption 2"}', "c.png": png(2)})
    first = {
        "deep/a.png": png(0), "deep/a.txt": b"caption 0\n", "deep/a.cls": b"3",
        f"{long}.PNG": png(1), f"{long}.json": b'{"text": "caption 1", "width": 8}',
    }  # fmt: skip
    write_tar(tmp_path / "s-0.tar", first, format=tarfile.GNU_FORMAT)
    return tmp_path


def test_webdataset_tars_are_read_in_place(tars):
    before = sorted(tars.iterdir())
    records = open_images(f"wds:{tars}/s-*.tar")
    assert_records(records)
    assert records.name(0) == f"{tars}/s-0.tar:deep/a.png"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: records[i % 3].content, range(60)))
    assert found == [png(i % 3) for i in range(60)]
    assert sorted(tars.iterdir()) == before


def test_a_tar_member_without_a_caption_is_refused(tmp_path):
    write_tar(tmp_path / "a.tar", {"x.png": png(0), "y.txt": b"lonely"})
    error = one_line_error(lambda: open_images(f"wds:{tmp_path}/a.tar"))
    assert "a.tar:x.png has no caption" in error
    assert open_images(f"wds:{tmp_path}/a.tar", captions=False)[0].caption == ""
    for content, words in [
        (b'{"width": 3}', "the caption is missing"), (b"{", "unreadable"), (b"[]", "JSON object"),
    ]:  # fmt: skip
        write_tar(tmp_path / "b.tar", {"x.png": png(0), "x.json": content})
        records = open_images(f"wds:{tmp_path}/b.tar")
        error = one_line_error(lambda records=records: records.caption(0))
        assert "b.tar:x.json" in error and words in error


@pytest.mark.parametrize("damage", ["cut", "header", "html", "gzip", "empty"])
def test_a_damaged_tar_is_refused(tars, damage):
    path = tars / "s-0.tar"
    whole = path.read_bytes()
    if damage == "gzip":
        write_tar(path, {})
        with tarfile.open(path, "w:gz"):
            pass
    else:
        second = 1024 + 512 * (len(png(0)) // 512)  # the header of the second member
        broken = whole[:second] + b"garbage!" + whole[second + 8 :]
        contents = {"cut": whole[: second + 700], "header": broken, "html": b"<html>", "empty": b""}
        path.write_bytes(contents[damage])
    error = one_line_error(lambda: open_images(f"wds:{tars}/*.tar"))
    assert "s-0.tar as an uncompressed tar" in error


def test_a_tar_that_shrinks_later_is_named(tars):
    records = open_images(f"wds:{tars}/*.tar")
    (tars / "s-1.tar").write_bytes(b"")
    assert "s-1.tar ends at byte" in one_line_error(lambda: records[2])


def test_parquet_pictures_by_bytes_or_path(folder):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    images = [{"bytes": png(0), "path": None}, {"bytes": None, "path": "b.png"},
              {"bytes": png(2), "path": "gone.png"}]  # fmt: skip
    captions = [f"caption {i}" for i in range(3)]
    pq.write_table(pa.table({"image": images, "text": captions}), folder / "x.parquet")
    assert_records(open_images(f"hf:{folder}/x.parquet"))
    images[1] = {"bytes": None, "path": None}
    pq.write_table(pa.table({"image": images, "text": ["a", None, "c"]}), folder / "x.parquet")
    records = open_images(f"hf:{folder}/x.parquet")
    error = one_line_error(lambda: records[1])
    assert f"hf:{folder}/x.parquet row 1" in error and "caption is missing" in error
    open_images(f"hf:{folder}/x.parquet", captions=False)[0]
    error = one_line_error(lambda: open_images(f"hf:{folder}/x.parquet", captions=False)[1])
    assert "image is missing" in error


def test_tfds_pictures_stay_encoded(tmp_path):
    code = f"""
import pathlib, sys
sys.path.insert(0, {str(tmp_path)!r})
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    pkg_dir_path = pathlib.Path({str(tmp_path)!r})
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        label = tfds.features.ClassLabel(names=["bad", "good"])
        features = {{"image": tfds.features.Image(), "label": label}}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))
    def _split_generators(self, _):
        return {{"train": self._generate_examples()}}
    def _generate_examples(self):
        for i in range(3):
            yield i, {{"image": {str(tmp_path)!r} + f"/{{i}}.png", "label": i % 2}}
Tiny(data_dir={str(tmp_path)!r}, file_format="array_record").download_and_prepare()
"""
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png(i))
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    records = open_images(f"tfds:tiny@{tmp_path}")
    assert sorted(r.content for r in map(records.__getitem__, range(3))) == sorted(
        map(png, range(3))
    )
    for i in range(3):
        record = records[i]
        number = next(n for n in range(3) if png(n) == record.content)
        assert record.caption == ("bad", "good")[number % 2]
        assert record.name == f"tfds:tiny@{tmp_path} row {i}"
    assert "'none'" in one_line_error(lambda: open_images(f"tfds:tiny:none@{tmp_path}"))
    assert "nosuchset" in one_line_error(lambda: open_images(f"tfds:nosuchset@{tmp_path}"))
