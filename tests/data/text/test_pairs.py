"""Preference records as pairs of rows: where completions start, what is cut, dropped, refused."""

import json

import numpy as np
import pytest
from transformers import AutoTokenizer

from jaxft.core.errors import UserError
from jaxft.data.text import store
from jaxft.data.text.chat.format import ChatFormat
from jaxft.data.text.pairs import load_pairs, mismatched

BOS, EOS = 0, 1


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


@pytest.fixture
def load(tokenizer, tmp_path):
    """`load(records, seq_len=…)`: these records as a file, tokenised."""

    def run(records, **options):
        file = tmp_path / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in records))
        return load_pairs(f"jsonl:{file}", tokenizer, **{"seq_len": 64, **options})

    return run


def test_empty_answers_of_kto_cost_no_other_record(load):
    """The second side of a record is another one's answer, never an empty one."""
    rows = [{"prompt": "A", "completion": f" water {i}", "label": True} for i in range(10)]
    rows.append({"prompt": "B", "completion": " ", "label": False})
    rows += [{"prompt": "B", "completion": f" tree {i}", "label": False} for i in range(5)]
    data = load(rows, labelled=True)
    assert data.report["empty"] == 1 and len(data) == 15


def pair(prompt="a tree", chosen=" is tall", rejected=" is water"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def trained(tokenizer, example):
    return tokenizer.decode(example.tokens[example.weights > 0])


def test_b1_completions_start_where_the_ids_of_prompt_and_both_sides_diverge(load, tokenizer):
    for side in load([pair()])[0].sides:
        text = trained(tokenizer, side)
        assert text in (" is tall</s>", " is water</s>")
        assert len(side.tokens) - side.weights.sum() == len(tokenizer("a tree").input_ids)


def test_b1_a_token_that_crosses_the_border_in_one_side_starts_both(load, tokenizer):
    """The end of the prompt joins the answer in one side alone: both train from before it."""
    prompt = "a small brown anim"
    ids = tokenizer.encode(prompt)
    assert tokenizer.encode(prompt + "al")[: len(ids)] != ids, "merges over the border"
    assert tokenizer.encode(prompt + " of")[: len(ids)] == ids
    for side in load([pair(prompt, "al", " of")])[0].sides:
        first = int(np.argmax(side.weights > 0))
        assert first < len(ids) and side.tokens[:first].tolist() == ids[:first]


def test_b1_a_common_start_of_both_answers_is_trained(load, tokenizer):
    chosen, rejected = load([pair(chosen=" is a tree", rejected=" is a plant")])[0].sides
    assert trained(tokenizer, chosen) == " is a tree</s>"
    assert trained(tokenizer, rejected) == " is a plant</s>"


def test_implicit_prompt_is_the_common_prefix(load, tokenizer):
    record = {"chosen": "Q: what? A: a tree", "rejected": "Q: what? A: water"}
    for side, text in zip(load([record])[0].sides, (" a tree</s>", " water</s>"), strict=True):
        assert trained(tokenizer, side) == text


def test_b2_the_start_of_a_long_side_is_kept(load):
    record = pair(chosen=" tall and brown", rejected=" water and bread")
    whole, cut = load([record])[0], load([record], seq_len=6)
    assert cut.report["truncated"] == 1
    for side, long in zip(cut[0].sides, whole.sides, strict=True):
        assert side.tokens.tolist() == long.tokens[:7].tolist()
        assert side.weights.tolist() == long.weights[:7].tolist()


def test_b2_eos_ends_a_side_and_is_trained(load):
    for side in load([pair()])[0].sides:
        assert side.tokens[-1] == EOS and side.weights[-1] == 1 and side.weights[0] == 0


def test_b11_equal_sides_are_refused_with_their_place(load):
    with pytest.raises(UserError, match=r"rows\.jsonl:2: chosen and rejected are equal"):
        load([pair(), pair(chosen=" x", rejected=" x")])


def test_b11_pairs_that_are_equal_after_the_cut_are_dropped_with_a_warning(load, capsys):
    long = " is a tall plant with a hard stem"
    data = load([pair(), pair(chosen=long + " a", rejected=long + " b")], seq_len=10)
    assert len(data) == 1 and data.report["equal"] == 1
    assert "warning: 1 of 2 pairs" in capsys.readouterr().out


def test_pairs_without_an_answer_in_reach_are_dropped_and_counted(load):
    records = [pair(), pair("a tree" * 40), pair(chosen=" ")]
    data = load(records)
    counts = {name: data.report[name] for name in ("records", "examples", "untrained", "empty")}
    assert counts == {"records": 3, "examples": 1, "untrained": 1, "empty": 1}
    with pytest.raises(UserError, match="leaves no pair to compare"):
        load(records[1:])


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"prompt": "a", "chosen": "b"}, "found the fields 'prompt', 'chosen'"),
        ({"text": "a"}, "objective=dpo and its like need"),
        ({"prompt": "a", "chosen": "b", "rejected": 3}, "'rejected' must be a string"),
    ],
)
def test_bad_records_are_named(load, record, words):
    with pytest.raises(UserError, match=r"rows\.jsonl:1.*" + words):
        load([record])


