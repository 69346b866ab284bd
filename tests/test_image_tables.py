"""Image tables: rows of many files in order, read by row, with the errors a user can cause."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from jaxft.core.errors import UserError
from jaxft.data.image_tables import open_table

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

KEYS = ("text", "caption")
ROOT = Path(__file__).resolve().parent.parent


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
