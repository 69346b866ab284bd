"""The keys of a LLaMA-family config.json that change results, as transformers 5 reads them.

An absent key has the default of the class of its model_type. null is a value like any other:
the class takes it for some keys, and refuses it for the others, as here.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxft.core.errors import UserError

SIZE, COUNT = "a whole number above 0", "a whole number from 0 on"
NUMBER, FLAG, NAME = "a number from 0 on", "true or false", "a name"
IDS, NAMES, FLAGS = "a token id or a list of them", "a list of names", "a list of 0 and 1"


class Key(NamedTuple):
    """The default of a key, the values that it takes, and whether null is one of them."""

    default: Any
    values: str
    null: bool = False


COMMON = {
    "hidden_size": Key(4096, SIZE),
    "num_hidden_layers": Key(32, SIZE),
    "num_attention_heads": Key(32, SIZE),
    "hidden_act": Key("silu", NAME),
    "initializer_range": Key(0.02, NUMBER),
    "rms_norm_eps": Key(1e-6, NUMBER),
    "tie_word_embeddings": Key(False, FLAG),
    "bos_token_id": Key(None, IDS, null=True),
    "eos_token_id": Key(None, IDS, null=True),
    "pad_token_id": Key(None, IDS, null=True),
    "layer_types": Key(None, NAMES, null=True),
}
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
_QWEN = {
    **COMMON,
    "vocab_size": Key(151936, SIZE),
    "intermediate_size": Key(22016, SIZE),
    "num_key_value_heads": Key(32, SIZE, null=True),
    "head_dim": Key(None, SIZE),
    "max_position_embeddings": Key(32768, SIZE),
    "use_sliding_window": Key(False, FLAG),
    "sliding_window": Key(4096, COUNT, null=True),
    "max_window_layers": Key(28, COUNT),
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
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": Key(128, SIZE), "attention_bias": Key(False, FLAG)},
    "smollm3": {
        **COMMON,
        "vocab_size": Key(128256, SIZE),
        "hidden_size": Key(2048, SIZE),
        "intermediate_size": Key(11008, SIZE),
        "num_hidden_layers": Key(36, SIZE),
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
# The name of a class: NAMEModel without a head, NAMEForCausalLM with one.
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "ministral": "Ministral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
}
ARCHITECTURES = tuple(f"{name}ForCausalLM" for name in CLASSES.values())
BASES = tuple(f"{name}Model" for name in CLASSES.values())


def architecture(config: Mapping[str, Any]) -> str:
    """Return the model_type of the class that AutoModelForCausalLM builds.

    Raises UserError for another model_type, and for the head of another task.
    """
    kind, stated = config.get("model_type"), config.get("architectures") or []
    if kind not in KEYS:
        raise UserError(
            f"config.json: model_type={kind!r} is not supported; supported are"
            f" {', '.join(KEYS)}: give a model of one of these"
        )
    names = stated if isinstance(stated, list) else [stated]
    if names and not any(name in ARCHITECTURES + BASES for name in names):
        raise UserError(
            f"config.json: architectures={names} is not a causal language model;"
            f" supported are {', '.join(ARCHITECTURES)}: give the language model that it was made"
            " from"
        )
    if not config.get("is_causal", True):
        raise UserError(
            f"config.json: is_causal={json.dumps(config['is_causal'])} lets tokens see later ones,"
            " which no layer here does; give the causal language model that it was made from"
        )
    if config.get("per_layer_config") is not None:
        raise UserError(
            "config.json: per_layer_config is not supported, only layers of one size; give the"
            " model that it was pruned from"
        )
    # transformers takes Ministral's class for a mistral that lists layer types, even for null.
    return "ministral" if kind == "mistral" and "layer_types" in config else str(kind)


def read_keys(config: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the value of every key that the class of model_type `kind` reads."""
    for name, key in KEYS[kind].items():
        if name in config:
            _check(name, config[name], key)
    return {name: config.get(name, key.default) for name, key in KEYS[kind].items()}


def _check(name: str, value: Any, key: Key) -> None:
    if value is None and not key.null:
        instead = "" if key.default is None else f" for {json.dumps(key.default)}"
        raise UserError(
            f"config.json: {name} is null, which transformers refuses too; expected {key.values}:"
            f" give it, or leave the key out{instead}"
        )
    if value is not None and not _fits(value, key.values):
        raise UserError(f"config.json: {name}={json.dumps(value)}; expected {key.values}")


def _fits(value: Any, values: str) -> bool:
    if values in (SIZE, COUNT):
        return type(value) is int and value >= (values == SIZE)
    if values == NUMBER:
        return type(value) in (int, float) and 0 <= value < math.inf
    if values == FLAG:
        return type(value) is bool
    if values == NAME:
        return type(value) is str
    if values == NAMES:
        return type(value) is list and all(type(one) is str for one in value)
    if values == IDS and type(value) is int:
        return True
    return type(value) is list and all(type(one) in (int, bool) for one in value)
