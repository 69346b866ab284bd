"""The published checkpoints whose JSON files lie in tests/published: what works with each.

docs/compatibility.md is made of these rows, and tests/test_published.py proves them.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError
from jaxft.models import registry
from tests.stock_llama import fits, ours, theirs

FOLDER = Path(__file__).resolve().parent / "published"
FAMILY = "language model"
# How many files the hub holds the weights of those in that a test runs in small.
RUN = {
    "Llama-3.2-1B-Instruct": 1,
    "Llama-3.1-8B-Instruct": 4,
    "Mistral-7B-Instruct-v0.3": 3,
    "Qwen2.5-0.5B-Instruct": 1,
    "Qwen3-4B": 3,
    "gemma2_2b_it": 2,
    "phi3.5-mini-instruct": 2,
    "SmolLM2-135M": 1,
    "SmolLM3-3B": 2,
}


class Row(NamedTuple):
    """A checkpoint, its family, what is proved ("refused" if it is), and a note or the refusal."""

    checkpoint: str
    family: str
    works: str
    note: str


def language_model_configs() -> dict[str, dict[str, Any]]:
    """config.json of each language model by its checkpoint's name; pipelines have other files."""
    found = {
        path.parent.name: json.loads(path.read_text()) for path in FOLDER.glob("*/config.json")
    }
    return {name: found[name] for name in sorted(found) if "model_type" in found[name]}


def language_models() -> list[Row]:
    """A row for each language model. Raises where it is neither right nor refused by name."""
    return [_language_model(name, config) for name, config in language_model_configs().items()]


def _language_model(name: str, config: dict[str, Any]) -> Row:
    try:
        cfg = registry.read_decoder(config)
    except UserError as error:
        return Row(name, FAMILY, "refused", str(error))
    assert ours(config) == theirs(config), name
    tensors = fits(config)
    windows = {layer.window for layer in cfg.layers if layer.window}
    unrotated = sum(layer.rope is None for layer in cfg.layers)
    notes = [f"model_type {config['model_type']}", f"{tensors} tensors"]
    notes += ["tied embeddings"] if cfg.tied else []
    notes += [f"window {window}" for window in sorted(windows)]
    notes += [f"{unrotated} layers without positions"] if unrotated else []
    if name in RUN:
        return Row(name, FAMILY, "opens, trains, exports", ", ".join(notes))
    kinds = {language_model_configs()[run]["model_type"]: run for run in RUN}
    notes.append(f"same class as {kinds[config['model_type']]}, which trains and exports")
    return Row(name, FAMILY, "opens", ", ".join(notes))
