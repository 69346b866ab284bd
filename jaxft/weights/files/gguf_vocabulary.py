"""The tokenizer of a model as the metadata of a GGUF file."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_tokenizer import (
    BYTE,
    CONTROL,
    CUTS,
    NORMAL,
    USER_DEFINED,
    WHOLE_PIECES,
    WORDS,
    GgufTokenizer,
)

UNKNOWN, UNUSED = 2, 5  # tokenizer.ggml.token_type
PLACEHOLDER = "[PAD{}]"  # llama.cpp's name of a row of the embedding without a token
# Tokens that llama.cpp's converter takes as special, whatever their file says.
LOOKS_SPECIAL = re.compile(
    r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<｜.*｜>|<unused.*>", re.DOTALL
)
PROBE = "Hello  World's 12345 Zürich\n\n\tx = 3.14; y += 'Don't'\r\n 你好 🙂 I'LL  we'd   "
INSTEAD = "use export.kind='merged' and llama.cpp's own converter"


def vocabulary(tokenizer: Any, rows: int, stops: Sequence[int], where: str) -> dict[str, Any]:
    """Return the `tokenizer.*` metadata of a fast tokenizer, without its chat template.

    rows: of the embedding. Those without a token get a placeholder. stops: ids that end a text,
    besides EOS. The tokenizer that llama.cpp will have is built from the result, and has to cut a
    text as this one does. `where` names the tokenizer in messages.
    Raises: UserError for a tokenizer that llama.cpp does not have.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{where}: GGUF needs tokenizer.json, and there is none; {INSTEAD}")
    content = json.loads(backend.to_str())
    model, added = content["model"], {x["id"]: x for x in content["added_tokens"]}
    if model.get("type") != "BPE":
        raise UserError(f"{where}: GGUF cannot hold a {model.get('type')} tokenizer; {INSTEAD}")
    names = {i: text for text, i in model["vocab"].items()}
    names |= {i: token["content"] for i, token in added.items()}
    if max(names) >= rows:
        raise UserError(
            f"{where}: its tokens have ids up to {max(names)}, but the model has {rows} rows, and"
            f" GGUF needs a row for each; remove the added tokens from tokenizer.json"
        )
    bytewise = bool(model.get("byte_fallback"))  # SentencePiece's, which llama.cpp calls llama
    unknown = model.get("unk_token") if bytewise else None
    made: dict[str, Any] = {
        "tokenizer.ggml.model": "llama" if bytewise else "gpt2",
        "tokenizer.ggml.pre": "default" if bytewise else _cut(content, where),
        "tokenizer.ggml.tokens": [names.get(i, PLACEHOLDER.format(i)) for i in range(rows)],
        "tokenizer.ggml.token_type": _types(names, added, rows, unknown, bytewise),
    }
    pairs = [one.split(" ", 1) if isinstance(one, str) else one for one in model["merges"]]
    if bytewise:
        made["tokenizer.ggml.scores"] = _scores(made["tokenizer.ggml.tokens"], pairs)
    else:
        made["tokenizer.ggml.merges"] = [" ".join(pair) for pair in pairs]
    made |= _ends(tokenizer, stops)
    made["tokenizer.ggml.add_space_prefix"] = _prefixes(content)
    _check_same(made, backend, where)
    return made


def _types(
    names: Mapping[int, str],
    added: Mapping[int, Mapping[str, Any]],
    rows: int,
    unknown: str | None,
    bytewise: bool,
) -> np.ndarray:
    kinds = np.full(rows, UNUSED, np.int32)
    for i, text in names.items():
        kinds[i] = NORMAL
        if i in added:
            special = added[i]["special"] or LOOKS_SPECIAL.fullmatch(text)
            kinds[i] = CONTROL if special else USER_DEFINED
        elif bytewise and re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            kinds[i] = BYTE
        if text == unknown:
            kinds[i] = UNKNOWN
    return kinds


def _scores(tokens: Sequence[str], pairs: Sequence[Sequence[str]]) -> np.ndarray:
    """Return scores whose order is that of the merges: minus the first rank of each result.

    llama.cpp joins the pair whose result has the best score. A token that no pair makes is never a
    result, so its score is not used.
    """
    ranks: dict[str, int] = {}
    for left, right in pairs:
        ranks.setdefault(left + right, len(ranks))
    return np.array([-float(ranks.get(token, 0)) for token in tokens], np.float32)


def _ends(tokenizer: Any, stops: Sequence[int]) -> dict[str, Any]:
    ids: dict[str, int | None] = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    # llama.cpp stops at the end of a turn and of a message too.
    ids |= dict(zip(("eot", "eom"), (i for i in stops if i != ids["eos"]), strict=False))
    made: dict[str, Any] = {
        f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items() if i is not None
    }
    encoded = tokenizer("a")["input_ids"]
    made["tokenizer.ggml.add_bos_token"] = encoded[0] == ids["bos"]
    made["tokenizer.ggml.add_eos_token"] = encoded[-1] == ids["eos"]
    return made


def _steps(part: Mapping[str, Any] | None, inner: str) -> list[Mapping[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer. `inner` is its key of a sequence."""
    if not part:
        return []
    nested = part.get(inner) if part["type"] == "Sequence" else None
    return [part] if nested is None else [one for step in nested for one in _steps(step, inner)]


def _prefixes(content: Mapping[str, Any]) -> bool:
    """Return True if a text gets a space in front."""
    before = _steps(content.get("normalizer"), "normalizers")
    cuts = _steps(content.get("pre_tokenizer"), "pretokenizers")
    return any(step["type"] == "Prepend" for step in before) or any(
        step.get("add_prefix_space") or step.get("prepend_scheme") in ("always", "first")
        for step in cuts
    )


def _cut(content: Mapping[str, Any], where: str) -> str:
    """Return llama.cpp's name of the patterns that cut a text before merging."""
    cuts: list[str] = []
    for step in _steps(content.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Split" and step.get("behavior") == "Isolated":
            cuts.append(str(step["pattern"].get("Regex")))
        elif step["type"] == "Digits" and step.get("individual_digits"):
            cuts.append(r"\p{N}")
        elif step["type"] == "ByteLevel":
            cuts += [WORDS] if step.get("use_regex", True) else []
        else:
            cuts.append(step["type"])
    # Two names differ only in whether a piece that is a token is merged.
    whole, known = bool(content["model"].get("ignore_merges")), tuple(cuts)
    found = [name for name, patterns in CUTS.items() if patterns == known]
    if found:
        return next((name for name in found if (name in WHOLE_PIECES) == whole), found[0])
    raise UserError(
        f"{where}: cuts texts in a way that has no name here; known are {', '.join(CUTS)} and"
        f" SentencePiece's: {INSTEAD}"
    )


def _check_same(made: Mapping[str, Any], backend: Any, where: str) -> None:
    plain = {x: y.tolist() if isinstance(y, np.ndarray) else y for x, y in made.items()}
    rebuilt = GgufTokenizer(Path(where), plain).build()
    if rebuilt.encode(PROBE).ids != backend.encode(PROBE).ids:
        raise UserError(f"{where}: llama.cpp would cut texts into other tokens; {INSTEAD}")
