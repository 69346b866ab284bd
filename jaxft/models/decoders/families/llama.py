"""Llama, Mistral, Ministral (3) and SmolLM 3: config.json, weight table, registration."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    FLAG,
    FLAGS,
    IDS,
    LAYERS,
    NUMBER,
    OLD_NAMES,
    SIZE,
    DecoderConfig,
    Key,
    LayerSpec,
    QueryScaling,
    activation,
    decoder_config,
    layer_windows,
    read_keys,
)
from jaxft.models.decoders.decoder import Decoder, flops_per_token
from jaxft.models.decoders.files import as_decoder, check_causal
from jaxft.models.registry import Architecture
from jaxft.nn.rope import ORIGINAL
from jaxft.weights.rules import Rule

_BOS_EOS = {"bos_token_id": Key(1, IDS, null=True), "eos_token_id": Key(2, IDS, null=True)}
_MISTRAL = {
    **COMMON,
    **_BOS_EOS,
    "vocab_size": Key(32000, SIZE),
    "intermediate_size": Key(14336, SIZE),
    "num_key_value_heads": Key(8, SIZE),
    "head_dim": Key(None, SIZE, null=True),
    "max_position_embeddings": Key(131072, SIZE),
    "sliding_window": Key(4096, COUNT, null=True),
}
KEYS: dict[str, dict[str, Key]] = {
    "llama": {
        **COMMON,
        **_BOS_EOS,
        "vocab_size": Key(32000, SIZE),
        "intermediate_size": Key(11008, SIZE),
        "num_key_value_heads": Key(None, SIZE, null=True),
        "head_dim": Key(None, SIZE, null=True),
        "max_position_embeddings": Key(2048, SIZE),
        "attention_bias": Key(False, FLAG),
        "mlp_bias": Key(False, FLAG),
    },
    "mistral": _MISTRAL,
    "ministral": {**_MISTRAL, "head_dim": Key(None, SIZE)},
    "ministral3": {
        **_MISTRAL,
        "vocab_size": Key(131072, SIZE),
        "num_hidden_layers": Key(34, LAYERS),
        "head_dim": Key(128, SIZE),
        "max_position_embeddings": Key(262144, SIZE),
        "rms_norm_eps": Key(1e-5, NUMBER),
        "pad_token_id": Key(11, IDS, null=True),
        "sliding_window": Key(None, COUNT, null=True),
    },
    "smollm3": {
        **COMMON,
        "vocab_size": Key(128256, SIZE),
        "hidden_size": Key(2048, SIZE),
        "intermediate_size": Key(11008, SIZE),
        "num_hidden_layers": Key(36, LAYERS),
        "num_attention_heads": Key(16, SIZE),
        "num_key_value_heads": Key(4, SIZE, null=True),
        "head_dim": Key(None, SIZE),
        "max_position_embeddings": Key(32768, SIZE),
        "pad_token_id": Key(128004, IDS, null=True),
        "bos_token_id": Key(128000, IDS, null=True),
        "eos_token_id": Key(128001, IDS, null=True),
        "tie_word_embeddings": Key(True, FLAG),
        "attention_bias": Key(False, FLAG),
        "mlp_bias": Key(False, FLAG),
        "use_sliding_window": Key(False, FLAG),
        "sliding_window": Key(None, COUNT, null=True),
        "no_rope_layers": Key(None, FLAGS, null=True),
        "no_rope_layer_interval": Key(4, SIZE),
    },
}
# The rope of a Ministral 3 whose config.json has none. `type` is the old name of `rope_type`.
MINISTRAL3_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 16.0,
    ORIGINAL: 16384,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.1,
}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "ministral3": "Ministral3",
    "smollm3": "SmolLM3",
}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of one of these families, as transformers 5 reads it.

    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    kind = _kind(config)
    c = read_keys(config, KEYS[kind])
    if kind == "llama" and "sliding_attention" in [
        OLD_NAMES.get(name, name) for name in c["layer_types"] or ()
    ]:
        raise UserError(
            "config.json: layer_types asks for sliding_attention, which transformers' llama trains"
            " without and decodes with; set model_type to mistral, or all layers to full_attention"
        )
    ropes, scaling = (), None
    if kind == "ministral3":
        if ORIGINAL in config:
            raise UserError(
                f"config.json: {ORIGINAL}={json.dumps(config[ORIGINAL])} beside rope_parameters is"
                " not supported in Ministral 3; put it into rope_parameters alone"
            )
        c["layer_types"] = None  # transformers does not use it
        given = config.get("rope_scaling") or config.get("rope_parameters") or MINISTRAL3_ROPE
        ropes, scaling = ({"rope_scaling": given},), _query_scaling(given)
    act, rotary = activation(c), _rotary(c)
    # By default all layers of Mistral and Ministral slide. In SmolLM 3 the layers without rope do,
    # if use_sliding_window is set.
    sliding = tuple(kind != "llama" for _ in rotary)
    if kind == "smollm3":
        sliding = tuple(c["use_sliding_window"] and not rotates for rotates in rotary)
    windows = layer_windows(c, c.get("sliding_window"), sliding)
    layers = tuple(
        LayerSpec(window=window, rope=0 if rotates else None, activation=act)
        for window, rotates in zip(windows, rotary, strict=True)
    )
    theta, biased = 2e6 if kind == "smollm3" else 1e4, bool(c.get("attention_bias"))
    made = decoder_config(config, c, layers, qkv_bias=biased, default_theta=theta, ropes=ropes)
    return replace(made, query_scaling=scaling)


def _query_scaling(given: Any) -> QueryScaling | None:
    """Return the growth of Ministral 3's queries by its rope dict.

    Raises: UserError for a dict without it, which transformers cannot compute either.
    """
    values = given if isinstance(given, dict) else {}
    beta, original = values.get("llama_4_scaling_beta"), values.get(ORIGINAL)
    if not isinstance(beta, int | float) or not isinstance(original, int) or original < 1:
        raise UserError(
            f"config.json: rope_parameters={given}: expected numbers llama_4_scaling_beta and"
            f" {ORIGINAL}, as in Ministral 3's own file"
        )
    return QueryScaling(float(beta), original)


def _kind(config: Mapping[str, Any]) -> str:
    """Return the model_type of the class that AutoModelForCausalLM builds."""
    kind = str(config["model_type"])
    # transformers builds Ministral's class for a mistral with layer_types, even if that is null.
    return "ministral" if kind == "mistral" and "layer_types" in config else kind


def _rotary(c: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return True for each layer with rope. In SmolLM 3 every fourth layer has no positions."""
    count = c["num_hidden_layers"]
    if "no_rope_layers" not in c:
        return (True,) * count
    listed, interval = c["no_rope_layers"], c["no_rope_layer_interval"]
    if listed is None:
        return tuple((i + 1) % interval != 0 for i in range(count))
    if len(listed) < count:
        raise UserError(f"config.json: no_rope_layers has {len(listed)} entries for {count} layers")
    return tuple(bool(one) for one in listed[:count])


