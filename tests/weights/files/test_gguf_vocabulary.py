"""The metadata of a tokenizer: of byte-level BPE and of SentencePiece, rebuilt and compared."""

import gguf
import numpy as np
import pytest
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_tokenizer import CUTS
from jaxft.weights.files.gguf_vocabulary import vocabulary

TEXTS = ["the small birds sing", "a stool's leg is 2023 small", "  then\n\nthe other birds"] * 3
SIZE = 300


def byte_level(*cuts, added=()):
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre.Sequence(
        [*cuts, pre.ByteLevel(add_prefix_space=False, use_regex=not cuts)]
    )
    made.decoder = decoders.ByteLevel()
    alphabet = pre.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, BpeTrainer(vocab_size=280, initial_alphabet=alphabet))
    made.add_special_tokens(["<s>", "</s>"])
    made.add_tokens(list(added))
    return made


def fast(backend, **names):
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", **names
    )


def sentencepiece(prefix):
    """A BPE with byte fallback, as transformers converts Llama 2's."""
    letters = sorted({x for text in TEXTS for x in text if x not in " \n"} | {"▁"})
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *letters]
    pairs = [("t", "h"), ("▁", "th"), ("▁th", "e"), ("b", "i"), ("s", "m"), ("▁", "t")]
    tokens += [left + right for left, right in pairs]
    vocab = {token: i for i, token in enumerate(tokens)}
    made = Tokenizer(models.BPE(vocab, pairs, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if prefix == "metaspace":  # as transformers 5 builds it
        made.pre_tokenizer = pre.Metaspace("▁", prepend_scheme="first", split=False)
    else:
        steps = [normalizers.Prepend("▁")] if prefix else []
        made.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "▁")])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def test_byte_level():
    added = [AddedToken("[tool]", special=False), AddedToken("<|end|>", special=False)]
    tokenizer = fast(
        byte_level(
            pre.Digits(individual_digits=True),
            pre.Split(Regex(CUTS["gpt-2"][0]), "isolated"),
            added=added,
        )
    )
    ids = tokenizer.get_vocab()
    made = vocabulary(tokenizer, SIZE, (ids["</s>"], ids["<|end|>"], ids["<s>"]), "here")
    tokens, kinds = made["tokenizer.ggml.tokens"], made["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == SIZE and {tokens[i]: i for i in ids.values()} == ids
    kind = gguf.TokenType
    wanted = {"<s>": kind.CONTROL, "[tool]": kind.USER_DEFINED, "<|end|>": kind.CONTROL}
    assert {token: kinds[ids[token]] for token in wanted} == wanted
    assert set(kinds[max(ids.values()) + 1 :]) == {kind.UNUSED} and kinds[0] == kind.NORMAL
    assert made["tokenizer.ggml.model"] == "gpt2" and made["tokenizer.ggml.pre"] == "smollm"
    assert made["tokenizer.ggml.bos_token_id"] == ids["<s>"]
    assert made["tokenizer.ggml.eot_token_id"] == ids["<|end|>"]
    assert made["tokenizer.ggml.eom_token_id"] == ids["<s>"]
    flags = [made[f"tokenizer.ggml.add_{x}"] for x in ("bos_token", "eos_token", "space_prefix")]
    assert flags == [False, False, False]
    assert not {x for x in made if x.endswith(("padding_token_id", "unknown_token_id", "scores"))}


@pytest.mark.parametrize("name", [x for x in CUTS if x != "default"])
def test_the_name_of_every_known_way_to_cut(name):
    cuts = [pre.Split(Regex(pattern), "isolated") for pattern in CUTS[name]]
    backend = byte_level(*cuts)
    if name == "llama-bpe":
        backend.model.ignore_merges = True
    assert vocabulary(fast(backend), SIZE, (), "here")["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("prefix", [True, False, "metaspace"])
def test_sentencepiece(prefix):
    tokenizer = fast(sentencepiece(prefix), unk_token="<unk>", pad_token="</s>")
    made = vocabulary(tokenizer, 300, (), "here")
    assert made["tokenizer.ggml.model"] == "llama" and made["tokenizer.ggml.pre"] == "default"
    assert made["tokenizer.ggml.add_space_prefix"] is bool(prefix)
    assert made["tokenizer.ggml.add_bos_token"] and made["tokenizer.ggml.add_eos_token"]
    assert made["tokenizer.ggml.unknown_token_id"] == 0 and "tokenizer.ggml.merges" not in made
    kinds = made["tokenizer.ggml.token_type"]
    kind = gguf.TokenType
    assert kinds[:4].tolist() == [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, kind.BYTE]
    scores = dict(zip(made["tokenizer.ggml.tokens"], made["tokenizer.ggml.scores"], strict=True))
    assert [scores[x] for x in ("th", "▁th", "▁the", "bi", "sm", "▁t")] == [0, -1, -2, -3, -4, -5]
    assert scores.keys() > {"[PAD299]"} and isinstance(kinds, np.ndarray)


def wordlevel():
    return Tokenizer(models.WordLevel({"a": 0, "<s>": 1, "</s>": 2}, unk_token="a"))


def lowercased():
    made = byte_level(pre.Split(Regex(CUTS["gpt-2"][0]), "isolated"))
    made.normalizer = normalizers.Lowercase()
    return made


@pytest.mark.parametrize(
    ("make", "rows", "words"),
    [
        (wordlevel, SIZE, "GGUF cannot hold a WordLevel tokenizer"),
        (lambda: byte_level(pre.Whitespace()), SIZE, "cuts texts in a way that has no name here"),
        (lowercased, SIZE, "would cut texts into other tokens"),
        (byte_level, 281, "ids up to 281, but the model has 281 rows"),
    ],
)
def test_what_llama_cpp_does_not_have_is_refused(make, rows, words):
    with pytest.raises(UserError, match=f"^here: .*{words}"):
        vocabulary(fast(make()), rows, (), "here")


def test_a_slow_tokenizer_is_refused():
    class Slow:
        pass

    with pytest.raises(UserError, match=r"needs tokenizer\.json"):
        vocabulary(Slow(), 3, (), "here")
