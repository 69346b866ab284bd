"""Gemma 2 and the text models of Gemma 3: config.json and registration.

Their tensors have Llama's names.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    FLAG,
    IDS,
    LAYERS,
    NAME,
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

GELU_NAMES = {"gelu_pytorch_tanh": "gelu_tanh"}
_GEMMA2 = {
    **COMMON,
    "vocab_size": Key(256000, SIZE),
    "hidden_size": Key(2304, SIZE),
    "intermediate_size": Key(9216, SIZE),
    "num_hidden_layers": Key(26, LAYERS),
    "num_attention_heads": Key(8, SIZE),
    "num_key_value_heads": Key(4, SIZE),
    "head_dim": Key(256, SIZE),
    "hidden_act": Key(None, NAME, null=True),  # not read, hidden_activation is
    "hidden_activation": Key("gelu_pytorch_tanh", NAME),
    "max_position_embeddings": Key(8192, SIZE),
    "pad_token_id": Key(0, IDS, null=True),
    "eos_token_id": Key(1, IDS, null=True),
    "bos_token_id": Key(2, IDS, null=True),
    "tie_word_embeddings": Key(True, FLAG),
    "attention_bias": Key(False, FLAG),
    "query_pre_attn_scalar": Key(256, SIZE),
    "sliding_window": Key(4096, COUNT, null=True),
    "attn_logit_softcapping": Key(50.0, NUMBER, null=True),
    "final_logit_softcapping": Key(30.0, NUMBER, null=True),
    "use_bidirectional_attention": Key(False, FLAG, null=True),
}
KEYS: dict[str, dict[str, Key]] = {
    "gemma2": _GEMMA2,
    "gemma3_text": {
        **_GEMMA2,
        "vocab_size": Key(262208, SIZE),
        "max_position_embeddings": Key(131072, SIZE),
        "attn_logit_softcapping": Key(None, NUMBER, null=True),  # has no effect in transformers
        "final_logit_softcapping": Key(None, NUMBER, null=True),
        "sliding_window_pattern": Key(6, SIZE),
    },
}
CLASSES = {"gemma2": "Gemma2", "gemma3_text": "Gemma3"}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of Gemma 2 or of a Gemma 3 text model, as transformers 5 reads it.

    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    kind = config["model_type"]
    c = read_keys(config, KEYS[kind])
    if c["use_bidirectional_attention"]:
        raise UserError(
            "config.json: use_bidirectional_attention=true is not supported; expected null, as in"
            " all published Gemma models"
        )
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if c[key] == 0:
            raise UserError(f"config.json: {key}=0 divides by 0; expected a number above 0 or null")
    # By default every second layer of Gemma 2 has full attention, and every sixth of Gemma 3.
    pattern, window = c.get("sliding_window_pattern", 2), c["sliding_window"]
    sliding = tuple(bool((i + 1) % pattern) for i in range(c["num_hidden_layers"]))
    full = LayerSpec(
        norms="sandwich",
        activation=activation(c, "hidden_activation", GELU_NAMES),
        attention_scale=c["query_pre_attn_scalar"] ** -0.5,
    )
    if kind == "gemma2":
        full, ropes = replace(full, soft_cap=c["attn_logit_softcapping"]), ()
        local = replace(full, window=window)
    else:
        full, local_theta = replace(full, qk_norm="head"), config.get("rope_local_base_freq", 1e4)
        ropes = layer_type_ropes(config, config.get("rope_theta", 1e6), local_theta)
        local = replace(full, window=window, rope=1)
    slides = sliding_layers(c, window, sliding)
    layers = tuple(local if one else full for one in slides)
    return replace(
        decoder_config(config, c, layers, qkv_bias=c["attention_bias"], ropes=ropes),
        norm="one_plus",
        logits_soft_cap=c["final_logit_softcapping"],
        # transformers rounds it to the dtype of the weights, and the model here to that of its
        # activations: 34 and not 33.94 for 1152 in bf16. A tied head is not scaled.
        embedding_scale=c["hidden_size"] ** 0.5,
    )


ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: f"{CLASSES[config['model_type']]}ForCausalLM",
    config=lambda config, where: read(config),
)
GEMMA3 = ARCHITECTURE._replace(classifier="TextForSequenceClassification")
