import json
import random
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, pre_tokenizers
from transformers import AutoTokenizer

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_tokenizer import CUTS, GgufTokenizer

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["Ġt", "he", "Ġthe", "20", "23", "2023", "123", "hello"]
MERGES = ["Ġ t", "h e", "Ġt he", "2 0", "2 3", "20 23", "1 23"]
SPECIAL = ["<s>", "</s>", "<|tool|>"]
MIXED = "Hello the  world\n\n\t2023 it's IT'S ½x²  [a+b]=~123456 \u00a0 naïve 漢字 🙂 $5\r\n  "


def byte_level(**settings) -> dict:
    tokens = ALPHABET + WORDS + SPECIAL
    return {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "token_type": [1] * (len(tokens) - 3) + [3, 3, 4],
        "merges": MERGES,
        "bos_token_id": tokens.index("<s>"),
        "eos_token_id": tokens.index("</s>"),
        **settings,
    }


def sentencepiece(**settings) -> dict:
    words = ["▁t", "he", "▁the", "▁▁", "ab", "abc", "bc", "▁a", "aa"]
    letters = sorted(set("thebc a".replace(" ", "▁")))
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *words, *letters]
    ranks = [-float(i) for i in range(len(words) + len(letters))]
    return {
        "model": "llama",
        "tokens": tokens,
        "token_type": [2, 3, 3, *[6] * 256, *[1] * len(ranks)],
        "scores": [0.0] * 259 + ranks,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
        **settings,
    }


def wrap(settings: dict) -> GgufTokenizer:
    kept = {k: v for k, v in settings.items() if v is not None}
    metadata = {f"tokenizer.ggml.{key}": value for key, value in kept.items()}
    return GgufTokenizer(Path("m.gguf"), metadata)


def pieces(tokenizer: Tokenizer, text: str) -> list[str]:
    return [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def test_smollm_splits_digits_and_is_otherwise_gpt2():
    pre = pre_tokenizers
    original = pre.Sequence([pre.Digits(True), pre.ByteLevel(add_prefix_space=False)])
    tokenizer = wrap(byte_level()).build()
    assert tokenizer.encode("2023").tokens == ["2", "0", "2", "3"]
    assert pieces(tokenizer, MIXED) == [p for p, _ in original.pre_tokenize_str(MIXED)]


def test_gpt2_cuts_as_byte_level_does():
    tokenizer = wrap(byte_level(pre="gpt-2")).build()
    original = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert tokenizer.encode("2023").tokens == ["2023"]
    assert pieces(tokenizer, MIXED) == [p for p, _ in original.pre_tokenize_str(MIXED)]


def test_llama_bpe_groups_three_digits_and_ignores_merges_of_known_words():
    tokenizer = wrap(byte_level(pre="llama-bpe", add_bos_token=False)).build()
    assert pieces(tokenizer, "12345 IT'S\n\n x") == ["123", "45", "ĠIT", "'S", "ĊĊ", "Ġx"]
    assert tokenizer.encode("hello").tokens == ["hello"]  # no merge makes it


def test_default_cuts_as_llama_cpp_does():
    tokenizer = wrap(byte_level(pre=None)).build()
    assert pieces(tokenizer, "a+b 12345!") == ["a", "+", "b", "Ġ", "123", "45", "!"]


@pytest.mark.parametrize("cut", CUTS)
def test_byte_level_round_trip(cut):
    tokenizer = wrap(byte_level(pre=cut, add_bos_token=False)).build()
    assert tokenizer.decode(tokenizer.encode(MIXED).ids) == MIXED


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (byte_level(add_bos_token=True), ["<s>", "he"]),
        (byte_level(add_bos_token=False), ["he"]),
        (byte_level(), ["he"]),
        (byte_level(pre="llama-bpe"), ["<s>", "he"]),
        (byte_level(pre="llama-bpe", add_bos_token=False), ["he"]),
        (byte_level(add_bos_token=True, add_eos_token=True), ["<s>", "he", "</s>"]),
        (sentencepiece(), ["<s>", "▁", "he"]),
        (sentencepiece(add_bos_token=False, add_space_prefix=False), ["he"]),
    ],
)
def test_t25_bos_exactly_when_the_file_says_so(tmp_path, settings, expected):
    for name, content in wrap(settings).files(64).items():
        (tmp_path / name).write_bytes(content)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.convert_ids_to_tokens(tokenizer("he")["input_ids"]) == expected
    ids = tokenizer("he", add_special_tokens=False)["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids) == [t for t in expected if t not in SPECIAL]
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")


def test_control_tokens_are_special_and_user_defined_are_not():
    tokenizer = wrap(byte_level()).build()
    encoded = tokenizer.encode("he<|tool|></s>")
    assert encoded.tokens == ["he", "<|tool|>", "</s>"]
    assert tokenizer.decode(encoded.ids) == "he<|tool|>"


def by_definition(settings: dict, text: str) -> list[str]:
    """SentencePiece's BPE: join the best-scored neighbouring pair, the leftmost of equals."""
    tokens, scores = settings["tokens"], settings["scores"]
    score = {t: scores[i] for i, t in enumerate(tokens) if settings["token_type"][i] == 1}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        joined = [(score.get(a + b), -i) for i, (a, b) in enumerate(pairwise(parts))]
        joined = [(s, i) for s, i in joined if s is not None]
        if not joined:
            break
        at = -max(joined)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    as_bytes = ([p] if p in score else [f"<0x{b:02X}>" for b in p.encode()] for p in parts)
    return [token for group in as_bytes for token in group]


def test_sentencepiece_agrees_with_its_definition():
    settings, rng = sentencepiece(add_bos_token=False), random.Random(0)
    tokenizer = wrap(settings).build()
    for _ in range(500):
        text = "".join(rng.choices("thebca  zé🙂\n", k=rng.randrange(1, 30)))
        encoded = tokenizer.encode(text)
        assert encoded.tokens == by_definition(settings, text), text
        assert tokenizer.decode(encoded.ids) == text


def test_t27_every_stop_token_is_in_the_generation_config():
    files = wrap(byte_level(eot_token_id=3, eom_token_id=3, padding_token_id=0)).files(64)
    generation = json.loads(files["generation_config.json"])
    assert generation["eos_token_id"] == [byte_level()["eos_token_id"], 3]
    assert generation["pad_token_id"] == 0 and "chat_template.jinja" not in files


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (byte_level(model="bert"), "tokenizer 'bert'"),
        (byte_level(pre="klingon"), "pre-tokenizer 'klingon'"),
        (byte_level(pre=[1]), "pre-tokenizer"),
        (byte_level(tokens=None), "tokens is missing"),
        (byte_level(tokens=[1, 2]), "tokens is missing or no list of str"),
        (byte_level(token_type=[1]), "lacks types"),
        (byte_level(merges=["nospace"]), "damaged"),
        (byte_level(merges=["zz zz"]), "damaged"),
        (byte_level(bos_token_id=10**6), "expected a number below"),
        (byte_level(add_bos_token=True, bos_token_id=None), "bos_token_id is missing"),
        (sentencepiece(scores=[0.0]), "damaged"),
    ],
)
def test_bad_metadata_names_the_file(settings, message):
    with pytest.raises(UserError, match=message) as caught:
        wrap(settings).files(64)
    assert str(caught.value).startswith("m.gguf: ") and "\n" not in str(caught.value)
