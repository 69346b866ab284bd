"""Image tables: rows of many files in order, read by row, with the errors a user can cause."""

import io
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.images.dataset import drop_bad
from jaxft.data.sources.images.tables import open_table
from jaxft.data.sources.schemes import open_images

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

KEYS = ("text", "caption")
ROOT = Path(__file__).resolve().parents[3]


def rows(start, stop, key="text"):
    images = [{"bytes": f"picture {i}".encode(), "path": None} for i in range(start, stop)]
    return pa.table({"image": images, key: [f"caption {i}" for i in range(start, stop)]})


@pytest.fixture
def folder(tmp_path):
    pq.write_table(rows(0, 7), tmp_path / "train-00000-of-00002.parquet", row_group_size=3)
    pq.write_table(rows(7, 9), tmp_path / "train-00001-of-00002.parquet")
    return tmp_path


def assert_rows(table, n):
    assert len(table) == n
    for i in (n - 1, *range(n)):
        assert table.image(i)["bytes"] == f"picture {i}".encode()
        assert table.text(i) == f"caption {i}"


def test_parquet_files_are_one_table_by_row(folder):
    assert_rows(open_table("hf:x", folder, KEYS), 9)
    assert_rows(open_table("hf:x", folder / "train-*.parquet", KEYS), 9)
    assert_rows(open_table("hf:x", folder / "train-00000-of-00002.parquet", KEYS), 7)


def test_a_saved_dataset_is_read_in_place(tmp_path):
    code = f"""
import datasets
images = [{{"bytes": f"picture {{i}}".encode(), "path": None}} for i in range(5)]
captions = [f"caption {{i}}" for i in range(5)]
features = datasets.Features(image=datasets.Image(), caption=datasets.Value("string"))
data = datasets.Dataset.from_dict(dict(image=images, caption=captions), features=features)
data.save_to_disk({str(tmp_path / "set")!r}, num_shards=2)
"""
    pytest.importorskip("datasets")
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert_rows(open_table("hf:x", tmp_path / "set", KEYS), 5)


def test_threads_may_read_together(folder):
    table = open_table("hf:x", folder, KEYS)
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: table.image(i % 9)["bytes"], range(200)))
    assert found == [f"picture {i % 9}".encode() for i in range(200)]


def test_captions_may_be_absent(tmp_path):
    pq.write_table(rows(0, 2).select(["image"]), tmp_path / "a.parquet")
    assert open_table("hf:x", tmp_path, ()).text(1) is None
    with pytest.raises(UserError, match="has no column text or caption: found image"):
        open_table("hf:x", tmp_path, KEYS)


def test_bad_tables_are_refused_in_one_line(folder, tmp_path):
    with pytest.raises(UserError, match=r"no table at .*gone .*expected \.parquet or \.arrow"):
        open_table("hf:x", tmp_path / "gone", KEYS)
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "z.parquet")
    with pytest.raises(UserError, match="has no image column"):
        open_table("hf:x", tmp_path / "z.parquet", KEYS)
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "z.parquet").read_bytes()[:-9])
    with pytest.raises(UserError, match=r"cannot read .*torn\.parquet") as caught:
        open_table("hf:x", tmp_path / "torn.parquet", KEYS)
    assert "\n" not in str(caught.value)


def test_splits_are_not_mixed(folder):
    pq.write_table(rows(0, 1), folder / "test-00000-of-00001.parquet")
    with pytest.raises(UserError, match="mixes the splits test, train: name one"):
        open_table("hf:x", folder, KEYS)
    assert len(open_table("hf:x", folder / "test*", KEYS)) == 1


def test_a_missing_package_is_named(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match="'hf:x' needs pyarrow: pip install pyarrow"):
        open_table("hf:x", folder, KEYS)


def picture(seed=0, format="PNG"):
    buffer = io.BytesIO()
    Image.fromarray(np.full((4, 4, 3), seed, np.uint8)).save(buffer, format)
    return buffer.getvalue()


