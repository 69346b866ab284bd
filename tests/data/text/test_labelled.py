"""Labelled texts: ids as the tokenizer makes them, where the head is read, labels, refusals."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxft.core.errors import UserError
from jaxft.data.text import store
from jaxft.data.text.labelled import LabelRule, labels_in, load_labelled, read_at_end

PAD = 2
SINGLE = LabelRule(("calm", "loud"), "single_label_classification")
MULTI = LabelRule(("calm", "loud"), "multi_label_classification")
NUMBER = LabelRule(("stars",), "regression")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def load(tokenizer, tmp_path):
    """`load(records, rule, …)`: these records as a file, tokenised."""

    def run(records, rule=SINGLE, name="rows.jsonl", **options):
        file = tmp_path / name
        if name.endswith(".jsonl"):
            file.write_text("".join(json.dumps(row) + "\n" for row in records))
        else:
            file.write_text(records)
        options = {"seq_len": 12, "pad_id": PAD, "vocab_size": 320, **options}
        return load_labelled(str(file), tokenizer, rule, **options)

    return run


def test_c5_ids_are_those_of_the_tokenizer_and_the_head_is_read_at_the_last(load, tokenizer):
    texts = ["a small brown animal", "x", "ends<pad>", "<pad>", "a person who makes bread" * 5]
    data = load([{"text": text, "label": "loud"} for text in texts])
    for i, text in enumerate(texts):
        tokens, weights = data[i].example
        wanted = tokenizer(text, truncation=True, max_length=12)["input_ids"]
        assert tokens[:-1].tolist() == wanted and data.inputs(i) == len(wanted)
        real = [k for k, token in enumerate(wanted) if token != PAD]
        assert np.flatnonzero(weights).tolist() == [1 + (real[-1] if real else 0)]
    assert data.report["truncated"] == 1 and data.report["records"] == len(data) == 5


def test_c2_padding_inside_of_a_text_is_read_like_any_token():
    for ids, place in (([5, PAD, 6], 2), ([5, 6, PAD, PAD], 1), ([PAD, 5], 1), ([PAD, PAD], 0)):
        _, weights = read_at_end(np.asarray(ids, np.int32), PAD)
        assert np.flatnonzero(weights[1:]).tolist() == [place]


@pytest.mark.parametrize(
    ("rule", "record", "wanted"),
    [
        (SINGLE, {"label": "loud"}, 1),
        (SINGLE, {"label": 1}, 1),
        (LabelRule(("1", "0"), SINGLE.problem), {"label": 1}, 0),
        (LabelRule(("false", "true"), SINGLE.problem), {"label": True}, 1),
        (SINGLE, {"label": "1"}, 1),
        (LabelRule(("1", "2"), SINGLE.problem), {"label": 2}, 1),
        (MULTI, {"labels": ["loud", "calm"]}, [1, 1]),
        (MULTI, {"labels": []}, [0, 0]),
        (MULTI, {"label": [1]}, [0, 1]),
        (NUMBER, {"label": 2.5}, [2.5]),
        (NUMBER, {"label": "2.5"}, [2.5]),
        (LabelRule(("a", "b"), "regression"), {"labels": [1, -2]}, [1, -2]),
    ],
)
def test_labels_are_names_ids_lists_or_numbers(rule, record, wanted):
    np.testing.assert_array_equal(rule.read(record, "row"), wanted)


@pytest.mark.parametrize(
    ("rule", "record", "message"),
    [
        (SINGLE, {"label": "wet"}, "row: label 'wet' is not one of labels=calm,loud; correct it"),
        (SINGLE, {"label": 2}, "row: label 2 is not one of labels"),
        (LabelRule(("1", "2"), SINGLE.problem), {"label": 0}, "row: label 0 is not one of"),
        (SINGLE, {"label": None}, "row: label None is not one of"),
        (SINGLE, {"label": True}, "row: label True is not one of"),
        (SINGLE, {"class": "loud"}, "found the fields 'class'; objective=classify needs"),
        (MULTI, {"label": "loud"}, "field 'labels' must be a list, found 'loud'"),
        (MULTI, {"labels": ["wet"]}, "label 'wet' is not one of"),
        (NUMBER, {"label": "many"}, "must hold 1 finite numbers .* found 'many'"),
        (NUMBER, {"label": float("nan")}, "must hold 1 finite numbers"),
        (NUMBER, {"labels": [1, 2]}, "must hold 1 finite numbers"),
    ],
)
def test_bad_labels_are_named_with_their_row(rule, record, message):
    with pytest.raises(UserError, match=message) as caught:
        rule.read(record, "row")
    assert "\n" not in str(caught.value)


def test_blank_texts_are_counted_and_a_set_of_them_is_refused(load):
    data = load([{"text": " ", "label": "calm"}, {"text": "water", "label": "loud"}])
    assert len(data) == 1 and data.report["empty"] == 1 and data.labels.tolist() == [1]
    assert data.record_ids.tolist() == [1]
    with pytest.raises(UserError, match="leaves nothing to train on: every text is empty"):
        load([{"text": "\n", "label": "calm"}])


def test_a_table_with_renamed_columns(load):
    table = "review;mood\r\na tree;calm\r\nwater;loud\r\n"
    data = load(table, name="rows.csv", columns="text=review,label=mood")
    assert data.labels.tolist() == [0, 1]


def test_large_sets_are_the_same_from_files(load, tmp_path, monkeypatch):
    records = [{"text": f"water {i}", "labels": ["calm", "loud"][: i % 3]} for i in range(20)]
    memory = load(records, MULTI)
    monkeypatch.setattr(store, "IN_MEMORY", 10)
    for _ in range(2):
        files = load(records, MULTI, cache=tmp_path / "cache")
        assert files.report == memory.report
        np.testing.assert_array_equal(files.labels, memory.labels)
        for i in range(20):
            for one, other in zip(files[i].example, memory[i].example, strict=True):
                np.testing.assert_array_equal(one, other)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    load([{**one, "labels": []} for one in records], MULTI, cache=tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 2, "labels are part of the content"


def test_label_names_of_a_set(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "a", "label": "wet"}\n{"text": "b", "label": 3}\n{"text": "c"}\n')
    assert labels_in(str(file), "") == ["wet", "3"]
    file.write_text("".join(f'{{"text": "a", "label": {i}}}\n' for i in (10, 2, 1)))
    assert labels_in(str(file), "") == ["1", "2", "10"], "in the order of numbers"
    file.write_text('{"text": "a", "labels": ["b", "a"]}\n{"text": "a", "labels": []}\n')
    assert labels_in(str(file), "") == ["a", "b"]
    assert labels_in(str(tmp_path / "gone.jsonl"), "") == []
