"""Text: what is trained follows from spans and lengths alone, whatever the token ids."""

import functools
import itertools
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from jaxft.core.errors import UserError
from jaxft.data.loader import eval_batches
from jaxft.data.sources.schemes import open_records
from jaxft.data.text.dataset import (
    Example,
    encode,
    first_tokens,
    label_rows,
    load_text,
    prompt_tokens,
    split_template,
)
from jaxft.data.text.packing import collate

TEMPLATE = "Definition: {text}\nCategory: {label}"
FEW = settings(max_examples=40, deadline=None)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
NOVEL = open_records("demo:novel/valid")[0]["text"]


@functools.cache
def make_tokenizer(bos: bool = False, pad: str = "<pad>", trim: bool = True):
    """A byte-level BPE trained on the demo novel; `bos`: adds BOS by default, as Llama does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(NOVEL[:20_000].splitlines(), trainer)
    template = processors.TemplateProcessing(
        single="<s> $A" if bos else "$A", special_tokens=[("<s>", 0)]
    )
    tokenizer.post_processor = processors.Sequence(
        [processors.ByteLevel(trim_offsets=trim), template]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token=pad
    )


@functools.cache
def make_metaspace_tokenizer():
    """A SentencePiece-like BPE: spaces become a mark, one is put in front, bytes as fallback."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace()
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=["<unk>", "<s>", "</s>", *bytes_], show_progress=False
    )
    tokenizer.train_from_iterator(NOVEL[:20_000].splitlines(), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def load_rows(rows: list[dict], tokenizer, **kwargs):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return load_text(f"jsonl:{path}", tokenizer, **kwargs)


def trained(example: Example) -> list[int]:
    return example.tokens[example.weights > 0].tolist()


def byte_lengths(tokenizer, ids) -> list[int]:
    """Bytes of each byte-level token, read off its own spelling (specials have none)."""
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [0 if t in tokenizer.all_special_tokens else len(t) for t in tokens]


@FEW
@given(st.lists(TEXTS.filter(str.strip), min_size=1, max_size=3), st.integers(1, 20), st.booleans())
def test_t10_windows_train_every_token_but_the_first_exactly_once(texts, seq_len, bos):
    tokenizer = make_tokenizer(bos)
    data = load_rows([{"text": text} for text in texts], tokenizer, seq_len=seq_len)
    for record, text in enumerate(texts):
        document = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]
        windows = [data[i] for i in np.flatnonzero(data.record_ids == record)]
        assert all(len(w.tokens) <= seq_len + 1 and w.weights[0] == 0 for w in windows)
        assert windows[0].tokens[0] == document[0]
        assert [t for w in windows for t in trained(w)] == document[1:]
        for left, right in itertools.pairwise(windows):
            assert left.tokens[-1] == right.tokens[0]
        lengths = byte_lengths(tokenizer, document)
        assert data.n_bytes[data.record_ids == record].sum() <= len(text.encode())
        if text.isascii():  # then no token shares a character with its neighbour
            assert data.n_bytes[data.record_ids == record].sum() == sum(lengths[1:])
    total = sum(data[i].weights.sum() for i in range(len(data)))
    assert data.report["trained_tokens"] == total


@FEW
@given(TEXTS, TEXTS, st.sampled_from([(False, True), (True, True), (True, False)]))
def test_t9_completion_starts_at_the_first_token_past_the_prompt(prompt, completion, kind):
    bos, trim = kind
    tokenizer = make_tokenizer(bos, trim=trim)
    example = encode({"prompt": prompt, "completion": completion}, tokenizer)
    assert example.tokens.dtype == np.int32 and example.weights.dtype == np.float32
    ids = tokenizer(prompt + completion)["input_ids"] + [tokenizer.eos_token_id]
    assert example.tokens.tolist() == ids  # tokenised jointly
    ends = np.cumsum(byte_lengths(tokenizer, ids))
    past = ends > len(prompt.encode())
    past[-1] = True
    past[0] = False  # nothing predicts the first token
    assert (example.weights > 0).tolist() == past.tolist()


@FEW
@given(st.text("abet ", max_size=12), st.text("abet ", min_size=1, max_size=12))
def test_t9_metaspace_tokenizers_find_the_same_border(prompt, completion):
    tokenizer, prompt = make_metaspace_tokenizer(), "x" + prompt
    example = encode({"prompt": prompt, "completion": completion}, tokenizer)
    ids = example.tokens.tolist()
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    # Every token spells its characters; the mark put in front of the text is one more.
    ends = np.cumsum([len(token) for token in tokenizer.convert_ids_to_tokens(ids[1:-1])]) - 1
    assert ends[-1] == len(prompt + completion)
    assert (example.weights > 0).tolist() == [False, *(ends > len(prompt)), True]


