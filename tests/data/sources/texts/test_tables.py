"""Parquet, Arrow and saved datasets as records: the values of a row, whatever the row groups."""

import json
from concurrent.futures import ThreadPoolExecutor

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records

ROWS = [{"prompt": f"q{i}", "completion": f"ä {i}", "n": i} for i in range(10)]
TABLE = pa.Table.from_pylist(ROWS)


def one_line_error(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def saved(folder, table, files=2):
    """Write what `Dataset.save_to_disk` of Hugging Face datasets writes."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{files:05d}.arrow" for i in range(files)]
    for i, name in enumerate(names):
        part = table.slice(i * len(table) // files, len(table) // files)
        with pa.ipc.new_stream(str(folder / name), table.schema) as writer:
            writer.write_table(part)
    state = {"_data_files": [{"filename": name} for name in names], "_indices_data_files": None}
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "dataset_info.json").write_text("{}")


def test_parquet_gives_rows_of_any_row_group(tmp_path):
    file = tmp_path / "a.parquet"
    pq.write_table(TABLE, file, row_group_size=3)
    for spec in (f"{file}", f"hf:{file}", f"{tmp_path}", f"hf:{tmp_path}/*.parquet"):
        records = open_records(spec)
        assert [records[i] for i in (9, *range(9))] == [ROWS[9], *ROWS[:9]]
    assert records.where(7) == f"{file} row 7"
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(records.__getitem__, [*range(10)] * 9)) == ROWS * 9


def test_structs_lack_the_fields_of_other_rows(tmp_path):
    """A column of tools has the parameters of all tools, null where a tool has none."""

    def tool(name, **properties):
        inner = {"type": "object", "properties": properties, "required": [*properties]}
        return {"type": "function", "function": {"name": name, "parameters": inner}}

    place, number = {"type": "string", "enum": ["a", "b"]}, {"type": "number"}
    rows = [
        {"tools": [tool("weather", city=place)], "text": "a"},
        {"tools": [tool("sum", x=number, y=number), tool("now")], "text": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    saved(tmp_path / "set", pa.Table.from_pylist(rows))
    for spec in (tmp_path / "a.parquet", tmp_path / "set"):
        records = open_records(str(spec))
        assert [records[i] for i in range(2)] == rows
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() != rows, "they hold nulls"


def test_a_row_reads_its_row_group_once(tmp_path, monkeypatch):
    file = tmp_path / "a.parquet"
    pq.write_table(TABLE, file, row_group_size=5)
    records, reads = open_records(str(file)), []
    real = pq.ParquetFile.read_row_group

    def counted(self, group, **options):
        reads.append(group)
        return real(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    assert [records[i] for i in range(10)] == ROWS and reads == [0, 1]


@pytest.mark.parametrize("scheme", ["", "hf:"])
def test_a_saved_dataset_is_read_from_its_folder(tmp_path, scheme):
    saved(tmp_path / "set", TABLE)
    records = open_records(f"{scheme}{tmp_path}/set")
    assert [records[i] for i in range(10)] == ROWS
    assert records.where(6).endswith("data-00001-of-00002.arrow row 1")
    assert repr(records) == f"JoinedRecords('{scheme}{tmp_path}/set', 10 records)"


def test_splits_of_a_saved_dataset_are_named(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "set" / split, TABLE)
    (tmp_path / "set/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    message = one_line_error(lambda: open_records(str(tmp_path / "set")))
    named = message.rpartition("such as ")[2]
    assert named == f"hf:{tmp_path}/set/train" and len(open_records(named)) == 10


def test_class_labels_are_named_as_tfds_names_them(tmp_path):
    features = {"label": {"names": ["bad", "good"], "_type": "ClassLabel"}, "text": {"x": 1}}
    table = pa.table({"text": ["a", "b", "c"], "label": [1, 0, -1]}).replace_schema_metadata(
        {"huggingface": json.dumps({"info": {"features": features}})}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    records = open_records(str(tmp_path / "a.parquet"))
    assert [records[i]["label"] for i in range(3)] == ["good", "bad", None]


def test_columns_of_bytes_are_left_out(tmp_path):
    table = pa.table({"text": ["a"], "png": [b"x"], "image": [{"bytes": b"x", "path": "p"}]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert open_records(str(tmp_path / "a.parquet"))[0] == {"text": "a"}


def test_messages_keep_their_structure(tmp_path):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    pq.write_table(pa.Table.from_pylist([{"messages": turns}]), tmp_path / "a.parquet")
    assert open_records(str(tmp_path / "a.parquet"))[0] == {"messages": turns}


def test_bad_tables_are_named(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"PAR1 and no more")
    assert f"cannot read {file}" in one_line_error(lambda: open_records(str(file)))
    pq.write_table(TABLE.slice(0, 0), file)
    assert "has 0 rows" in one_line_error(lambda: open_records(str(file)))
    twice = pa.table([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    with pa.ipc.new_file(str(tmp_path / "a.arrow"), twice.schema) as writer:
        writer.write_table(twice)
    message = one_line_error(lambda: open_records(f"{tmp_path}/a.arrow"))
    assert message == f"{tmp_path}/a.arrow: two columns are named 'text': rename one"
    pq.write_table(TABLE, file, compression="none")
    content = file.read_bytes()
    file.write_bytes(b"PAR1" + b"\xff" * 200 + content[204:])
    records = open_records(str(file))
    assert f"cannot read {file}" in one_line_error(lambda: records[0])
