"""What inspect_data shows of tiny sets: trained spans, counts, the page, and refusals."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxft import inspect_data
from jaxft.inspect_data import describe, page
from jaxft.tasks.llm.inspection import Inspection, Piece, pieces

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAIRS = [{"prompt": f"{i}: what?", "completion": " water" * (1 + i % 3)} for i in range(32)]

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def folder(make_folder):
    return make_folder(tied=True)


@pytest.fixture
def show(folder, make_flags, tmp_path, capsys):
    """`show(rows, {key: value}, *words)`: exit status, stdout and stderr for a set of records."""

    def run(rows, changes=None, *words):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        keys = {"data.train": f"jsonl:{file}", "data.eval": "", **(changes or {})}
        flags = make_flags(folder, keys)
        code = inspect_data.main(["--config", str(CONFIGS / "llm.py"), *flags, *words])
        return code, *capsys.readouterr()

    return run


def counted(shown, name):
    return re.search(rf"^{re.escape(name)} +(.*)$", shown, re.M)[1]


def test_counts_and_spans_of_pairs(show, folder):
    code, shown, _ = show(PAIRS, {}, "--rows=32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    sizes = [len(tokenizer(p["prompt"] + p["completion"])["input_ids"]) + 1 for p in PAIRS]
    n_trained = sum(len(tokenizer(p["completion"])["input_ids"]) + 1 for p in PAIRS)
    assert code == 0
    assert counted(shown, "examples") == "32" and counted(shown, "dropped") == "0"
    assert counted(shown, "tokens") == str(sum(sizes))
    share = f"{n_trained} ({n_trained / sum(sizes):.1%})"
    assert counted(shown, "trained tokens") == share
    assert counted(shown, "EOS </s>").split() == ["1", "32", "32"]
    assert counted(shown, "BOS <s>").split() == ["0", "0", "0"]
    for pair in PAIRS:
        assert f"| {pair['prompt']}[[{pair['completion']}</s>]]\n" in shown
    bars = [int(n) for n in re.findall(r"^ *\d+-\d+ +(\d+)", shown, re.M)]
    assert sum(bars) == 32


def test_packing_fills_more_positions(show):
    changes = {"batch_size": 32, "seq_len": 64}
    _, packed, _ = show(PAIRS, changes)
    _, alone, _ = show(PAIRS, {**changes, "pack": False})
    name = "positions with a token"
    shares = [float(counted(shown, name).split("%")[0]) for shown in (packed, alone)]
    assert "(packed, 20 batches)" in packed and "(one example a row, 20 batches)" in alone
    assert shares[0] > 1.5 * shares[1] > 0


def test_a_conversation_trains_answers_and_ends_of_turns(show, folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = CHATML.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
    (tmp_path / "chat.jinja").write_text(tokenizer.chat_template)
    turns = [("user", "water?"), ("assistant", "a\nplant"), ("user", "bread"), ("assistant", "x")]
    rows = [{"messages": [{"role": r, "content": c} for r, c in turns]}] * 8
    _, shown, _ = show(rows, {"chat": tmp_path / "chat.jinja"}, "--rows=1")
    lines = ["<s>user", "water?</s>", "<s>assistant", "[[a", "plant</s>]]", "<s>user"]
    lines += ["bread</s>", "<s>assistant", "[[x</s>]]"]
    assert "\n".join(f"| {line}" for line in lines) in shown
    assert counted(shown, "EOS </s>").split() == ["1", "32", "16"]
    assert counted(shown, "BOS <s>").split() == ["0", "32", "0"]


def test_mixtures_show_both_parts_and_evaluation(show, tmp_path, records_file):
    (tmp_path / "texts.jsonl").write_text('{"text": "a tall plant"}\n' * 10)
    mixed = f"0.5*{records_file} + 0.5*{tmp_path / 'texts.jsonl'}"
    code, shown, _ = show(
        [], {"data.train": mixed, "data.eval": f"jsonl:{records_file}"}, "--rows=8"
    )
    assert code == 0
    train, held_out = shown.split("data.eval: ")
    assert "50.0% from 10" in train and counted(train, "records") == "50"
    assert train.count("texts.jsonl:") >= 4 and "[[ tall plant</s>]]" in train
    assert "records.jsonl:1:" in held_out and "positions" not in held_out


def test_a_page_escapes_texts_and_holds_the_same(show, tmp_path):
    rows = [{"prompt": "<script>alert(1)</script>&", "completion": ' "<b>"'}] * 8
    code, shown, _ = show(rows, {}, "--html", str(tmp_path / "page.html"))
    made = (tmp_path / "page.html").read_text()
    assert code == 0 and "page.html" in shown
    assert "<script" not in made and "http" not in made
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in made
    assert "<mark> &quot;&lt;b&gt;&quot;</mark><mark><i>&lt;/s&gt;</i></mark>" in made
    parser = Parser()
    parser.feed(made)
    assert not parser.open, "each tag that is opened is closed"


class Parser(HTMLParser):
    """The tags that are open at the end of a page, and those that were closed out of turn."""

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def inspection(*texts):
    examples = [("a.jsonl:1", list(texts))]
    return Inspection(
        "data.train", "a", [("x", "1")], [("EOS", 1, 1, 1)], [(1, 2, 1)], [], examples
    )


def test_colours_are_reset_at_line_ends():
    pair = Piece("hi\n", False, False), Piece("one\n\ntwo", True, False), Piece("</s>", True, True)
    shown = describe(inspection(*pair), colour=True)
    lines = shown[shown.index("| ") :].split("\n")
    assert lines[1:3] == ["| \x1b[32mone\x1b[0m", "| "]
    assert lines[3] == "| \x1b[32mtwo\x1b[0m\x1b[1;32m</s>\x1b[0m"


def test_cut_characters_and_control_characters(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = np.asarray(tokenizer("é\x1b[2J\r\n")["input_ids"])
    found = pieces(tokenizer, ids, np.arange(len(ids)) > 0, ())
    assert "".join(one.text for one in found).endswith("\\x1b[2J\\r\n")
    assert [one.trained for one in found] == [False, True]
    whole = pieces(tokenizer, ids, np.arange(len(ids)) >= 0, ())
    assert [one.text for one in whole] == ["é\\x1b[2J\\r\n"]
    assert "é" not in page("m", [inspection(*found)])


def test_warnings(show):
    code, shown, _ = show([{"text": "a tall plant " * 40}] * 4, {"seq_len": 16, "batch_size": 8})
    assert code == 0 and "warning: " not in shown and int(counted(shown, "records split")) == 4
    long = [{"prompt": "water", "completion": " a tall plant" * 40}] * 8
    code, shown, _ = show(long, {"seq_len": 16})
    assert "warning: no end of a text (</s>) is trained" in shown
    assert "warning: 8 of 8 records are truncated: raise seq_len" in shown


def test_both_sides_of_pairs_are_shown(show):
    sides = [{**row, "chosen": row["completion"], "rejected": f" mud {len(row)}"} for row in PAIRS]
    code, shown, _ = show(sides, {"objective": "dpo"}, "--rows=2")
    assert code == 0 and counted(shown, "examples") == "64" and counted(shown, "EOS </s>")
    assert (
        len(re.findall(r"rows.jsonl:\d+, chosen: \d+ tokens, \d+ trained\n\| .*\[\[", shown)) == 2
    )
    assert len(re.findall(r"rows.jsonl:\d+, rejected: .*\n\| .*\[\[ mud", shown)) == 2
    good = [{**row, "label": i % 2 == 0} for i, row in enumerate(PAIRS)]
    code, shown, _ = show(good, {"objective": "kto"}, "--rows=9")
    assert code == 0 and ", desirable: " in shown and ", undesirable: " in shown
    assert shown.count(", answer to another prompt: ") == 9


def test_the_token_where_a_head_is_read_is_shown(show):
    texts = [{"text": f"a tall plant {i}", "label": ("wet", "dry")[i % 2]} for i in range(16)]
    code, shown, _ = show(texts, {"objective": "classify", "labels": "wet,dry"}, "--rows=4")
    assert code == 0 and counted(shown, "trained tokens").startswith("16 (")
    assert re.search(
        r"rows.jsonl:\d+, dry: \d+ tokens, 1 trained\n\| a tall plant .*\[\[\d\]\]", shown
    )
    assert "warning" not in shown
    sides = [{**row, "chosen": row["completion"], "rejected": " mud"} for row in PAIRS]
    code, shown, _ = show(sides, {"objective": "reward"}, "--rows=1")
    assert code == 0 and "[[</s>]]" in shown and counted(shown, "trained tokens").startswith("64 (")


@pytest.mark.parametrize(
    ("rows", "changes", "words", "said"),
    [
        ([{"prompt": "a", "completion": "</s>"}] * 8, {}, (), "besides '</s>'"),
        ([{"text": "<s><s>hello"}] * 8, {}, (), "begins with two BOS"),
        ([{"prompt": "a", "completion": ""}] * 8, {}, (), "leaves nothing to train on"),
        (PAIRS[:2], {}, (), "fewer than one batch"),
        (PAIRS, {}, ("--rows=x",), "--rows='x' must be a number"),
        (PAIRS, {"objective": "dpo"}, (), "objective=dpo and its like need"),
        (PAIRS, {}, ("--html=/absent/page.html",), "--html=/absent/page.html cannot be written"),
    ],
)
def test_mistakes_are_one_line(show, rows, changes, words, said):
    code, _, error = show(rows, changes, *words)
    assert code == 2 and said in error and error.count("\n") == 1


def test_only_language_models_have_texts(capsys):
    assert inspect_data.main(["--config", str(CONFIGS / "diffusion.py")]) == 2
    assert "task='diffusion'" in capsys.readouterr().err
    assert inspect_data.main([]) == 2