def test_n_bytes_counts_characters_that_take_several_tokens_once():
    text = "x é→𝄞 Z"
    for tokenizer in (make_tokenizer(True), make_metaspace_tokenizer()):
        data = load_rows([{"text": text}], tokenizer, seq_len=64)
        assert data.n_bytes.tolist() == [len(text.encode())]
        assert load_rows([{"text": text}], tokenizer, seq_len=2).n_bytes.sum() == data.n_bytes[0]


def test_t9_label_rows_train_the_label_and_eos_only():
    tokenizer = make_tokenizer()
    example = encode({"text": "a {label} stool", "label": "group"}, tokenizer, TEMPLATE)
    whole = "Definition: a {label} stool\nCategory: group</s>"
    assert tokenizer.decode(example.tokens) == whole
    assert tokenizer.decode(trained(example)) == " group</s>"


def test_t10_collate_shifts_restarts_positions_and_pads():
    rows = [
        Example(np.array([7, 8, 9, 4], np.int32), np.array([0, 0, 1, 1], np.float32)),
        Example(np.array([5, 6], np.int32), np.array([0, 1], np.float32)),
    ]
    batch = collate(rows, seq_len=4, batch_rows=3)
    assert batch["tokens"].tolist() == [[7, 8, 9, 0], [5, 0, 0, 0], [0] * 4]
    assert batch["targets"].tolist() == [[8, 9, 4, 0], [6, 0, 0, 0], [0] * 4]
    assert batch["weights"].tolist() == [[0, 1, 1, 0], [1, 0, 0, 0], [0] * 4]
    assert batch["segment_ids"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0] * 4]
    assert batch["positions"].tolist() == [[0, 1, 2, 0], [0] * 4, [0] * 4]
    kinds = {name: array.dtype for name, array in batch.items()}
    assert kinds.pop("weights") == np.float32 and set(kinds.values()) == {np.dtype(np.int32)}


def test_collate_refuses_rows_that_do_not_fit():
    row = Example(np.zeros(4, np.int32), np.ones(4, np.float32))
    with pytest.raises(ValueError, match="4 tokens does not fit seq_len=2"):
        collate([row], seq_len=2)
    with pytest.raises(ValueError, match="batch_rows=1 is fewer than the 2"):
        collate([row, row], seq_len=4, batch_rows=1)


@pytest.mark.parametrize("bos", [False, True])
def test_t11_a_pad_token_equal_to_eos_masks_nothing(bos):
    row = {"prompt": "A</s>", "completion": " b</s> c"}
    plain, same = (encode(row, make_tokenizer(bos, pad=pad)) for pad in ("<pad>", "</s>"))
    assert plain.tokens.tolist() == same.tokens.tolist()
    assert plain.weights.tolist() == same.weights.tolist()
    eos = make_tokenizer().eos_token_id
    assert trained(same).count(eos) == 2 and same.tokens.tolist().count(eos) == 3
    batch = collate([same], seq_len=16)
    assert batch["weights"].sum() == same.weights.sum()
    assert batch["segment_ids"].sum() == len(same.tokens) - 1


def test_t11_token_zero_is_a_token_like_others():
    tokenizer = make_tokenizer()
    assert tokenizer.convert_tokens_to_ids("<s>") == 0
    assert trained(encode({"prompt": "x", "completion": "<s>y"}, tokenizer))[0] == 0


def test_t14_eval_batches_hold_each_trained_token_once():
    rows = [{"text": f"row {i} " + "word " * i} for i in range(7)]
    data = load_rows(rows, make_tokenizer(True), seq_len=6)
    batches = list(eval_batches(data, 4, functools.partial(collate, seq_len=6)))
    assert {batch["tokens"].shape for batch in batches} == {(4, 6)}
    assert sum(batch["weights"].sum() for batch in batches) == data.report["trained_tokens"]
    padding = np.concatenate([batch["sample_ids"] for batch in batches]) == -1
    weights = np.concatenate([batch["weights"] for batch in batches])
    assert weights[padding].sum() == 0 and (weights[~padding].sum(axis=1) > 0).all()