B = picture()
STRUCT = pa.struct([("path", pa.string()), ("bytes", pa.binary())])
LARGE = pa.struct(
    [("path", pa.large_string()), ("mime", pa.string()), ("bytes", pa.large_binary())]
)
CELL = {"path": "a", "bytes": B}
CAPTIONED = {
    "large_binary": {"image": pa.array([B], pa.large_binary())},
    "binary_view": {"image": pa.array([B], pa.binary_view())},
    "dictionary": {"image": pa.array([B]).dictionary_encode()},
    "struct<path, bytes>": {"image": pa.array([CELL], STRUCT)},
    "struct<path, mime, bytes>": {"image": pa.array([{**CELL, "mime": "x"}], LARGE)},
    "list<uint8>": {"image": pa.array([list(B)], pa.list_(pa.uint8()))},
    "large_list<uint8>": {"image": pa.array([list(B)], pa.large_list(pa.uint8()))},
    "hash before jpg": {"md5": pa.array([b"0" * 16]), "jpg": pa.array([B])},
    "hash of fixed size": {"md5": pa.array([b"0" * 16], pa.binary(16)), "jpg": pa.array([B])},
    "a picture of another name": {"hash": pa.array([b"0" * 16]), "cell": pa.array([B])},
    "latents before": {"latent": pa.array([b"\0" * 64]), "image": pa.array([CELL], STRUCT)},
    "mask after": {"image": pa.array([CELL], STRUCT), "mask": pa.array([CELL], STRUCT)},
    "condition before": {"condition": pa.array([CELL], STRUCT), "image": pa.array([CELL], STRUCT)},
    **{name: {name: pa.array([B])} for name in ("jpg", "png", "webp", "img", "pixel_values")},
}


@pytest.mark.parametrize("columns", CAPTIONED.values(), ids=CAPTIONED)
def test_case_img_09_columns_as_others_write_them(tmp_path, columns):
    pq.write_table(pa.table({**columns, "text": ["x"]}), tmp_path / "a.parquet")
    table = open_table("hf:x", tmp_path, KEYS)
    value = table.image(0)
    assert (value["bytes"] if isinstance(value, dict) else value) == B
    assert len(drop_bad(open_images(f"hf:{tmp_path}"))[0]) == 1


@pytest.mark.parametrize(
    "texts",
    [
        pa.array(["x"], pa.large_string()),
        pa.array(["x"], pa.string_view()),
        pa.array(["x"]).dictionary_encode(),
        pa.array(["x"], pa.large_string()).dictionary_encode(),
    ],
    ids=str,
)
def test_case_img_09_captions_of_any_text_type(tmp_path, texts):
    pq.write_table(pa.table({"image": [B], "caption": texts}), tmp_path / "a.parquet")
    assert open_images(f"hf:{tmp_path}").caption(0) == "x"


