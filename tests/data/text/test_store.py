"""Token ids on disk: the same rows as in memory, written once, whole or not at all."""

import json

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.data.text import dataset, store
from jaxft.data.text.dataset import load_text
from tests.data.text.test_dataset import make_tokenizer

TEXTS = ["the red fish and a bird", "né 東京", "bread " * 30, "x"]
KINDS = {
    "text": [{"text": text} for text in TEXTS],
    "pairs": [{"prompt": text, "completion": text[::-1]} for text in [*TEXTS, ""]],
    "labels": [{"text": text, "label": label} for text, label in zip(TEXTS, "abab", strict=True)],
}


@pytest.fixture
def load(tmp_path, monkeypatch):
    """`load(rows, large, **options)`: a set whose arrays are in files where it is large."""

    def make(rows, large, cache="cache", **options):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(store, "IN_MEMORY", 0 if large else 1 << 20)
        options = {"seq_len": 16, "template": "{text}: {label}", **options}
        return load_text(
            f"jsonl:{tmp_path / 'rows.jsonl'}", make_tokenizer(True),
            cache=tmp_path / cache, **options,
        )  # fmt: skip

    return make


def folders(tmp_path):
    return sorted(path.name for path in (tmp_path / "cache").iterdir())


@pytest.mark.parametrize("kind", KINDS)
def test_rows_on_disk_are_those_in_memory(load, kind, tmp_path):
    small, large, again = (load(KINDS[kind], where) for where in (False, True, True))
    assert len(folders(tmp_path)) == 1 and folders(tmp_path)[0].startswith("text-")
    for made in (large, again):
        assert made.report == small.report and made.labels == small.labels
        for name in ("record_ids", "n_bytes", "_tokens", "_trained", "_spans"):
            first, second = getattr(small, name), getattr(made, name)
            assert first.dtype == second.dtype and np.array_equal(first, second), name
        assert isinstance(made._tokens.base, np.memmap)
        for i in range(len(small)):
            assert np.array_equal(small[i].tokens, made[i].tokens)
            assert np.array_equal(small[i].weights, made[i].weights)


def test_text_is_tokenised_again_only_where_something_changed(load, tmp_path, monkeypatch):
    load(KINDS["text"], True)
    load(KINDS["text"], True, seq_len=8)
    load(KINDS["text"], True, vocab_size=1000)
    load([*KINDS["text"], {"text": "more"}], True)
    assert len(folders(tmp_path)) == 4

    def never(*_):
        raise AssertionError("tokenised again")

    monkeypatch.setattr(dataset, "_encode_all", never)
    assert len(load(KINDS["text"], True, seq_len=8)) > len(load(KINDS["text"], True))


def test_a_run_that_stops_half_way_leaves_nothing(load, tmp_path):
    with pytest.raises(UserError, match="vocabulary has 5 rows"):
        load(KINDS["text"], True, vocab_size=5)
    assert folders(tmp_path) == []


def test_a_disk_error_is_one_line_naming_the_folder(load, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot keep tokenised text in .*file/text-.*; free"):
        load(KINDS["text"], True, cache="file")
