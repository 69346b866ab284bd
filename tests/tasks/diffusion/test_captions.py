"""Captions become the ids that diffusers' pipelines make of them, with new words and cut ones."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from diffusers.loaders import TextualInversionLoaderMixin

from jaxft.core.errors import UserError
from jaxft.models.text_encoders.clip import CLIPTextConfig
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.tasks.diffusion.captions import Captions
from tests.tiny_pipelines import make_tokenizer

NEW = ("<cat-toy>", "<cat-toy>_1", "<cat-toy>_2")
TEXTS = [
    "a <cat-toy> here",
    "<cat-toy>, and <cat-toy>.",
    "x<cat-toy>y",
    "a cat-toy",
    "",
    "A <CAT-TOY>",
    "b" * 73 + " <cat-toy>",
    "b" * 90 + " <cat-toy>",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("tokens")
    make_tokenizer(work / "made")[0].save_pretrained(work / "saved")
    return work / "saved"


def opened(folder, new=(), lengths=(77,), vocab=378):
    texts = [
        CLIPTextConfig.from_hf({"vocab_size": vocab, "max_position_embeddings": n}) for n in lengths
    ]
    return Captions([load_tokenizer(folder) for _ in texts], texts, new)


@pytest.mark.parametrize("count", [1, 3])
def test_ids_are_those_of_diffusers(folder, count):
    theirs = load_tokenizer(folder)
    theirs.add_tokens(list(NEW[:count]))
    whole = TextualInversionLoaderMixin().maybe_convert_prompt(TEXTS, theirs)
    wanted = theirs(whole, padding="max_length", truncation=True, max_length=77).input_ids
    captions = opened(folder, NEW[:count])
    for text, ids in zip(TEXTS, wanted, strict=True):
        np.testing.assert_array_equal(captions(text), [ids], err_msg=text)
    assert 378 + count - 1 in captions(TEXTS[0])


def test_new_ids_follow_the_encoders_vocabulary(folder):
    """A model's table may be longer than its tokenizer's vocabulary."""
    (plain,), (moved,) = (opened(folder, NEW, vocab=v)(TEXTS[0]) for v in (378, 400))
    assert np.array_equal(np.where(plain >= 378, plain + 22, plain), moved)
    assert sorted(moved[moved >= 400]) == [400, 401, 402]


def test_threads_read_the_same_ids(folder):
    captions = opened(folder, NEW)
    wanted = [captions(text) for text in TEXTS]
    captions.ids_of("a"), captions.too_long(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(captions, TEXTS * 50))
    assert all(np.array_equal(ids, wanted[i % len(TEXTS)]) for i, ids in enumerate(made))


def test_what_is_cut_is_counted(folder):
    texts = ["b" * 75, "b" * 76, "b" * 80 + " <cat-toy>", "b" * 20, "b" * 74 + " <cat-toy>"] * 300
    assert opened(folder).too_long(texts) == 3 * 300  # letters of the word are tokens here
    assert opened(folder, NEW[:1]).too_long(texts) == 2 * 300
    assert opened(folder, NEW).too_long(texts) == 3 * 300
    both = opened(folder, lengths=(10, 10))
    assert both.length == 10 and both.too_long(["b" * 9, "b" * 8]) == 1
    assert opened(folder).too_long([]) == 0


def test_the_new_word_is_looked_for_in_what_is_read(folder):
    captions = opened(folder, NEW)
    found = [captions.names_new(text) for text in TEXTS]
    assert found == [True, True, True, False, False, True, True, False]


def test_words_that_are_no_single_token(folder):
    captions = opened(folder, NEW[:1])
    assert captions.ids_of("a") == [252]
    for word, shown in {"toy": "t o y</w>", "": "nothing", "<|endoftext|>": "endoftext"}.items():
        with pytest.raises(UserError, match="is not one token") as error:
            captions.ids_of(word)
        assert shown in str(error.value) and "\n" not in str(error.value)


def test_a_word_that_is_known_already(folder):
    with pytest.raises(UserError, match=r"saved has 'a</w>' in its vocabulary"):
        opened(folder, ("a</w>",))


def test_case_llm_01_tokens_beyond_an_encoders_table(folder, tmp_path):
    """An added token that is stale would read the new word's row, or the last one."""
    tokenizer = load_tokenizer(folder)
    tokenizer.add_tokens(["<old>"])
    tokenizer.save_pretrained(tmp_path)
    for new in ((), NEW):
        captions = opened(tmp_path, new)
        assert captions.too_long(["a cat", "b" * 90 + " <old>"]) == 1, "what is cut is not used"
        for ask in (captions, captions.names_new, lambda text, c=captions: c.too_long([text])):
            with pytest.raises(
                UserError, match=r"'an <old> cat': token '<old>' .* 378, .* 378 row"
            ):
                ask("an <old> cat")
        with pytest.raises(UserError, match=r"inversion\.init='<old>': .* 378"):
            captions.ids_of("<old>")
    with pytest.raises(UserError, match=r"id 37[67], .* 300 rows"):
        opened(folder, vocab=300)