def test_case_img_09_what_fits_not_is_told_by_column(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [B], "prompt": ["x"], "url": ["u"], "n": [1]}), path)
    with pytest.raises(UserError, match="rename the one of prompt, url that holds captions"):
        open_table("hf:x", path, KEYS)
    pq.write_table(pa.table({"before": [B], "after": [B], "text": ["x"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: the columns before, after all hold pictures"):
        open_table("hf:x", path, KEYS)
    pq.write_table(pa.table({"md5": [b"0"], "sha": [b"1"], "text": ["x"]}), path)
    with pytest.raises(UserError, match=r"none of the columns md5, sha starts with a picture"):
        open_table("hf:x", path, KEYS)
    pq.write_table(pa.table({"image": [B], "text": [["x"]]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: expected the columns .*text: list<"):
        open_table("hf:x", path, KEYS)


PARTS = {
    "another image column": {"img": [B], "text": ["y"]},
    "no caption column": {"image": [B], "caption": ["y"]},
    "pictures as paths": {"image": ["a.png"], "text": ["y"]},
    "captions as numbers": {"image": [B], "text": [3]},
    "no columns alike": {"a": [1]},
}


@pytest.mark.parametrize("columns", PARTS.values(), ids=PARTS)
def test_case_img_10_a_part_with_other_columns_is_named(tmp_path, columns):
    pq.write_table(pa.table({"image": [B], "text": ["x"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table(columns), tmp_path / "b.parquet")
    with pytest.raises(
        UserError, match=r"b\.parquet: expected the columns 'image' of pictures and"
    ) as e:
        open_table("hf:x", tmp_path, KEYS)
    assert "\n" not in str(e.value)


def test_parts_may_write_one_column_in_several_types_or_be_empty(tmp_path):
    kinds = [("a", pa.binary()), ("b", pa.large_binary())]
    for name, kind in kinds:
        table = pa.table({"text": [name], "image": pa.array([B], kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    pq.write_table(pa.table({"image": [CELL], "text": ["c"]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"text": pa.array([], pa.null())}), tmp_path / "0.parquet")
    records = open_images(f"hf:{tmp_path}")
    assert [records[i][1:3] for i in range(3)] == [(name, B) for name in "abc"]


def write_arrow(path, table, new=pa.ipc.new_stream):
    path.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(path), "wb") as file, new(file, table.schema) as writer:
        writer.write_table(table)


def saved(folder, start=0, stop=3):
    """A folder as `Dataset.save_to_disk` writes it."""
    name = "data-00000-of-00001.arrow"
    write_arrow(folder / name, rows(start, stop))
    state = {"_data_files": [{"filename": name}], "_split": None, "_fingerprint": "x"}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_case_img_03_only_the_files_of_a_saved_dataset_are_read(tmp_path):
    tmp_path = saved(tmp_path / "set")
    for name in ("cache-2d0a802b78a30b76.arrow", "tmpabc.arrow", "data-00000-of-00002.arrow"):
        write_arrow(tmp_path / name, rows(7, 9))
    for pattern in (tmp_path, tmp_path / "*.arrow", tmp_path.parent / "*" / "*.arrow"):
        assert_rows(open_table("hf:x", pattern, KEYS), 3)
    assert len(open_table("hf:x", tmp_path / "cache-2d0a802b78a30b76.arrow", KEYS)) == 2
    (tmp_path / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"data-00000-of-00001\.arrow is missing: .*state\.json"):
        open_table("hf:x", tmp_path, KEYS)


def test_case_img_03_a_cache_folder_has_no_state(tmp_path):
    write_arrow(tmp_path / "my-train.arrow", rows(0, 3))
    write_arrow(tmp_path / "cache-2d0a802b78a30b76.arrow", rows(7, 9))
    assert_rows(open_table("hf:x", tmp_path, KEYS), 3)


def test_case_img_03_of_saved_splits_one_is_named(tmp_path):
    saved(tmp_path / "part a", 0, 3)
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["part a", "part b"]}')
    assert_rows(open_table("hf:x", tmp_path, KEYS), 3)  # the only one that is there
    saved(tmp_path / "part b", 7, 9)
    with pytest.raises(UserError, match=r"holds the splits part a, part b: name one, such as hf:"):
        open_table("hf:x", tmp_path, KEYS)
    assert_rows(open_table("hf:x", tmp_path / "part a", KEYS), 3)


def test_case_img_03_a_saved_selection_is_refused(tmp_path):
    state = json.loads((saved(tmp_path) / "state.json").read_text())
    state["_indices_data_files"] = [{"filename": "indices.arrow"}]
    (tmp_path / "state.json").write_text(json.dumps(state))
    with pytest.raises(UserError, match=r"state\.json: the set was saved as a selection"):
        open_table("hf:x", tmp_path, KEYS)
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot read .*state\.json"):
        open_table("hf:x", tmp_path, KEYS)


def test_arrow_files_of_other_writers_are_read(tmp_path):
    write_arrow(tmp_path / "a.arrow", rows(0, 3), pa.ipc.new_file)
    assert_rows(open_table("hf:x", tmp_path, KEYS), 3)
    pq.write_table(rows(0, 3), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"mixes \.parquet and \.arrow files"):
        open_table("hf:x", tmp_path, KEYS)


@pytest.mark.parametrize("other", ["validation", "valid", "val", "dev", "test", "testing", "eval"])
def test_case_img_04_split_names_of_datasets_are_not_mixed(tmp_path, other):
    places = {"names": "{}-00000-of-00001.parquet", "folders": "{}/0000.parquet"}
    for kind, place in places.items():
        folder = tmp_path / kind
        for split in ("train", other):
            path = folder / place.format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(rows(0, 1), path)
        with pytest.raises(UserError, match="mixes the splits"):
            open_table("hf:x", folder, KEYS)


def test_case_img_06_hidden_tables_are_not_read(folder):
    for name in ("._train-00000.parquet", ".cache/x.parquet", "__MACOSX/x.parquet"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    for pattern in ("", "*.parquet", "**/*.parquet"):
        assert_rows(open_table("hf:x", folder / pattern, KEYS), 9)


def test_a_torn_row_group_is_named(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"image": [B * 50], "text": ["x"]}), path, compression="zstd")
    content = bytearray(path.read_bytes())
    content[4:40] = bytes(36)
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*a\.parquet"):
        open_table("hf:x", tmp_path, KEYS).image(0)