def test_a_later_record_without_the_field_is_named(load):
    with pytest.raises(UserError, match=r"rows\.jsonl:2.*'rejected' is missing"):
        load([pair(), {"prompt": "a", "chosen": "b"}])


def labelled(prompt, completion, label=True):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_b10_a_labelled_answer_is_paired_with_that_of_another_prompt(load, tokenizer):
    rows = [labelled("a", " tree"), labelled("a", " plant", False), labelled("b", " water")]
    data = load(rows, labelled=True)
    assert [pair.desirable for pair in (data[i] for i in range(3))] == [True, False, True]
    assert [trained(tokenizer, data[i].sides[0]) for i in range(3)] == [
        " tree</s>",
        " plant</s>",
        " water</s>",
    ]
    assert [trained(tokenizer, data[i].sides[1]) for i in range(3)] == [
        " water</s>",
        " water</s>",
        " tree</s>",
    ]


@pytest.mark.parametrize("prompts", ["aab", "bab", "bbab", "abcab", "ab"])
def test_b10_every_record_gets_another_prompt(prompts):
    assert all(prompts[other] != prompts[i] for i, other in enumerate(mismatched(prompts)))


def test_b10_one_prompt_for_all_takes_the_next_record():
    assert mismatched("aaa") == [1, 2, 0]


def test_b10_equal_answers_to_two_prompts_are_kept(load):
    assert len(load([labelled("a", " yes"), labelled("b", " yes", False)], labelled=True)) == 2


def test_a_label_that_is_no_truth_value_is_refused(load):
    with pytest.raises(UserError, match=r"rows\.jsonl:1: field 'label' must be true or false"):
        load([labelled("a", " b", "good")], labelled=True)


def test_large_sets_are_files_with_the_same_pairs(load, tmp_path, monkeypatch):
    records = [pair(f"{i} a tree") for i in range(5)]
    memory = load(records)
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    for _ in range(2):  # written, then read
        disk = load(records, cache=str(tmp_path / "cache"))
        assert [disk.key(i) for i in range(5)] == [memory.key(i) for i in range(5)]
        assert disk.report == memory.report and disk.inputs(3) == memory.inputs(3)
    assert len(set(map(memory.key, range(5)))) == 5


# ---- chat ------------------------------------------------------------------------------------

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def chat(tokenizer):
    return ChatFormat(tokenizer, TEMPLATE, "the test's template")


def messages(record):
    turns = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {k: [{"role": turns[k], "content": v}] for k, v in record.items()}


def test_b1_strings_and_messages_become_the_same_turns(load, tokenizer, chat):
    plain = pair(chosen="is tall", rejected="is water")
    whole = messages(plain)
    implicit = {k: [*whole["prompt"], *whole[k]] for k in ("chosen", "rejected")}
    made = [load([record], chat=chat)[0] for record in (plain, whole, implicit)]
    for one in made:
        for side, answer in zip(one.sides, ("is tall", "is water"), strict=True):
            shown = tokenizer.decode(side.tokens)
            assert (
                shown.replace(" ", "")
                == f"<user>atree</s>\n<assistant>{answer.replace(' ', '')}</s>\n"
            )
            assert trained(tokenizer, side) == f"{answer}</s>", "answer and stop token, no newline"
        assert [s.tokens.tolist() for s in one.sides] == [s.tokens.tolist() for s in made[0].sides]


def test_whole_texts_without_a_prompt_are_no_turns(load, tokenizer, chat):
    plain = load([{"chosen": "a tree is tall", "rejected": "a tree is water"}], chat=chat)
    assert plain.chat is None
    assert tokenizer.decode(plain[0].sides[0].tokens).endswith("is tall</s>")


def test_kto_answers_the_prompt_of_another_conversation(load, tokenizer, chat):
    rows = [{"prompt": p, "completion": c, "label": i == 0} for i, (p, c) in enumerate(
        [("a tree", "is tall"), ("water", "is wet")])]  # fmt: skip
    first, second = (
        trained(tokenizer, side) for side in load(rows, labelled=True, chat=chat)[0].sides
    )
    assert (first, second) == ("is tall</s>", "is wet</s>")


def test_messages_need_a_chat_template(load):
    with pytest.raises(
        UserError, match=r"rows.jsonl:1: lists of messages need a chat template.*chat="
    ):
        load([messages(pair())])
    mixed = {**messages(pair()), "rejected": " is water"}
    with pytest.raises(UserError, match=r"rows.jsonl:1: chosen and rejected must both be strings"):
        load([mixed])
