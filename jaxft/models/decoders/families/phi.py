"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: config.json, weight table, registration.

Files hold q, k and v as one matrix, and gate and up as another. So does the model, because an
adapter of PEFT has one pair of factors for each.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    IDS,
    NUMBER,
    SIZE,
    DecoderConfig,
    Key,
    LayerSpec,
    activation,
    decoder_config,
    read_keys,
    sliding_layers,
)
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.files import check_causal
from jaxft.weights.rules import Rule

KEYS: dict[str, dict[str, Key]] = {
    "phi3": {
        **COMMON,
        "vocab_size": Key(32064, SIZE),
        "hidden_size": Key(3072, SIZE),
        "intermediate_size": Key(8192, SIZE),
        "num_key_value_heads": Key(None, SIZE, null=True),
        "head_dim": Key(None, SIZE),
        "max_position_embeddings": Key(4096, SIZE),
        "original_max_position_embeddings": Key(4096, SIZE),
        "rms_norm_eps": Key(1e-5, NUMBER),
        "bos_token_id": Key(1, IDS, null=True),
        "eos_token_id": Key(32000, IDS, null=True),
        "pad_token_id": Key(32000, IDS, null=True),
        "sliding_window": Key(None, COUNT, null=True),
    }
}
LONGROPE_NAMES = ("su", "yarn", "longrope")  # the first two in files of transformers 4


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of Phi-3 or later, as transformers 5 reads it.

    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    c = read_keys(config, KEYS["phi3"])
    c["layer_types"] = None  # transformers does not use it
    window, count = c["sliding_window"], c["num_hidden_layers"]
    (slides, *_) = sliding_layers(c, window, (window is not None,) * count)
    layers = (LayerSpec(window=window if slides else None, activation=activation(c)),) * count
    rope, rotary = _rope(config)
    made = decoder_config(config, c, layers, qkv_bias=False, ropes=(rope,), rotary=rotary)
    # transformers computes the cache of a Phi again where a row crosses the original length.
    return replace(made, fused=True, rope_by_end=True)


def _rope(config: Mapping[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the settings of the rope, and the fraction of each head that rotates.

    Raises: UserError for another type than default and longrope, and for a fraction that is none.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UserError(f"config.json: rope_scaling={given!r} is no object of rope parameters")
    kind = given.get("rope_type", given.get("type", "default"))
    kind = "longrope" if kind in LONGROPE_NAMES else kind
    if kind not in ("default", "longrope"):
        raise UserError(
            f"config.json: rope type {kind!r} is not supported in phi3, only default and longrope"
        )
    rotary = given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if not isinstance(rotary, int | float) or not 0 < rotary <= 1:
        raise UserError(
            f"config.json: partial_rotary_factor={json.dumps(rotary)}; expected a number above 0"
            " and up to 1"
        )
    settings = {**given, "rope_type": kind, "partial_rotary_factor": 1.0}
    return {"rope_scaling": settings, "partial_rotary_factor": 1.0}, float(rotary)


def sizes(cfg: DecoderConfig) -> dict[str, int]:
    """Return the dims that RULES' layouts name. `g` is gate and up."""
    return {"n": cfg.num_heads, "h": cfg.head_dim, "g": 2}


_T, _J = "model.layers.{i}.", "layers."
RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens.embedding"),
    Rule(_T + "{p}norm.weight", _J + "{p}norm.scale"),
    # m: the heads of q, then those of k, then those of v.
    Rule(_T + "self_attn.qkv_proj.weight", _J + "self_attn.qkv_proj.kernel", "(m h) d -> d m h"),
    Rule(_T + "self_attn.o_proj.weight", _J + "self_attn.o_proj.kernel", "d (n h) -> n h d"),
    Rule(_T + "mlp.gate_up_proj.weight", _J + "mlp.gate_up_proj.kernel", "(g f) d -> d g f"),
    Rule(_T + "mlp.down_proj.weight", _J + "mlp.down_proj.kernel", "f d -> d f"),
    Rule("model.norm.weight", "norm.scale"),
    Rule("lm_head.weight", "lm_head.kernel", "v d -> d v"),
)
ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: "Phi3ForCausalLM",
    config=lambda config, where: read(config),
    rules=lambda cfg: RULES,
    sizes=sizes,
    lora=r".*self_attn\.(qkv|o)_proj",
)