@pytest.mark.parametrize(
    "record",
    [{"text": "hello"}, {"text": "<s>hello"}, {"prompt": "<s>he", "completion": "llo"},
     {"prompt": "", "completion": "<s>hello"}, {"prompt": "hello", "completion": "x"}],
)  # fmt: skip
def test_t25_one_bos_exactly_when_the_tokenizer_adds_it(record):
    with_bos, without = make_tokenizer(True), make_tokenizer(False)
    example = encode(record, with_bos)
    assert example.tokens.tolist().count(with_bos.bos_token_id) == 1
    assert example.tokens[0] == with_bos.bos_token_id and example.weights[0] == 0
    spelled = "<s>" in "".join(record.values())
    assert encode(record, without).tokens.tolist().count(without.bos_token_id) == spelled


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("text", ["The end", "The end</s>"])
def test_t25_documents_and_completions_end_with_one_trained_eos(bos, text):
    tokenizer = make_tokenizer(bos)
    for record in ({"text": text}, {"prompt": "Say: ", "completion": text}):
        example = encode(record, tokenizer)
        assert trained(example).count(tokenizer.eos_token_id) == 1
        assert example.tokens[-1] == tokenizer.eos_token_id and example.weights[-1] == 1


def test_t26_the_pad_id_and_vocabulary_size_are_never_asked_for():
    tokenizer = make_tokenizer(pad=None)
    data = load_rows([{"text": "no pad token here"}], tokenizer, seq_len=32)
    assert tokenizer.pad_token_id is None
    assert collate([data[0]], seq_len=32)["weights"].sum() == data.report["trained_tokens"]


@FEW
@given(st.text("ab ", max_size=40), st.text("ab", min_size=1, max_size=40),
       st.integers(1, 30), st.booleans())  # fmt: skip
def test_long_prompts_lose_their_left_end_then_completions_their_right(
    prompt, completion, seq_len, bos
):
    tokenizer = make_tokenizer(bos)
    record = {"prompt": prompt, "completion": completion}
    whole, limit = encode(record, tokenizer), seq_len + 1
    # The mask before the rule "no target at position 0" says where the completion starts.
    start = len(whole.tokens) - sum(
        end > len(prompt) for end in np.cumsum(byte_lengths(tokenizer, whole.tokens)).tolist()
    )
    head, body = whole.tokens[: int(bos)].tolist(), whole.tokens[int(bos) : start].tolist()
    tail = whole.tokens[start:].tolist()
    room = max(0, limit - len(head) - len(tail))
    expected = (head + body[len(body) - min(room, len(body)) :] + tail)[:limit]
    data = load_rows([record], tokenizer, seq_len=seq_len)
    assert data[0].tokens.tolist() == expected
    n_trained = min(len(tail), len(expected) - len(head))
    assert data[0].weights[1:].sum() == n_trained - (len(expected) == n_trained)
    assert data.report["truncated"] == (len(whole.tokens) > limit)


def test_empty_rows_are_dropped_and_counted():
    rows = [{"text": ""}, {"text": "fine\x00too"}, {"text": " \n"}]
    data = load_rows(rows, make_tokenizer(), seq_len=16)
    assert len(data) == 1 and data.record_ids.tolist() == [1]
    assert data.records.where(1).endswith("rows.jsonl:2")
    expected = {"records": 3, "examples": 1, "empty": 2, "untrained": 0, "truncated": 0, "split": 0}
    assert data.report.items() >= expected.items()


def test_all_masked_or_empty_rows_are_an_error():
    with pytest.raises(UserError, match=r"rows\.jsonl.* of 2 records 2 are empty"):
        load_rows(
            [{"prompt": "q", "completion": c} for c in ("", " ")], make_tokenizer(), seq_len=8
        )
    bare = make_tokenizer()
    with pytest.raises(UserError, match="1 have no trained token"):  # EOS alone predicts nothing
        load_rows([{"text": "</s>"}], bare, seq_len=8)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"prompt": "p"}, r"rows\.jsonl:2: field 'completion' is missing"),
        ({"prompt": "p", "completion": None}, r"rows\.jsonl:2: field 'completion' .* NoneType"),
        ({"prompt": 5, "completion": "c"}, r"rows\.jsonl:2: field 'prompt' must be a string.*int"),
        ({"prompt": "p", "completion": "\ud800"}, r"rows\.jsonl:2: .* lone surrogate"),
    ],
)
def test_bad_records_are_named_by_file_and_line(bad, message):
    rows = [{"prompt": "p", "completion": "c"}, bad]
    with pytest.raises(UserError, match=message) as caught:
        load_rows(rows, make_tokenizer(), seq_len=8)
    assert "\n" not in str(caught.value)


