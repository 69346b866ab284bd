"""JSON lines: records by index, and a broken one gives a line that names the place."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxft.data.sources.schemes import open_records
from tests.data.sources.sayings import one_line_error, write


def test_jsonl_gives_records_by_index_and_their_lines(tmp_path):
    path = write(
        tmp_path / "a.jsonl", b'{"text": "one"}\n\n  \r\n{"text": "zw\xc3\xb6lf"}\r\n{"n": 3}'
    )
    records = open_records(f"jsonl:{path}")
    assert len(records) == 3
    assert [records[i] for i in (2, 1, 0)] == [{"n": 3}, {"text": "zwölf"}, {"text": "one"}]
    assert [records.where(i) for i in range(3)] == [f"{path}:{n}" for n in (1, 4, 5)]
    assert repr(records) == repr(open_records(f"jsonl:{path}")) and "0x" not in repr(records)


def test_jsonl_ignores_a_byte_order_mark(tmp_path):
    records = open_records("jsonl:" + write(tmp_path / "a.jsonl", b'\xef\xbb\xbf{"text": "x"}\n'))
    assert records[0] == {"text": "x"} and records.where(0).endswith(":1")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b'{"text": "x"', "invalid JSON"),
        (b'{"text": "\xff"}', "invalid UTF-8 at byte 23 "),
        (b'["x"]', "expected a JSON object"),
        (b"[" * 100_000, "invalid JSON"),
    ],
)
def test_jsonl_errors_name_file_and_line(tmp_path, line, expected):
    path = write(tmp_path / "a.jsonl", b'{"text": 1}\n\n' + line + b'\n{"text": "fine"}\n')
    records = open_records(f"jsonl:{path}")
    message = one_line_error(lambda: records[1])
    assert message.startswith(f"{path}:3: ") and expected in message
    assert records[2] == {"text": "fine"}


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf\n"])
def test_jsonl_without_records_is_an_error(tmp_path, content):
    path = write(tmp_path / "empty.jsonl", content)
    assert f"{path} " in one_line_error(lambda: open_records(f"jsonl:{path}"))


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("scheme", ["", "jsonl:"])
def test_a_json_array_gives_its_objects(tmp_path, indent, scheme):
    rows = [{"text": 'a "]" , { \\'}, {"messages": [{"content": "[1, {2"}, {}]}, {"n": 1, "é": "ü"}]
    content = json.dumps(rows, indent=indent, ensure_ascii=False).encode()
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf\n " + content + b" \n")
    records = open_records(f"{scheme}{path}")
    assert [records[i] for i in (2, 0, 1)] == [rows[2], rows[0], rows[1]] and len(records) == 3
    assert records.where(1) == f"{path} record 1"


@given(
    st.lists(
        st.dictionaries(
            st.text(max_size=5),
            st.recursive(
                st.none() | st.integers() | st.text(max_size=9),
                lambda inner: (
                    st.lists(inner, max_size=3)
                    | st.dictionaries(st.text(max_size=3), inner, max_size=3)
                ),
                max_leaves=5,
            ),
            max_size=3,
        ),
        min_size=1,
        max_size=6,
    ),
    st.booleans(),
    st.sampled_from([None, 0, 2]),
)
def test_any_array_is_indexed_as_json_reads_it(rows, escaped, indent):
    text = json.dumps(rows, ensure_ascii=escaped, indent=indent).encode("utf-8", "surrogatepass")
    with tempfile.TemporaryDirectory() as folder:
        records = open_records(write(Path(folder) / "a.json", text))
        try:
            text.decode()
        except UnicodeDecodeError:
            return  # lone surrogates are no UTF-8
        assert [records[i] for i in range(len(records))] == rows


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"[]", "holds no records"),
        (b'[{"a": 1}', "is cut: its JSON array never ends"),
        (b'[{"a": "x]', "is cut"),
        (b'[{"a": 1}] [', "goes on after its JSON array"),
        (b'[{"a": 1}]\n{"a": 2}', "goes on after"),
    ],
)
def test_a_broken_array_is_named_when_it_is_opened(tmp_path, content, expected):
    path = write(tmp_path / "a.json", content)
    message = one_line_error(lambda: open_records(path))
    assert expected in message and path in message


@pytest.mark.parametrize(
    ("element", "expected"),
    [
        (b"5", "expected a JSON object such as"),
        (b"", "invalid JSON"),
        (b'{"a" 1}', "invalid JSON (Expecting ':'"),
        (b'{"a": "\xff"}', "invalid UTF-8 at byte 17 of"),
        (b"[" * 30_000 + b"]" * 30_000, "invalid JSON"),
    ],
)
def test_a_bad_element_is_named_by_its_place(tmp_path, element, expected):
    path = write(tmp_path / "a.json", b'[{"a": 1},' + element + b',{"a": 3}]')
    records = open_records(path)
    message = one_line_error(lambda: records[1])
    assert message.startswith(f"{path} record 1: ") and expected in message
    assert records[2] == {"a": 3}
