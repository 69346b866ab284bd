"""Runs on mixtures and renamed fields: exact resume, and one line for what cannot be mixed."""

import csv
import json
from pathlib import Path

import pytest

from jaxft import train
from tests.interrupted import kill_after, start, timeless

ROOT = Path(__file__).resolve().parents[3]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]


@pytest.fixture(scope="module")
def model(make_folder):
    return make_folder(tied=True)


@pytest.fixture
def places(tmp_path):
    """Twenty questions as CSV, and nine plain texts as JSON lines."""
    with open(tmp_path / "a.csv", "w", newline="") as file:
        rows = [(f"question {i}\nof all", " answer" * (1 + i % 4)) for i in range(20)]
        csv.writer(file).writerows([("question", "answer"), *rows])
    lines = [json.dumps({"text": f"a plain text {i}"}) for i in range(9)]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    return tmp_path


@pytest.fixture
def flags(make_flags, model, places):
    base = {
        "data.train": f"0.75*{places}/a.csv + 0.25*jsonl:{places}/b.jsonl",
        "data.eval": f"{places}/a.csv",
        "columns": "prompt=question,completion=answer",
        "total": "10_steps",
        "every.save": "2_steps",
    }
    return lambda changes=(): [*CONFIG, *make_flags(model, {**base, **dict(changes)})]


def test_a_killed_run_on_a_mixture_resumes_bitwise(flags, places, capsys):
    assert train.main([*flags(), "--workdir", str(places / "whole")]) == 0
    assert "29 sequences (75.0% from 20, 25.0% from 9)" in capsys.readouterr().out
    process = start([*flags(), "--workdir", str(places / "broken")])
    assert kill_after(process, places / "broken", 5), "no process was killed in time"
    assert train.main([*flags(), "--workdir", str(places / "broken")]) == 0
    assert timeless(places / "whole") == timeless(places / "broken")


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("data.train", "0.5*{0}/a.csv + 0.5*{0}/none.csv", ["no file, folder or glob", "none.csv"]),
        ("data.train", "0.5*{0}/a.csv + {0}/b.jsonl", ["needs a positive weight", "b.jsonl'"]),
        ("data.train", "0.5*{0}/a.csv + 0.5*csv:{0}/a.csv", ["did you mean {0}/a.csv?"]),
        ("data.eval", "0.5*{0}/a.csv + 0.5*{0}/b.jsonl", ["weights have no effect", "a.csv + {0}"]),
        ("data.eval", "{0}/a.csv + demo:supersense/valid", ["with a label and records without"]),
        ("columns", "prompt=question,completion=reply", ["a.csv:2", "'reply'", "'answer'"]),
        ("columns", "prompt", ["expected pairs", "prompt=question"]),
        ("columns", "", ["a.csv:2: found the fields 'question', 'answer'", "config.columns="]),
    ],
)
def test_what_cannot_be_mixed_is_told_in_one_line(flags, places, capsys, key, value, words):
    changed = flags({key: value.format(places)})
    assert train.main([*changed, "--workdir", str(places / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("jaxft: ")
    for word in words:
        assert word.format(places) in error[0], error[0]
