"""Trial of an unknown tokenizer.json in a process of its own, with limits on time and memory.

A pattern of it can take for ever, a normaliser can grow a text without end, and the tokenizers
library can abort the process. A thread cannot stop that code, so another process runs it first.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_tokenizer import CUTS

TRIAL_SECONDS, TRIAL_BYTES = 10, 4 * 10**9  # a sound tokenizer needs 0.1 to 1 s and 0.1 to 1 GB
PARTS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
# Parts that work on each character, or by a pattern, are known. Others are tried.
KNOWN_PARTS = {
    *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Strip", "StripAccents", "Prepend"),
    *("BertNormalizer", "BertPreTokenizer", "Whitespace", "WhitespaceSplit", "Punctuation"),
    *("Digits", "Metaspace", "ByteLevel", "Split", "Replace", "BPEDecoder", "ByteFallback"),
    *("Fuse", "WordPiece", "TemplateProcessing", "BertProcessing", "RobertaProcessing"),
}
CLIP_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
KNOWN_PATTERNS = {
    *(pattern for patterns in CUTS.values() for pattern in patterns),
    *(CLIP_WORDS, rf"<\|startoftext\|>|<\|endoftext\|>|{CLIP_WORDS}"),
    *(r"\s+", " {2,}", r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"\p{N}{1,3}", r"[0-9]"),
}
KNOWN_CHANGES = ((" ", "▁"), ("▁", " "), (" ", ""))  # of normalisers and decoders
# It prints the error. PanicException of the library is no Exception.
_TRIAL = """
import contextlib, resource, sys
with contextlib.suppress(ValueError, OSError):  # systems without this limit
    resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[2]),) * 2)
from tokenizers import Tokenizer
try:
    tokenizer = Tokenizer.from_file(sys.argv[1])
except Exception:
    sys.exit(0)  # its readers tell why
try:
    tokenizer.decode(tokenizer.encode(sys.stdin.read()).ids)
except BaseException as error:
    print(*(str(error) or type(error).__name__).splitlines()[:1])
    sys.exit(1)
"""


def try_tokenizer(file: Path) -> None:
    """Raise UserError for a tokenizer.json that cannot encode a text within the limits.

    A file whose parts are all known is not tried. `file` may be damaged or absent: its readers
    tell that better.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return
    parts = [content.get(name) for name in PARTS] if isinstance(content, dict) else []
    if all(_is_known(part) for part in parts):
        return
    command = [sys.executable, "-P", "-c", _TRIAL, str(file), str(TRIAL_BYTES)]
    env = {**os.environ, "TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1"}
    try:
        end = subprocess.run(
            command,
            input=_text(parts),
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=TRIAL_SECONDS,
            env=env,
        )
    except subprocess.TimeoutExpired:
        reason = f"took longer than {TRIAL_SECONDS} s"
    else:
        if not end.returncode:
            return
        reason = end.stdout.strip() or f"needed more than {TRIAL_BYTES / 1e9:g} GB, or crashed"
    raise UserError(
        f"{file}: encoding a short text failed in a trial ({reason[:200]}); get the tokenizer.json"
        " of the model's publisher, or remove its unusual normalizer or pre_tokenizer"
    )


def _is_known(part: Any, depth: int = 0) -> bool:
    """Return True for a part whose kinds and patterns are those of well-known tokenizers."""
    if part is None:
        return True
    if not isinstance(part, dict) or str(part.get("type")) not in KNOWN_PARTS or depth > 9:
        return False
    inner = [one for value in part.values() if isinstance(value, list) for one in value]
    if part["type"] == "Sequence" and not all(_is_known(one, depth + 1) for one in inner):
        return False
    if "pattern" not in part:
        return True
    ((kind, pattern),) = _pattern(part["pattern"])
    if part["type"] == "Replace":
        return kind == "String" and (pattern, part.get("content")) in KNOWN_CHANGES
    return pattern in KNOWN_PATTERNS or (kind == "String" and len(pattern) == 1)


def _pattern(pattern: Any) -> list[tuple[str, str]]:
    """Return the kind and the text of a pattern, or a list of one unknown."""
    pairs = list(pattern.items()) if isinstance(pattern, dict) else []
    return [(kind, str(text)) for kind, text in pairs] if len(pairs) == 1 else [("", "")]


def _text(parts: list[Any]) -> str:
    """Return a text with long runs of the characters that the patterns name, and of common ones.

    Patterns with nested repeats take for ever on a run whose end does not match.
    """
    named = "".join(text for part in parts for text in _strings(part, 0))
    runs = dict.fromkeys(f"aA0 _.\n'-é中{named[:2000]}")
    mixed = "Hello  World's 12345 Zürich\n\n\tx = 3.14;\r\n 你好 🙂 I'LL   "
    return mixed + "".join(f"{one * 64}!\n" for one in runs)


def _strings(value: Any, depth: int) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list) and depth < 50:
        for one in value.values() if isinstance(value, dict) else value:
            yield from _strings(one, depth + 1)