def test_unknown_fields_missing_templates_and_slow_tokenizers_are_refused():
    with pytest.raises(UserError, match=r"rows\.jsonl:1: found the fields 'question'; expected"):
        load_rows([{"question": "?"}], make_tokenizer(), seq_len=8)
    row = {"text": "t", "label": "l"}
    for template in (None, "{text}", "{label} {text}", "{text} {label} {label}"):
        with pytest.raises(UserError, match=r"must hold \{text\} once and after it \{label\} once"):
            load_rows([row], make_tokenizer(), seq_len=8, template=template)
    with pytest.raises(UserError, match="a fast tokenizer"):
        load_rows([row], object(), seq_len=8, template=TEMPLATE)
    with pytest.raises(UserError, match="seq_len=0"):
        load_rows([row], make_tokenizer(), seq_len=0, template=TEMPLATE)


def test_template_gives_the_whitespace_to_the_completion():
    assert split_template(TEMPLATE) == ("Definition: {text}\nCategory:", " ", "")
    assert split_template("{text}\n\n{label}.") == ("{text}", "\n\n", ".")


def test_label_rows_are_those_that_training_sees():
    tokenizer = make_tokenizer(True)
    labels = ["group", "act", "body"]
    rows = label_rows(tokenizer, "a stool", labels, TEMPLATE, 64)
    for label, row in zip(labels, rows, strict=True):
        example = encode({"text": "a stool", "label": label}, tokenizer, TEMPLATE)
        assert row.tokens.tolist() == example.tokens.tolist()
        assert row.weights.tolist() == example.weights.tolist()
        start = prompt_tokens(tokenizer, "Definition: a stool\nCategory:").tolist()
        assert start + trained(row) == row.tokens.tolist()
    with pytest.raises(UserError, match="put a space"):
        label_rows(tokenizer, "", ["n", "x"], "{text}i{label}", 64)


def test_label_rows_are_cut_as_training_cuts_them(tmp_path):
    tokenizer = make_tokenizer(True)
    record = {"text": NOVEL[:300], "label": "group of body"}
    kept = load_rows([record], tokenizer, seq_len=16, template=TEMPLATE)[0]
    (row,) = label_rows(tokenizer, record["text"], [record["label"]], TEMPLATE, 16)
    assert row.tokens.tolist() == kept.tokens.tolist() and row.tokens[0] == tokenizer.bos_token_id
    assert row.weights.tolist() == kept.weights.tolist()


@pytest.mark.parametrize(
    ("labels", "template", "alone"),
    [
        (["a", "b", "c"], "{text} {label}", True),
        (["a", "b"], "{text} {label}</s>", True),  # the text spells the end out itself
        (["a", "ab zz"], "{text} {label}", False),
        (["a", "a b"], "{text} {label}", False),
        (["zq", "zx"], "{text} {label}", False),
        (["a", "b"], "{text} {label} it is", False),
    ],
)
def test_case_llm_05_first_tokens_serve_only_where_they_decide(labels, template, alone):
    tokenizer = make_tokenizer(False)
    firsts = first_tokens(label_rows(tokenizer, "x", labels, template, 32))
    assert (firsts is not None) == alone
    if firsts is not None:
        assert tokenizer.convert_ids_to_tokens(firsts.tolist()) == [f"Ġ{x}" for x in labels]


def test_load_text_reads_the_demo_sets():
    tokenizer = make_tokenizer()
    valid = load_text("demo:supersense/valid", tokenizer, seq_len=64, template=TEMPLATE)
    assert len(valid.labels) == 25 and valid.report["records"] == len(valid) == 600
    labels = [valid.records[i]["label"] for i in valid.record_ids]
    assert valid.n_bytes.tolist() == [len(label) + 1 for label in labels]
    assert (
        repr(valid)
        == "TextDataset(JsonRecords('demo:supersense/valid', 600 records), 600 examples)"
    )
    novel = load_text("demo:novel/valid", tokenizer, seq_len=128)
    assert novel.labels == () and novel.report["split"] == 1
    first = len(tokenizer.convert_ids_to_tokens(int(novel[0].tokens[0])))
    assert novel.n_bytes.sum() == len(NOVEL.encode()) - first


def test_importing_text_loads_neither_jax_nor_transformers():
    heavy = "{'jax', 'transformers', 'grain'}"
    code = f"import jaxft.data.text.dataset, sys; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
