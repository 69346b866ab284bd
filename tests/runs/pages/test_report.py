"""The report of a run folder: whole, escaped, without network, quick, also from few files."""

import json
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest

from jaxft import report
from jaxft.core.guards.best import BEST_FILE
from jaxft.runs.pages.records import MANY, leaves, read_history
from jaxft.runs.pages.report import REPORT, _change, write_report
from jaxft.runs.pages.samples import Samples
from jaxft.tasks import NOW, Sheet

EVIL = "<script>alert(\"a\")</script> & 'more'"
VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Tags, texts and attributes of a page. Raises where tags do not nest."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.words, self.sources = [], [], "", []
        self.feed(text)
        assert self.open in ([], ["html"]), f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style",):
            self.words += data


def make_run(folder, steps=60, every=20):
    """The files of a run whose texts all hold a script."""
    folder.mkdir()
    config = {"task": "llm", "model": EVIL, "data": {"eval": EVIL}, "batch_size": 8, "note": EVIL}
    (folder / "config.json").write_text(json.dumps(config))
    manifest = {
        "command": f"python -m jaxft.train --config.model={EVIL}", "total_steps": steps,
        "versions": {"jaxft": "9.9", "jax": None}, "data": {"train": EVIL, "truncated": 3},
        "peak_memory_bytes": 2**30, "memory_of": "a device", "seconds": 3725.0, "finished": True,
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps(manifest))
    before = {"metrics": {"loss": 3.0, "accuracy": 0.25}, "rows": [[EVIL, "x", "before it"]]}
    (folder / "before.json").write_text(json.dumps(before))
    lines = []
    for step in range(steps + 1):
        train = {"loss": 3 - step / steps, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_s": 100.0}
        if step:
            lines.append({"step": step, **train})
        if step % every == 0:
            measures = {"eval_loss": 3 - step / steps, "eval_accuracy": 0.25 + step / 200}
            lines.append({"step": step, **measures, f"eval_{EVIL}": 1.0})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    samples, side = Samples(folder), np.zeros((2, 8, 8, 3), np.uint8)
    for step in (0, 20, 40):
        given = {"target": side, NOW: side + np.uint8(step)}
        samples.write_sheet(step, "held-out", Sheet((EVIL, "b" * 300), given))
        rows = [(EVIL, "reference <i>", f"answer {step} <b>"), ("q", "", "")]
        samples.write_rows(step, "texts", ("prompt", "reference", "answer"), rows)
        samples.write_rows(step, "predictions", ("text", "label", EVIL), [(EVIL, "x", f"y{step}")])
    samples.write_picture(40, "confusion", side[0])
    return folder


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "run <script>alert(1)")


def test_every_text_is_escaped_and_nothing_is_fetched(finished):
    text = write_report(finished).read_text()
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.words.count(EVIL) >= 10, "the texts are there, as texts"
    assert {"i", "link", "iframe"}.isdisjoint(page.tags)
    assert page.sources and all(one.startswith("data:image/") for one in page.sources)
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_page_holds_what_a_person_looks_for(finished):
    words = Page(write_report(finished).read_text()).words
    for part in (
        "60 of 60 steps, finished", "3 → 2", "0.25 → 0.55", "1 h 2 min", "1.00 GiB",
        "peak memory of a device", "-33.3% better", "+120.0% better", "step 20",
        "answer 0 <b>", "answer 40 <b>", "before it", "y40", "b" * 300, "python -m jaxft.train",
        "3 texts were longer than seq_len", "empty", "jaxft 9.9", "confusion, step 40",
    ):  # fmt: skip
        assert part in words, part
    assert words.count("Learning rate") == 1


def test_the_best_step_has_its_column(finished):
    (finished / BEST_FILE).write_text(
        json.dumps({"measure": "accuracy", "step": 40, "value": 0.45})
    )
    words = Page(write_report(finished).read_text()).words
    (finished / BEST_FILE).unlink()
    assert "step 40 (best)" in words and "best accuracy, exported" in words


@pytest.mark.parametrize("left", ["config.json", "metrics.jsonl", "nothing"])
def test_a_folder_with_few_files_still_has_a_page(tmp_path, finished, left):
    if left != "nothing":
        (tmp_path / left).write_bytes((finished / left).read_bytes()[:-9] + b"\n")
    (tmp_path / "samples").mkdir()
    (tmp_path / "samples" / "texts-000000.json").write_text("{torn")
    Page(write_report(tmp_path).read_text())


def test_a_long_run_is_written_in_a_tenth_of_a_second(tmp_path):
    make_run(tmp_path / "run", steps=20_000, every=2000)
    write_report(tmp_path / "run")
    times = []
    for _ in range(7):
        began = time.process_time()
        write_report(tmp_path / "run")
        times.append(time.process_time() - began)
    assert min(times) < 0.1
    history = read_history(tmp_path / "run")
    assert len(history.train) <= MANY + 1 and history.train[-1]["step"] == 20_000
    assert len(history.evals) == 11 and history.last == 20_000


def test_an_evaluation_that_was_written_twice_counts_once(tmp_path):
    last = {"step": 4, "eval_loss": 1.0, "eval_kid-lite0": None}
    lines = [{"step": 4, "eval_loss": 2.0}, last, {"step": "x"}, 3]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    assert read_history(tmp_path).evals == [last]
    assert read_history(tmp_path).measures() == {"loss": 1.0}, "nothing that is not finite"
    Page(write_report(tmp_path).read_text())


def test_the_members_of_a_sweep_share_a_curve_and_have_a_table(tmp_path):
    rows = {"loss/lr1": 3.0, "loss/lr2": 1.0, "loss/lr3": 2.0}
    lines = [
        {
            "step": step,
            "eval_loss": 1.0,
            **{f"eval_{name}": x - step / 9 for name, x in rows.items()},
        }
        for step in (0, 4)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in lines))
    (tmp_path / "samples").mkdir()
    table = {"headers": ["member", "optim.lr", "loss"], "rows": [["lr2", "2", "1"]]}
    (tmp_path / "samples" / "predictions-000004.json").write_text(json.dumps(table))
    page = write_report(tmp_path).read_text()
    assert "Best and worst member" in page and "<h2>Members" in page and "loss/lr" not in page
    assert "lr2</span>" in page and "lr1</span>" in page and "lr3</span>" not in page


def test_leaves_are_short_texts():
    content = {"a": {"b": 12345, "c": []}, "d": [1, "x"], "e": 0.5, "f": None, "g": "", "h": True}
    assert dict(leaves(content)) == {"a.b": "12,345", "d": "1, x", "e": "0.5", "h": "True"}


def test_the_command_writes_the_page_of_a_run(finished, tmp_path, capsys):
    (finished / REPORT).unlink(missing_ok=True)
    assert report.main(["--workdir", str(finished)]) == 0
    assert (finished / REPORT).exists() and "report: " in capsys.readouterr().out
    assert report.main(["--workdir", str(tmp_path)]) == 2
    assert report.main([]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_change_of_many_times_is_no_percentage():
    assert "×445 better" in _change("token_accuracy", 0.001953, 0.8691)
    assert "÷1.05e+05 better" in _change("perplexity", 1.775e5, 1.684)
    assert "-95.7% better" in _change("loss", 12.09, 0.5214)
    assert "+0.5 better" in _change("accuracy", 0.0, 0.5)
