"""Bytes of files: compressed ones by their first bytes, foreign ones refused with the way out."""

import gzip
from pathlib import Path

import pyarrow
import pytest

from jaxft.core.errors import UserError
from jaxft.data.sources.texts.contents import decoded, open_contents, text_start

LINES = b'{"text": "one"}\n{"text": "two"}\n' * 500


def zstd(content: bytes, path: Path) -> bytes:
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(content)
    return path.read_bytes()


def one_line_error(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_contents(f"jsonl:{path}", path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst"])
def test_a_compressed_file_is_told_by_its_bytes_not_by_its_name(tmp_path, name):
    """Files of several members are read to the end, as `cat a.gz b.gz` writes them."""
    half = len(LINES) // 2
    packed = {
        "plain": LINES,
        "gzip": gzip.compress(LINES[:half]) + gzip.compress(LINES[half:]),
        "zstd": zstd(LINES[:half], tmp_path / "x") + zstd(LINES[half:], tmp_path / "x"),
    }
    for content in packed.values():
        (tmp_path / name).write_bytes(content)
        data = open_contents("spec", tmp_path / name)
        assert data[:] == LINES and data.find(b"two") == LINES.find(b"two")


def test_a_cut_compressed_file_is_named(tmp_path):
    file = tmp_path / "a.gz"
    for content in (gzip.compress(LINES)[:-20], gzip.compress(LINES)[:12] + b"garbage" * 9):
        file.write_bytes(content)
        one_line_error(file)
    file.write_bytes(zstd(LINES, tmp_path / "x")[:-9])
    one_line_error(file)


@pytest.mark.parametrize(
    ("content", "advice"),
    [
        ('{"text": "x"}'.encode("utf-16"), "save it as UTF-8 (iconv"),
        ('\ufeff{"text": "x"}'.encode("utf-16-be"), "save it as UTF-8 (iconv"),
        (b"PAR1....", "is a Parquet file: give"),
        (b"ARROW1..", "is an Arrow file: give"),
        (b"PK\x03\x04....", "export it as .csv"),
        (gzip.compress("x".encode("utf-16")), "is UTF-16"),
    ],
)
def test_files_without_utf8_text_are_refused_with_the_way_out(tmp_path, content, advice):
    (tmp_path / "a.jsonl").write_bytes(content)
    assert advice in one_line_error(tmp_path / "a.jsonl")


def test_invalid_utf8_is_named_by_its_byte_in_the_file(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfok\ncaf\xe9")
    data = open_contents("spec", tmp_path / "a")
    assert decoded(data, (text_start(data), 5), "a:1") == "ok"
    with pytest.raises(UserError, match="a:2: invalid UTF-8 at byte 9 of the file: save it as"):
        decoded(data, (6, 10), "a:2")
