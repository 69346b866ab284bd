"""The side-car and the rows that it describes, against rows written out by hand."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxft.core.errors import UserError
from jaxft.objectives.codes import train_rows
from jaxft.tasks.image_tokens import layout as layouts
from jaxft.tasks.image_tokens.layout import ImageLayout

SMALL = ImageLayout(10, 10, 11, 12, 13, 14, 5, (2, 3), "{caption}", 4, "f")


@pytest.fixture(scope="module")
def tokenizer(tokenizer_folder):
    return AutoTokenizer.from_pretrained(tokenizer_folder)


def test_it_reads_what_it_writes():
    assert layouts.read_layout(SMALL.to_json().encode(), "x") == SMALL
    assert set(json.loads(SMALL.to_json())) == {f.name for f in dataclasses.fields(ImageLayout)}


def test_a_grafted_vocabulary_follows_the_text():
    made = layouts.extended(320, 16, (8, 8), "f")
    assert (made.boi, made.eoi, made.null, made.pad, made.image_offset) == (320, 321, 322, 323, 324)
    assert made.vocab_size == 340 and made.count == 64
    assert layouts.read_layout(made.to_json().encode(), "x") == made


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), min_size=1, max_size=4), st.data())
def test_rows_are_prompt_boi_codes(rows, data):
    """Property: dropped or not, whatever the lengths, each row is what one would write by hand."""
    width, n = SMALL.max_caption_tokens, SMALL.count
    lengths = np.array([length for length, _ in rows])
    dropped = np.array([drop for _, drop in rows])
    captions = np.full((len(rows), width), SMALL.pad)
    for row, (length, _) in enumerate(rows):
        ids = st.lists(st.integers(0, 9), min_size=length, max_size=length)
        captions[row, :length] = data.draw(ids)
    codes = np.array(
        [data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)) for _ in rows], np.uint16
    )
    made = train_rows(SMALL, captions, lengths, codes, dropped)
    for row, (length, drop) in enumerate(rows):
        prompt = [SMALL.null] if drop else captions[row, :length].tolist()
        ids = [SMALL.image_offset + int(code) for code in codes[row]]
        whole = [*prompt, SMALL.boi, *ids]
        tokens = np.asarray(made.tokens[row])
        assert tokens.tolist() == whole[:-1] + [SMALL.pad] * (
            layouts.row_length(SMALL) + 1 - len(whole)
        )
        assert np.asarray(made.image_targets[row]).tolist() == ids
        assert np.flatnonzero(made.images[row]).tolist() == [
            len(prompt) + 1 + i for i in range(n - 1)
        ]
        for place, target in zip(made.places[row], ids, strict=True):
            assert whole[int(place) + 1] == target, "each code is foretold from the token before"
        weights = np.asarray(made.text_weights[row])
        assert weights.sum() == pytest.approx(float(length > 0 and not drop))
        for place in np.flatnonzero(weights):
            assert int(made.text_targets[row, place]) == whole[place + 1]
            assert whole[place + 1] < SMALL.text_vocab or whole[place + 1] == SMALL.boi


@pytest.mark.parametrize("length", [4, 0])
def test_the_null_of_training_is_the_null_of_sampling(length):
    captions, codes = np.full((1, 4), 3), np.zeros((1, 6), int)
    made = train_rows(SMALL, captions, np.array([length]), codes, np.array([True]))
    tokens, mask = layouts.left_padded(SMALL, [layouts.null_prompt(SMALL, [3] * length)])
    prompt = tokens[0, mask[0] > 0]
    assert prompt.tolist() == [SMALL.null, SMALL.boi]
    assert np.asarray(made.tokens[0, : len(prompt)]).tolist() == prompt.tolist()


def test_prompts_stand_on_the_right_for_sampling():
    tokens, mask = layouts.left_padded(SMALL, [[1, 2], [3, 4, 5, 6]])
    assert tokens.tolist() == [[13, 13, 1, 2, 10], [3, 4, 5, 6, 10]]
    assert mask.tolist() == [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]


def test_a_long_caption_is_cut_and_the_template_stays(tokenizer):
    changes = {"prompt": "say {caption} now:", "max_caption_tokens": 30}
    layout = dataclasses.replace(SMALL, **changes, text_vocab=320)
    short = layouts.encode_prompt(layout, tokenizer, "a cat")
    assert not short.cut and tokenizer.decode(short.ids) == "say a cat now:"
    cut = layouts.encode_prompt(layout, tokenizer, "a tall plant with a hard stem zxqj " * 9)
    said = tokenizer.decode(cut.ids)
    assert cut.cut and 28 <= len(cut.ids) <= 30
    assert said.startswith("say a tall plant") and said.endswith(" now:")


def test_case_llm_01_a_token_that_would_be_a_code(tokenizer):
    """In one vocabulary with the codes, an id past the text means an image."""
    layout = dataclasses.replace(SMALL, max_caption_tokens=30, text_vocab=320)
    layouts.encode_prompt(layout, tokenizer, "a cat")
    fewer = dataclasses.replace(layout, text_vocab=100)
    with pytest.raises(UserError, match=r"caption 'a cat': token .* has the id .* 100 rows"):
        layouts.encode_prompt(fewer, tokenizer, "a cat")


BAD = [
    ({"boi": "x"}, "boi='x' must be a whole number"),
    ({"grid": [0, 3]}, "count=0 must be at least 1"),
    ({"grid": 6}, "grid=6 must be"),
    ({"prompt": 3}, "prompt=3 must be a text"),
    ({"pad": 3}, "pad=3 must lie between text and codes"),
    ({"pad": 12}, "must be four ids"),
    ({"codes": 0}, "codes=0 must be at least 1"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=lambda x: str(x))
def test_a_side_car_that_cannot_be(change, words):
    found = {**json.loads(SMALL.to_json()), **change}
    with pytest.raises(UserError, match=r"^here: ") as error:
        layouts.read_layout(json.dumps(found).encode(), "here")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_side_car_that_is_none():
    with pytest.raises(UserError, match="not readable as JSON"):
        layouts.read_layout(b"{", "here")
    with pytest.raises(UserError, match="no JSON object"):
        layouts.read_layout(b"[]", "here")
    with pytest.raises(UserError, match="lacks boi, codes"):
        found = {k: v for k, v in json.loads(SMALL.to_json()).items() if k not in ("boi", "codes")}
        layouts.read_layout(json.dumps(found).encode(), "here")


def test_a_tokenizer_that_does_not_fit(tokenizer, tokenizer_folder):
    def check(words, **changes):
        with pytest.raises(UserError, match=r"^here: ") as error:
            layouts.check_tokenizer(dataclasses.replace(SMALL, **changes), other, "here")
        assert words in str(error.value)

    other = AutoTokenizer.from_pretrained(tokenizer_folder)
    layouts.check_tokenizer(dataclasses.replace(SMALL, prompt="<s>{caption}"), other, "here")
    check("must contain {caption} once", prompt="an image")
    check("<|User|>, which is no token", prompt="<|User|>: {caption}")
    check("leaves no room", prompt="a picture of {caption} and nothing else")
    other.unk_token = "a"
    check("is the tokenizer's id of unknown tokens", pad=other.unk_token_id)
