"""Paths without a scheme: one format by extension, alone, in folders and globs, compressed."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records

ROWS = [{"prompt": f"q{i}", "completion": f"a {i}"} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)
CSV = "prompt,completion\n" + "".join(f"q{i},a {i}\n" for i in range(4))
FORMATS = {
    "rows.jsonl": LINES,
    "rows.ndjson": LINES,
    "lines.json": LINES,
    "rows.json": json.dumps(ROWS),
    "rows.csv": CSV,
    "rows.tsv": CSV.replace(",", "\t"),
    "ROWS.CSV": CSV,
}


def one_line_error(spec) -> str:
    with pytest.raises(UserError) as caught:
        open_records(str(spec))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("packed", [False, True])
def test_a_file_a_folder_and_a_glob_of_every_format(tmp_path, name, packed):
    content = FORMATS[name].encode()
    name = f"{name}.gz" if packed else name
    for folder in ("one", "one/two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_bytes(gzip.compress(content) if packed else content)
    (tmp_path / "one/README.md").write_text("about the rows")
    (tmp_path / "one/dataset_info.json").write_text("{}")
    (tmp_path / "one/.hidden.csv").write_text("x")
    for spec, count in (
        (f"one/{name}", 1),
        ("one", 2),
        ("one/**/[rRl]*[sS]*", 2),
        ("one/two/*", 1),
    ):
        records = open_records(str(tmp_path / spec))
        assert [records[i] for i in range(len(records))] == ROWS * count, spec
        assert str(tmp_path / "one") in records.where(0)


def test_texts_are_one_record_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"second"))
    for spec in (tmp_path, f"text:{tmp_path}"):
        records = open_records(str(spec))
        assert [records[i] for i in range(2)] == [{"text": "first\n"}, {"text": "second"}]


def test_formats_are_not_mixed(tmp_path):
    for name in ("rows.jsonl", "rows.csv"):
        (tmp_path / name).write_text(FORMATS[name])
    message = one_line_error(tmp_path)
    assert "mixes .csv and .jsonl" in message
    assert len(open_records(message.rpartition("such as ")[2])) == 4


def test_tables_win_over_json_beside_them(tmp_path):
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "train-00000.parquet")
    (tmp_path / "metadata.json").write_text("{}")
    assert len(open_records(str(tmp_path))) == 4


@pytest.mark.parametrize("scheme", ["", "jsonl:"])
def test_splits_are_not_mixed(tmp_path, scheme):
    for name in ("train.jsonl", "test.jsonl"):
        (tmp_path / name).write_text(LINES)
    message = one_line_error(f"{scheme}{tmp_path}")
    named = message.partition("such as ")[2].partition("; found")[0]
    assert "mixes the splits test, train" in message and named.startswith(f"{scheme}{tmp_path}/tr")
    assert len(open_records(named)) == 4


def test_what_is_no_known_format_is_answered_with_the_ways(tmp_path):
    file = tmp_path / "rows.dat"
    file.write_text(LINES)
    message = one_line_error(file)
    assert "a file .dat" in message and f"jsonl:{file} or text:{file}" in message
    assert len(open_records(f"jsonl:{file}")) == 4
    (tmp_path / "empty").mkdir()
    assert "expected a path that ends in" in one_line_error(tmp_path / "empty")
    assert "no file, folder or glob" in one_line_error(tmp_path / "none.csv")
    (tmp_path / "a.csv").write_text(CSV)
    assert one_line_error(f"csv:{tmp_path}/a.csv").endswith(f"did you mean {tmp_path}/a.csv?")
    assert "give " in one_line_error(f"text:{tmp_path}/a.csv")
