"""CSV and TSV: rows by index with newlines in quotes, and bad rows by file and line."""

import csv
import io
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records


def one_line_error(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes | str) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_rows_with_quoted_newlines_quotes_and_commas(tmp_path):
    path = write(
        tmp_path / "a.csv",
        'prompt,completion\r\n"two\nlines, and a ""quote""",x\r\n\r\n5" pipe,"y\r\nz"\r\nlast,é',
    )
    records = open_records(path)
    assert [records[i] for i in (2, 0, 1)] == [
        {"prompt": "last", "completion": "é"},
        {"prompt": 'two\nlines, and a "quote"', "completion": "x"},
        {"prompt": '5" pipe', "completion": "y\r\nz"},
    ]
    assert [records.where(i) for i in range(3)] == [f"{path}:{n}" for n in (2, 5, 7)]
    assert repr(records) == f"CsvRecords({path!r}, 3 records)"


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)


@given(st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), st.sampled_from([",", "\t", ";"]))
def test_any_table_that_the_csv_module_writes_is_read_back(rows, delimiter):
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([("a", "b"), *rows])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / ("a.tsv" if delimiter == "\t" else "a.csv")
        records = open_records(write(file, text.getvalue()))
        assert [records[i] for i in range(len(records))] == [{"a": a, "b": b} for a, b in rows]


@pytest.mark.parametrize("head", ["a,b", "a;b", "a\tb"])
def test_the_first_row_tells_what_separates_fields(tmp_path, head):
    separator = head[1]
    records = open_records(write(tmp_path / "a.csv", f"{head}\n1{separator}2\n"))
    assert records[0] == {"a": "1", "b": "2"}


def test_a_byte_order_mark_is_no_part_of_the_first_name(tmp_path):
    records = open_records(write(tmp_path / "a.csv", b"\xef\xbb\xbftext,label\nx,y\n"))
    assert records[0] == {"text": "x", "label": "y"}


def test_a_column_without_a_name_is_left_out(tmp_path):
    """pandas writes its index so."""
    records = open_records(write(tmp_path / "a.csv", ",text,\n0,x,\n"))
    assert records[0] == {"text": "x"}


def test_a_field_may_be_longer_than_the_csv_module_allows(tmp_path):
    records = open_records(write(tmp_path / "a.csv", f"text\n{'long ' * 60_000}\n"))
    assert len(records[0]["text"]) == 300_000


@pytest.mark.parametrize("row", ["1", "1,2,3", '1,2,""'])
def test_a_ragged_row_is_named(tmp_path, row):
    path = write(tmp_path / "a.csv", f"a,b\nx,y\n{row}\nx,y\n")
    records = open_records(path)
    message = one_line_error(lambda: records[1])
    count = row.count(",") + 1
    assert message.startswith(f"{path}:3: found {count} fields, but the first row names 2: ")
    assert records[2] == {"a": "x", "b": "y"}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", " is empty: expected a row of field names"),
        (b"\n\n", " is empty"),
        (b"a,b\n", "holds no records"),
        (b"text,text\nx,y\n", ":1: two fields are named 'text': rename one"),
        (b'a\nx\n"never\nclosed\n', ":3: invalid CSV (unexpected end of data): close the quotes"),
        (b'a\n"x"y\n', ":2: invalid CSV"),
        (b"a,b\rc,d\r", "ends its lines with \\r alone"),
        (b"a\xff,b\nx,y\n", ":1: invalid UTF-8 at byte 1 of the file"),
    ],
)
def test_broken_files_are_named_when_they_are_opened(tmp_path, content, expected):
    path = write(tmp_path / "a.csv", content)
    message = one_line_error(lambda: open_records(path))
    assert path in message and expected in message


def test_invalid_utf8_is_named_by_its_row(tmp_path):
    path = write(tmp_path / "a.csv", b'a\n"x\ny"\ncaf\xe9\n')
    records = open_records(path)
    assert one_line_error(lambda: records[1]).startswith(f"{path}:4: invalid UTF-8 at byte 11 of")
