"""Vendors' chat templates, as trl ships them, on a small tokenizer with the vendor's own tokens."""

import functools
import importlib.util
import json
import re
from pathlib import Path

from tokenizers import AddedToken

from jaxft.data.text.chat.format import ChatFormat
from tests.data.text.test_dataset import make_tokenizer

GOLDEN = json.loads((Path(__file__).parents[3] / "golden" / "chat.json").read_text())
EOS = {"phi3": "<|endoftext|>", "gptoss": "<|return|>"}  # others end a text as they end a turn
DATE = "01 Jan 2026"


def template_text(name: str) -> str:
    """The Jinja source in the package trl, which is read as a file and never imported."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None and spec.origin is not None, "pip install --no-deps trl==1.16.0"
    text = (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text()
    return re.sub(r"strftime_now\([^)]*\)", f"'{DATE}'", text)


@functools.cache
def make_chat(name: str, variant: str = "") -> ChatFormat:
    """The format of a template, with every marker of its rendered goldens as a special token."""
    facts = GOLDEN["templates"][name]
    marker = r"<\|[a-z_]+\|>|<[a-z]+_of_turn>|<bos>|<｜[^｜]+｜>"
    found = {facts["bos"], EOS.get(name, facts["end_of_turn"])} - {""}
    for text in facts["rendered"].values():
        found |= set(re.findall(marker, text)) if isinstance(text, str) else set()
    tokenizer = make_tokenizer.__wrapped__()
    tokenizer.add_tokens([AddedToken(text, special=True) for text in sorted(found)])
    tokenizer.eos_token = EOS.get(name, facts["end_of_turn"])
    tokenizer.bos_token = facts["bos"] or None
    return ChatFormat(tokenizer, template_text(name + variant), f"the template {name}{variant}")
