"""Sources: every spec gives records by index; every broken one a line that names the place."""

import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.core.config import PACKAGE
from jaxft.core.errors import UserError
from jaxft.data.sources.schemes import open_records
from jaxft.demo import DEMOS


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


@pytest.mark.parametrize(
    "spec",
    ["jsonl:{}/none.jsonl", "jsonl:{}", "text:{}/none.txt", "text:{}", "text:{}/zero.md"],
)
def test_missing_and_empty_sets_name_what_was_asked(tmp_path, spec):
    write(tmp_path / "zero.md", b"")
    spec = spec.format(tmp_path)
    assert spec.partition(":")[2] in one_line_error(lambda: open_records(spec))


@pytest.mark.parametrize("spec", ["", "jsonl:", "csv:a.csv", "tfds:", "tfds:@d"])
def test_unknown_specs_list_the_known_ones(spec):
    assert "tfds:NAME[:SPLIT]" in one_line_error(lambda: open_records(spec))


def test_a_bare_path_is_answered_with_its_spec(tmp_path):
    path = write(tmp_path / "a.jsonl", b"{}")
    assert f"did you mean jsonl:{path}?" in one_line_error(lambda: open_records(path))


def test_demo_sets_hold_what_their_names_say():
    train, valid = (open_records(f"demo:supersense/{split}") for split in ("train", "valid"))
    assert (len(train), len(valid)) == (6_000, 600)
    rows = [[records[i] for i in range(len(records))] for records in (train, valid)]
    assert all(set(row) == {"text", "label"} and row["text"] for part in rows for row in part)
    labels = [{row["label"] for row in part} for part in rows]
    assert len(labels[0]) == 25 and labels[1] <= labels[0]
    assert not {row["text"] for row in rows[0]} & {row["text"] for row in rows[1]}
    # Shuffled: the first rows are not of one class, as they are in the source's order.
    assert len({row["label"] for row in rows[0][:64]}) > 10
    novel = [open_records(f"demo:novel/{split}")[0]["text"] for split in ("train", "valid")]
    assert novel[0].startswith("Persuasion") and novel[1].rstrip().endswith("Finis")
    assert 0.85 < len(novel[0]) / sum(map(len, novel)) < 0.95


def test_demo_names_are_listed_and_the_folder_stays_small():
    message = one_line_error(lambda: open_records("demo:supersense"))
    assert all(f"demo:{name.partition('.')[0]}" in message for name in DEMOS["texts"])
    text_parts = [PACKAGE / "demo" / name for name in ("supersense", "novel")]
    assert sum(p.stat().st_size for part in text_parts for p in part.iterdir()) < 2_000_000
    notice = (PACKAGE / "demo" / "NOTICE.md").read_text()
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    assert "public domain" in notice


def prepare_tfds(folder: Path) -> None:
    """Prepare a tiny TFDS dataset in a child process: registering a builder is global state."""
    code = f"""
import pathlib
import tensorflow_datasets as tfds
class Tiny(tfds.core.GeneratorBasedBuilder):
    pkg_dir_path = pathlib.Path({str(folder)!r})
    VERSION = tfds.core.Version("1.0.0")
    def _info(self):
        label = tfds.features.ClassLabel(names=["bad", "good"])
        features = {{"text": tfds.features.Text(), "label": label}}
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))
    def _split_generators(self, _):
        return {{"train": self._generate_examples(6), "test": self._generate_examples(2)}}
    def _generate_examples(self, n):
        for i in range(n):
            yield i, {{"text": f"r\\u00f6w {{i}}", "label": i % 2}}
Tiny(data_dir={str(folder)!r}, file_format="array_record").download_and_prepare()
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_tfds_decodes_text_and_names_labels(tmp_path):
    prepare_tfds(tmp_path)
    records = open_records(f"tfds:tiny@{tmp_path}")
    rows = sorted((records[i] for i in range(len(records))), key=lambda row: row["text"])
    assert rows == [{"text": f"röw {i}", "label": ("bad", "good")[i % 2]} for i in range(6)]
    assert records.where(4) == f"tfds:tiny@{tmp_path} record 4"
    assert len(open_records(f"tfds:tiny:test@{tmp_path}")) == 2
    assert len(open_records(f"tfds:tiny:1.0.0:train[:50%]@{tmp_path}")) == 3
    assert "'none'" in one_line_error(lambda: open_records(f"tfds:tiny:none@{tmp_path}"))
    assert "nosuchset" in one_line_error(lambda: open_records(f"tfds:nosuchset@{tmp_path}"))
    assert "tensorflow" not in sys.modules


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
