"""The text models of Gemma 3: config.json and registration. Their tensors have Llama's names."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    FLAG,
    IDS,
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
KEYS: dict[str, dict[str, Key]] = {
    "gemma3_text": {
        **COMMON,
        "vocab_size": Key(262208, SIZE),
        "hidden_size": Key(2304, SIZE),
        "intermediate_size": Key(9216, SIZE),
        "num_hidden_layers": Key(26, SIZE),
        "num_attention_heads": Key(8, SIZE),
        "num_key_value_heads": Key(4, SIZE),
        "head_dim": Key(256, SIZE),
        "hidden_act": Key(None, NAME, null=True),  # not read, hidden_activation is
        "hidden_activation": Key("gelu_pytorch_tanh", NAME),
        "max_position_embeddings": Key(131072, SIZE),
        "pad_token_id": Key(0, IDS, null=True),
        "eos_token_id": Key(1, IDS, null=True),
        "bos_token_id": Key(2, IDS, null=True),
        "tie_word_embeddings": Key(True, FLAG),
        "attention_bias": Key(False, FLAG),
        "query_pre_attn_scalar": Key(256, SIZE),
        "sliding_window": Key(4096, COUNT, null=True),
        "sliding_window_pattern": Key(6, SIZE),
        "final_logit_softcapping": Key(None, NUMBER, null=True),
        "use_bidirectional_attention": Key(False, FLAG, null=True),
    }
}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a Gemma 3 text model, as transformers 5 reads it.

    Its attn_logit_softcapping has no effect, as in transformers.
    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    c = read_keys(config, KEYS["gemma3_text"])
    for key in ("final_logit_softcapping", "use_bidirectional_attention"):
        if c[key]:
            raise UserError(
                f"config.json: {key}={c[key]} is not supported; expected null, as in all published"
                " Gemma 3 models"
            )
    # By default every sixth layer has full attention.
    sliding = tuple(
        bool((i + 1) % c["sliding_window_pattern"]) for i in range(c["num_hidden_layers"])
    )
    spec = LayerSpec(
        norms="sandwich",
        activation=activation(c, "hidden_activation", GELU_NAMES),
        qk_norm="head",
        attention_scale=c["query_pre_attn_scalar"] ** -0.5,
    )
    kinds = {False: spec, True: replace(spec, window=c["sliding_window"], rope=1)}
    layers = tuple(kinds[one] for one in sliding_layers(c, c["sliding_window"], sliding))
    ropes = layer_type_ropes(
        config, config.get("rope_theta", 1e6), config.get("rope_local_base_freq", 1e4)
    )
    return replace(
        decoder_config(config, c, layers, qkv_bias=c["attention_bias"], ropes=ropes),
        norm="one_plus",
        # transformers rounds it to the dtype of the weights, and the model here to that of its
        # activations: 34 and not 33.94 for 1152 in bf16. A tied head is not scaled.
        embedding_scale=c["hidden_size"] ** 0.5,
    )


ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: "Gemma3ForCausalLM",
    config=lambda config, where: read(config),
    classifier="TextForSequenceClassification",
)
