"""A decoder in a GGUF file: which ones llama.cpp computes in the same way, and their metadata."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import DecoderConfig
from jaxft.nn.rope import ORIGINAL

# llama.cpp's architecture by model_type.
GGUF_NAMES = {
    "llama": "llama",
    "mistral": "llama",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "smollm3": "smollm3",
}
PERMUTED = ("llama", "smollm3")  # the rows of q and k are in another order, and rope_freqs is read
NO_ROPE_EVERY = 4  # llama.cpp's layers of a smollm3 without positions
ROPE_KEYS = {"rope_theta", "rope_type", "type", "factor", ORIGINAL}
ROPE_DEFAULTS = (("beta_fast", 32), ("beta_slow", 1), ("partial_rotary_factor", 1))


def gguf_architecture(config: Mapping[str, Any], cfg: DecoderConfig) -> str:
    """Return llama.cpp's name of a decoder's architecture.

    config: the content of config.json. Raises UserError for a model that llama.cpp does not have
    under one of these names, or would compute in another way.
    """
    kind = str(config.get("model_type"))
    if kind not in GGUF_NAMES or cfg.num_labels:
        what = "a head of scores" if cfg.num_labels else f"model_type={kind!r}"
        raise UserError(
            f"export.kind='gguf' writes {', '.join(GGUF_NAMES)} with a head of the vocabulary, not"
            f" {what}; use export.kind='merged'"
        )
    name = GGUF_NAMES[kind]
    rotates = [layer.rope is not None for layer in cfg.layers]
    every = NO_ROPE_EVERY if name == "smollm3" else len(rotates) + 1
    biases = {"qkv_bias": cfg.qkv_bias, "o_bias": cfg.o_bias, "mlp_bias": cfg.mlp_bias}
    allowed = {"llama": tuple(biases), "qwen2": ("qkv_bias",)}.get(name, ())
    found = [key for key, there in biases.items() if there and key not in allowed]
    if rotates != [(i + 1) % every != 0 for i in range(len(rotates))]:
        found.append("other layers without rope")
    if found:
        raise UserError(
            f"export.kind='gguf': {', '.join(found)} is not in llama.cpp's {name}; use"
            " export.kind='merged'"
        )
    _scaling(name, config, cfg)
    return name


def model_metadata(config: Mapping[str, Any], cfg: DecoderConfig) -> dict[str, Any]:
    """Return the keys of the architecture, as llama.cpp's converter writes them.

    A sliding window is no part of these architectures there, so the context ends where it begins.
    """
    name = gguf_architecture(config, cfg)
    windows = [layer.window for layer in cfg.layers if layer.window]
    made: dict[str, Any] = {
        "block_count": cfg.num_layers,
        "context_length": min([cfg.max_positions, *windows]),
        "embedding_length": cfg.hidden_size,
        "feed_forward_length": cfg.intermediate_size,
        "attention.head_count": cfg.num_heads,
        "attention.head_count_kv": cfg.num_kv_heads,
        "rope.freq_base": float(_rope(config)["rope_theta"]),
        "attention.layer_norm_rms_epsilon": float(cfg.rms_norm_eps),
        "vocab_size": cfg.vocab_size,
        "rope.dimension_count": cfg.head_dim,
    }
    if config.get("head_dim"):
        made |= {"attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim}
    made |= _scaling(name, config, cfg)
    return {f"{name}.{key}": value for key, value in made.items()}


def rope_factors(config: Mapping[str, Any], cfg: DecoderConfig) -> np.ndarray | None:
    """Return the divisors of the frequencies of Llama 3.1's rope, float32 [H / 2], else None."""
    rope = _rope(config)
    if _kind(rope) != "llama3":
        return None
    plain = float(rope["rope_theta"]) ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    return (plain / np.array(cfg.ropes[0].inv_freq)).astype(np.float32)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope parameters, as `rope.from_hf` reads them."""
    default = 2e6 if config["model_type"] == "smollm3" else 1e4
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    return {"rope_theta": config.get("rope_theta", default), **given}


def _kind(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type", "default"))


def _scaling(name: str, config: Mapping[str, Any], cfg: DecoderConfig) -> dict[str, Any]:
    """Return the keys of a scaled rope. Raises UserError for one that the file cannot hold."""
    rope = _rope(config)
    kind = _kind(rope)
    more = {x: y for x, y in rope.items() if x not in ROPE_KEYS and y is not None}
    odd = {x: y for x, y in more.items() if (x, y) not in ROPE_DEFAULTS}
    known = kind in ("default", "linear", "yarn") or (kind == "llama3" and name in PERMUTED)
    if not known or (kind == "yarn" and odd):
        raise UserError(
            f"export.kind='gguf': rope type {kind!r} of {rope} is not in llama.cpp's {name}; use"
            " export.kind='merged'"
        )
    if kind not in ("linear", "yarn"):
        return {}
    original = config.get(ORIGINAL) or rope.get(ORIGINAL) or cfg.max_positions
    factor = float(rope.get("factor") or cfg.max_positions / original)
    made = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    return made | ({"rope.scaling.original_context_length": original} if kind == "yarn" else {})
