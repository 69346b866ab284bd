"""Text files: one record each."""

import pytest

from jaxft.data.sources.schemes import open_records
from tests.data.sources.sayings import one_line_error, write


def test_text_reads_a_file_a_folder_and_a_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    b = write(tmp_path / "b.txt", b"second\r\n")
    write(tmp_path / "a.txt", b"\xef\xbb\xbffirst\n")
    write(tmp_path / "sub/c.txt", b"third")
    write(tmp_path / "notes.md", b"not text")
    assert open_records(f"text:{b}")[0] == {"text": "second\r\n"}
    folder = open_records(f"text:{tmp_path}")
    assert [folder[i]["text"] for i in range(len(folder))] == ["first\n", "second\r\n", "third"]
    assert folder.where(1) == b
    assert len(open_records(f"text:{tmp_path}/*.txt")) == 2
    assert len(open_records(f"text:{tmp_path}/**/*.txt")) == 3


def test_text_names_file_and_byte_of_invalid_utf8(tmp_path):
    path = write(tmp_path / "a.txt", b"caf\xe9 au lait")
    message = one_line_error(lambda: open_records(f"text:{path}")[0])
    assert message.startswith(f"{path}: invalid UTF-8 at byte 3")


def test_case_img_06_hidden_texts_are_no_part_of_a_folder(tmp_path):
    write(tmp_path / "a.txt", b"one")
    for name in (
        "._a.txt",
        ".ipynb_checkpoints/a-checkpoint.txt",
        "__MACOSX/._a.txt",
        "@eaDir/a.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"no text")
    for pattern in ("", "/*.txt", "/**/*.txt"):
        records = open_records(f"text:{tmp_path}{pattern}")
        assert [records[i]["text"] for i in range(len(records))] == ["one"]


@pytest.mark.parametrize("names", [("train.txt", "valid.txt"), ("training/a.txt", "eval/a.txt")])
def test_case_img_04_texts_of_several_splits_are_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, b"one")
    error = one_line_error(lambda: open_records(f"text:{tmp_path}"))
    assert "mixes the splits" in error and f"name one, such as text:{tmp_path}/train" in error
    write(tmp_path / "chapter 1.txt", b"two")
