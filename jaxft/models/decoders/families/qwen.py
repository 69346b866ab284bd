"""Qwen 2, 2.5 and 3: config.json and registration. Their tensors have Llama's names."""

from collections.abc import Mapping
from typing import Any

from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    FLAG,
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
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": Key(128, SIZE), "attention_bias": Key(False, FLAG)},
}
CLASSES = {"qwen2": "Qwen2", "qwen3": "Qwen3"}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of Qwen 2 or 3, as transformers 5 reads it.

    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    kind = config["model_type"]
    c = read_keys(config, KEYS[kind])
    act, window = activation(c), c["sliding_window"] if c["use_sliding_window"] else None
    # The first max_window_layers layers have full attention.
    sliding = tuple(i >= c["max_window_layers"] for i in range(c["num_hidden_layers"]))
    layers = tuple(
        LayerSpec(window=one, activation=act, qk_norm="head" if kind == "qwen3" else None)
        for one in layer_windows(c, window, sliding)
    )
    # q, k and v of Qwen 2 always have biases. In Qwen 3 they have them by the config.
    biased = kind == "qwen2" or c["attention_bias"]
    return decoder_config(config, c, layers, qkv_bias=biased)


ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: f"{CLASSES[config['model_type']]}ForCausalLM",
    config=lambda config, where: read(config),
)