def sizes(cfg: DecoderConfig) -> dict[str, int]:
    """Return the dims that RULES' layouts name."""
    return {"n": cfg.num_heads, "k": cfg.num_kv_heads, "h": cfg.head_dim}


def ignore(cfg: DecoderConfig) -> tuple[str, ...]:
    """Return regexes of tensors in old files that no model reads."""
    return (r".*rotary_emb\.inv_freq", *((r"lm_head\.weight",) if cfg.tied else ()))


def drop(cfg: DecoderConfig) -> tuple[str, ...]:
    """Return the tensors that training would make stale: a copy of a tied table."""
    return ("lm_head.weight",) if cfg.tied else ()


TARGETS = r".*self_attn\.[qkvo]_proj"
_T, _J = "model.layers.{i}.self_attn.", "layers.self_attn."
RULES = (
    Rule("model.embed_tokens.weight", "embed_tokens.embedding"),
    # {p} is input_layer or post_attention_layer, and in Qwen 3 also self_attn.q_ or self_attn.k_.
    Rule("model.layers.{i}.{p}norm.weight", "layers.{p}norm.scale"),
    Rule(_T + "q_proj.weight", _J + "q_proj.kernel", "(n h) d -> d n h"),
    Rule(_T + "k_proj.weight", _J + "k_proj.kernel", "(k h) d -> d k h"),
    Rule(_T + "v_proj.weight", _J + "v_proj.kernel", "(k h) d -> d k h"),
    Rule(_T + "o_proj.weight", _J + "o_proj.kernel", "d (n h) -> n h d"),
    Rule(_T + "q_proj.bias", _J + "q_proj.bias", "(n h) -> n h"),
    Rule(_T + "k_proj.bias", _J + "k_proj.bias", "(k h) -> k h"),
    Rule(_T + "v_proj.bias", _J + "v_proj.bias", "(k h) -> k h"),
    Rule(_T + "o_proj.bias", _J + "o_proj.bias"),
    Rule("model.layers.{i}.mlp.{p}_proj.weight", "layers.mlp.{p}_proj.kernel", "f d -> d f"),
    Rule("model.layers.{i}.mlp.{p}_proj.bias", "layers.mlp.{p}_proj.bias"),
    Rule("model.norm.weight", "norm.scale"),
    Rule("lm_head.weight", "lm_head.kernel", "v d -> d v"),
)
ARCHITECTURE = Architecture(
    family="decoder",
    class_name=lambda config: f"{CLASSES[_kind(config)]}ForCausalLM",
    config=lambda config, where: read(config),
    module=Decoder,
    rules=lambda cfg: RULES,
    sizes=sizes,
    ignore=ignore,
    drop=drop,
    flops=flops_per_token,
    lora=TARGETS,
    opened=as_decoder,
)
