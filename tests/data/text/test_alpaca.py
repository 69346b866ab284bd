"""Alpaca's fields as its own two templates render them, and the request of a chat."""

import json

import pytest

from jaxft.core.errors import UserError
from jaxft.data.text.alpaca import alpaca_prompt, alpaca_request
from jaxft.data.text.dataset import encode, load_text
from tests.data.text.test_dataset import make_tokenizer

WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n### Instruction:\n"
    "Translate {it}.\n\n### Input:\nHund\n\n### Response:"
)
WITHOUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\nTranslate {it}.\n\n### Response:"
)


def test_prompts_are_those_of_stanford_alpaca():
    assert alpaca_prompt("Translate {it}.", "Hund") == WITH_INPUT
    assert alpaca_prompt("Translate {it}.", "") == WITHOUT
    assert alpaca_request("Translate.", "Hund") == "Translate.\n\nHund"
    assert alpaca_request("Translate.", "") == "Translate."


@pytest.mark.parametrize(
    ("more", "prompt"),
    [
        ({"input": "Hund"}, WITH_INPUT),
        ({"input": ""}, WITHOUT),
        ({"input": None}, WITHOUT),
        ({}, WITHOUT),
    ],
)
def test_a_record_equals_its_prompt_and_completion(more, prompt):
    """The sets have a column "text" too, which repeats the whole and is not used."""
    tokenizer = make_tokenizer(bos=True)
    row = encode(
        {"instruction": "Translate {it}.", "output": "dog", "text": "…", **more}, tokenizer
    )
    other = encode({"prompt": prompt, "completion": "dog"}, tokenizer)
    assert row.tokens.tolist() == other.tokens.tolist()
    assert row.weights.tolist() == other.weights.tolist()


def test_bad_alpaca_records_are_named(tmp_path):
    rows = [{"instruction": "a", "output": "b"}, {"instruction": "a", "output": "b", "input": 5}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=r"a.jsonl:2: field 'input' must be a string, found int"):
        load_text(f"jsonl:{tmp_path / 'a.jsonl'}", make_tokenizer(), seq_len=64)
