"""The tokenizer of a GGUF file, rebuilt as the files that transformers reads."""

import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers as pre
from tokenizers.processors import TemplateProcessing

from jaxft.core.errors import UserError

NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6  # tokenizer.ggml.token_type
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
# Patterns that cut text before merging, by tokenizer.ggml.pre (llama.cpp, src/llama-vocab.cpp).
# Each pattern cuts the pieces of the pattern before it: SmolLM's first cuts "2023" into digits.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Letters of a word in GPT-4o's and Mistral's tokenizers: capitals first, or small ones last.
_LARGE, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_BEFORE, _AFTER = r"[^\r\n\p{L}\p{N}]?", r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_OTHERS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
CUTS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", WORDS, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (WORDS,),
    "smollm": (r"\p{N}", WORDS),
    "llama-bpe": (_LLAMA3,),
    "dbrx": (_LLAMA3,),
    "gpt-4o": (
        f"{_BEFORE}{_LARGE}*{_SMALL}+{_AFTER}|{_BEFORE}{_LARGE}+{_SMALL}*{_AFTER}"
        rf"|\p{{N}}{{1,3}}{_OTHERS}",
    ),
    "tekken": (f"{_BEFORE}{_LARGE}*{_SMALL}+|{_BEFORE}{_LARGE}+{_SMALL}*" + r"|\p{N}" + _OTHERS,),
    "qwen2": (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    ),
}
ALIASES = {
    "llama3": "llama-bpe",
    "llama4": "gpt-4o",
    "smaug-bpe": "dbrx",
    "llama-v3": "llama-bpe",
    "falcon3": "llama-bpe",
    "starcoder": "smollm",
    "refact": "smollm",
    "command-r": "smollm",
}
# A piece that is a token is not merged, and BOS comes first where the file has no flag.
WHOLE_PIECES = ("llama-bpe", "tekken")


