"""GPT-OSS (20B, 120B): config.json, weight table, registration.

Its experts are one tensor a layer, with gate and up as alternating columns.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    FLAG,
    LAYERS,
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
from jaxft.models.decoders.families.mixtral import checked_experts, with_one_count
from jaxft.models.decoders.files import check_causal
from jaxft.nn.gated import Clamp
from jaxft.nn.rope import ORIGINAL
from jaxft.weights.rules import Rule

KEYS = {
    "gpt_oss": {
        **COMMON,
        "vocab_size": Key(201088, SIZE),
        "hidden_size": Key(2880, SIZE),
        "intermediate_size": Key(2880, SIZE),
        "num_hidden_layers": Key(36, LAYERS),
        "num_attention_heads": Key(64, SIZE),
        "num_key_value_heads": Key(8, SIZE),
        "head_dim": Key(64, SIZE),
        "max_position_embeddings": Key(131072, SIZE),
        "rms_norm_eps": Key(1e-5, NUMBER),
        "attention_bias": Key(True, FLAG),
        "sliding_window": Key(128, COUNT, null=True),
        "num_experts_per_tok": Key(4, SIZE),
        "num_local_experts": Key(128, SIZE),
        "swiglu_alpha": Key(1.702, NUMBER),
        "swiglu_limit": Key(7.0, NUMBER),
        "router_aux_loss_coef": Key(0.001, NUMBER),
    },
}
# The rope of a config.json without one.
ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    ORIGINAL: 4096,
}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of GPT-OSS, as transformers 5 reads it.

    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    c = read_keys(with_one_count(config), KEYS["gpt_oss"])
    if not c["swiglu_limit"]:
        raise UserError(
            "config.json: swiglu_limit=0 leaves nothing of gate and up; expected a number above 0,"
            " as the published 7.0"
        )
    # By default every second layer slides, from the first one on.
    sliding = tuple(i % 2 == 0 for i in range(c["num_hidden_layers"]))
    spec = LayerSpec(
        activation=activation(c),
        experts=checked_experts(c)._replace(
            fused=True, clamp=Clamp(c["swiglu_alpha"], c["swiglu_limit"])
        ),
        sinks=True,
    )
    windows = layer_windows(c, c["sliding_window"], sliding)
    given = config.get("rope_scaling") or config.get("rope_parameters")
    # transformers reads an empty object as a rope without scaling.
    ropes = ({"rope_scaling": ROPE},) if given is None else ()
    made = decoder_config(
        config,
        c,
        tuple(replace(spec, window=window) for window in windows),
        qkv_bias=c["attention_bias"],
        default_theta=150000.0,
        ropes=ropes,
    )
    return replace(made, norm="scale_first", router_loss=float(c["router_aux_loss_coef"]))


_T, _J = "model.layers.{i}.mlp.", "layers.mlp."
RULES = (
    Rule("model.layers.{i}.self_attn.sinks", "layers.self_attn.sinks"),
    Rule(_T + "router.weight", _J + "router.kernel", "e d -> d e"),
    Rule(_T + "router.bias", _J + "router.bias"),
    # u counts gate and up, whose columns alternate in the file.
    Rule(_T + "experts.gate_up_proj", _J + "experts.gate_up_proj.kernel", "e d (f u) -> e d u f"),
    Rule(_T + "experts.gate_up_proj_bias", _J + "experts.gate_up_proj.bias", "e (f u) -> e u f"),
    Rule(_T + "experts.down_proj", _J + "experts.down_proj.kernel"),
    Rule(_T + "experts.down_proj_bias", _J + "experts.down_proj.bias"),
    *(rule for rule in llama.RULES if ".mlp." not in rule.key),
)
ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: "GptOssForCausalLM",
    config=lambda config, where: read(config),
    rules=lambda cfg: RULES,
    sizes=lambda cfg: {**llama.sizes(cfg), "u": 2},
)
