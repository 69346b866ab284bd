"""Granite 3 and 4 (the dense ones): config.json and registration. Their tensors have Llama's names.

Four numbers of config.json scale embeddings, scores of attention, branches and logits.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import (
    NUMBER,
    SIZE,
    DecoderConfig,
    Key,
    LayerSpec,
    activation,
    decoder_config,
    layer_windows,
    read_keys,
)
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.files import check_causal

KEYS: dict[str, dict[str, Key]] = {
    "granite": {
        **llama.KEYS["llama"],
        "head_dim": Key(None, SIZE),
        "embedding_multiplier": Key(1.0, NUMBER),
        "attention_multiplier": Key(1.0, NUMBER),
        "residual_multiplier": Key(1.0, NUMBER),
        "logits_scaling": Key(1.0, NUMBER),
    }
}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of Granite, as transformers 5 reads it.

    An absent attention_multiplier is 1, and not 1 / sqrt(head_dim).
    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    c = read_keys(config, KEYS["granite"])
    if not c["logits_scaling"]:
        raise UserError("config.json: logits_scaling=0 divides logits; expected a number above 0")
    if any(layer_windows(c, None, (False,) * c["num_hidden_layers"])):
        raise UserError("config.json: layer_types of granite may only be full_attention")
    spec = LayerSpec(
        activation=activation(c),
        attention_scale=float(c["attention_multiplier"]),
        residual_scale=float(c["residual_multiplier"]),
    )
    layers = (spec,) * c["num_hidden_layers"]
    return replace(
        decoder_config(config, c, layers, qkv_bias=c["attention_bias"]),
        embedding_scale=float(c["embedding_multiplier"]),
        logits_divisor=float(c["logits_scaling"]),
    )


ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: "GraniteForCausalLM",
    config=lambda config, where: read(config),
    classifier="",
)