class GgufTokenizer:
    """The `tokenizer.*` metadata of one file.

    Raises: UserError that names the file, for values that are missing or wrong.
    """

    def __init__(self, path: Path, metadata: dict[str, Any]):
        self._path = path
        self._settings = {
            key.removeprefix("tokenizer.").removeprefix("ggml."): value
            for key, value in metadata.items()
            if key.startswith("tokenizer.")
        }

    def _error(self, text: str) -> UserError:
        return UserError(f"{self._path}: {text}")

    def _list(self, name: str, kind: type) -> list:
        value = self._settings.get(name)
        if not isinstance(value, list) or not all(type(item) is kind for item in value):
            raise self._error(f"tokenizer.ggml.{name} is missing or no list of {kind.__name__}")
        return value

    def token_id(self, name: str) -> int | None:
        """Return the id of `bos`, `eos`, `eot`, `eom`, `padding` or `unknown`, None where unset."""
        value, count = self._settings.get(f"{name}_token_id"), len(self._list("tokens", str))
        if value is not None and (type(value) is not int or not 0 <= value < count):
            raise self._error(f"{name}_token_id is {value!r}; expected a number below {count}")
        return value

    def files(self, context_length: int) -> dict[str, bytes]:
        """Return tokenizer.json, its config, generation_config.json, and a chat template if any."""
        tokens = self._list("tokens", str)
        names = {"bos": "bos", "eos": "eos", "padding": "pad", "unknown": "unk"}
        ids = {short: self.token_id(name) for name, short in names.items()}
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_max_length": context_length,
            **{f"{name}_token": tokens[i] for name, i in ids.items() if i is not None},
        }
        stops = dict.fromkeys(self.token_id(name) for name in ("eos", "eot", "eom"))
        generation = {
            "bos_token_id": ids["bos"],
            "eos_token_id": [i for i in stops if i is not None] or None,
            "pad_token_id": ids["pad"],
        }
        files = {
            "tokenizer.json": self.build().to_str(pretty=True).encode(),
            "generation_config.json": _json(generation),
        }
        template = self._settings.get("chat_template")
        if isinstance(template, str):
            settings["chat_template"] = template
            files["chat_template.jinja"] = template.encode()
        return {**files, "tokenizer_config.json": _json(settings)}

    def build(self) -> Tokenizer:
        """Return the tokenizer. It adds BOS and EOS by the file's flags.

        Raises: UserError for a type of tokenizer that is not supported, and for a damaged one.
        """
        kind, cut = self._settings.get("model"), str(self._settings.get("pre", "default"))
        cut = ALIASES.get(cut, cut)
        try:
            if kind == "gpt2" and cut in CUTS:
                tokenizer = _byte_level(self._vocab(), self._list("merges", str), cut)
            elif kind == "llama":
                tokenizer = self._sentencepiece()
            else:
                known = ", ".join([*CUTS, *ALIASES])
                expected = f"expected 'llama', or 'gpt2' with one of {known}; use its HF folder"
                raise self._error(f"tokenizer {kind!r} with pre-tokenizer {cut!r}; {expected}")
            self._add_special_tokens(tokenizer)
        except UserError:
            raise
        except Exception as error:  # tokenizers raises nothing narrower
            raise self._error(f"its tokenizer is damaged ({error})") from error
        bos = self._settings.get("add_bos_token", kind == "llama" or cut in WHOLE_PIECES)
        self._add_ends(tokenizer, bos, self._settings.get("add_eos_token", False))
        return tokenizer

    def _vocab(self) -> dict[str, int]:
        tokens = self._list("tokens", str)
        vocab = {token: i for i, token in enumerate(tokens)}
        if not len(vocab) == len(tokens) == len(self._list("token_type", int)):
            raise self._error("its vocabulary repeats tokens or lacks types; use its HF folder")
        return vocab

    def _sentencepiece(self) -> Tokenizer:
        """Return a BPE tokenizer equal to SentencePiece.

        SentencePiece joins the pair whose result has the best score, so the merges are all pairs in
        the order of their results' scores.
        """
        vocab, scores = self._vocab(), self._list("scores", float)
        kinds = self._list("token_type", int)
        unknown = self._list("tokens", str)[self.token_id("unknown") or 0]
        ranked = []
        for text, index in vocab.items():
            if kinds[index] == NORMAL:
                pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
                pairs = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
                ranked += [(-scores[index], index, pair) for pair in pairs]
        merges = [pair for _, _, pair in sorted(ranked)]
        tokenizer = Tokenizer(
            models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=BYTE in kinds)
        )
        prefix = self._settings.get("add_space_prefix", True)
        prepend = [normalizers.Prepend("▁")] if prefix else []
        tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
        strip = [decoders.Strip(" ", 1, 0)] if prefix else []
        tokenizer.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
        )
        return tokenizer

    def _add_special_tokens(self, tokenizer: Tokenizer) -> None:
        tokens = zip(self._list("tokens", str), self._list("token_type", int), strict=True)
        tokenizer.add_tokens(
            [
                AddedToken(text, special=kind == CONTROL, normalized=False)
                for text, kind in tokens
                if kind in (CONTROL, USER_DEFINED)
            ]
        )

    def _add_ends(self, tokenizer: Tokenizer, bos: bool, eos: bool) -> None:
        ends: dict[str, list[tuple[str, int]]] = {"bos": [], "eos": []}
        for name in [name for name, wanted in (("bos", bos), ("eos", eos)) if wanted]:
            index = self.token_id(name)
            if index is None:
                raise self._error(f"add_{name}_token is on but {name}_token_id is missing")
            ends[name] = [(self._list("tokens", str)[index], index)]
        before, after = ([text for text, _ in end] for end in ends.values())
        if before or after:
            tokenizer.post_processor = TemplateProcessing(
                single=[*before, "$A", *after],
                pair=[*before, "$A", *after, *before, "$B", *after],
                special_tokens=ends["bos"] + ends["eos"],
            )


def _byte_level(vocab: dict[str, int], merges: list[str], cut: str) -> Tokenizer:
    pairs = [(merge[: (i := merge.index(" ", 1))], merge[i + 1 :]) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab, pairs, ignore_merges=cut in WHOLE_PIECES))
    splits = [pre.Split(Regex(pattern), "isolated") for pattern in CUTS[cut]]
    tokenizer.pre_tokenizer = pre.Sequence(
        [*splits, pre.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
