"""JSON lines: records by index, and a broken one gives a line that names the place."""

from pathlib import Path

import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records


def one_line_error(action) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(path: Path, content: bytes) -> str:
    path.write_bytes(content)
    return str(path)


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
