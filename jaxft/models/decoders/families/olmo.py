"""OLMo 2 and 3: config.json and registration. Their tensors have Llama's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    FLAG,
    IDS,
    NUMBER,
    SIZE,
    DecoderConfig,
    Key,
    LayerSpec,
    activation,
    decoder_config,
    layer_type_ropes,
    read_keys,
    sliding_layers,
)
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.files import check_causal

_OLMO2 = {
    **COMMON,
    "vocab_size": Key(50304, SIZE),
    "intermediate_size": Key(11008, SIZE),
    "num_key_value_heads": Key(None, SIZE, null=True),
    "head_dim": Key(None, SIZE),
    "max_position_embeddings": Key(2048, SIZE),
    "rms_norm_eps": Key(1e-5, NUMBER),
    "pad_token_id": Key(1, IDS, null=True),
    "eos_token_id": Key(50279, IDS, null=True),
    "attention_bias": Key(False, FLAG),
}
KEYS: dict[str, dict[str, Key]] = {
    "olmo2": _OLMO2,
    "olmo3": {**_OLMO2, "sliding_window": Key(4096, COUNT, null=True)},
}
CLASSES = {"olmo2": "Olmo2", "olmo3": "Olmo3"}
THETA = 500000.0  # of OLMo 3


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of OLMo 2 or 3, as transformers 5 reads it.

    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    kind = config["model_type"]
    c = read_keys(config, KEYS[kind])
    spec = LayerSpec(norms="post", activation=activation(c), qk_norm="width")
    # By default every fourth layer of OLMo 3 has full attention.
    sliding = tuple(kind == "olmo3" and bool((i + 1) % 4) for i in range(c["num_hidden_layers"]))
    window, ropes = c.get("sliding_window"), ()
    if kind == "olmo3":
        # rope_theta outside of rope_parameters concerns the layers of full attention alone.
        ropes = layer_type_ropes(config, config.get("rope_theta", THETA), THETA)
    kinds = {False: spec, True: replace(spec, window=window, rope=1)}
    layers = tuple(kinds[one] for one in sliding_layers(c, window, sliding))
    made = decoder_config(config, c, layers, qkv_bias=c["attention_bias"], ropes=ropes)
    return replace(made, norm="scale_first")


ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: f"{CLASSES[config['model_type']]}ForCausalLM",
    config=lambda config, where: read(config),
)
