"""Mixtral and the mixtures of Qwen 3: config.json, weight tables, registration.

Files hold a tensor for each expert. transformers 5 fuses them in memory, and in files that it saves
with `save_original_format=False`. Those are read too, and exports have a tensor for each expert.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import (
    COMMON,
    COUNT,
    FLAG,
    IDS,
    INDICES,
    LAYERS,
    NUMBER,
    SIZE,
    DecoderConfig,
    ExpertSpec,
    Key,
    LayerSpec,
    activation,
    decoder_config,
    layer_windows,
    read_keys,
)
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.files import as_decoder, check_causal
from jaxft.weights.folders.transformers import Source
from jaxft.weights.rules import Rule
from jaxft.weights.views import Slab, Unfused

KEYS: dict[str, dict[str, Key]] = {
    "mixtral": {
        **COMMON,
        "vocab_size": Key(32000, SIZE),
        "intermediate_size": Key(14336, SIZE),
        "num_key_value_heads": Key(8, SIZE),
        "head_dim": Key(None, SIZE, null=True),
        "max_position_embeddings": Key(131072, SIZE),
        "rms_norm_eps": Key(1e-5, NUMBER),
        "bos_token_id": Key(1, IDS, null=True),
        "eos_token_id": Key(2, IDS, null=True),
        "sliding_window": Key(None, COUNT, null=True),
        "num_experts_per_tok": Key(2, SIZE),
        "num_local_experts": Key(8, SIZE),
        "router_aux_loss_coef": Key(0.001, NUMBER),
        "router_jitter_noise": Key(0.0, NUMBER),
    },
    "qwen3_moe": {
        **COMMON,
        "vocab_size": Key(151936, SIZE),
        "hidden_size": Key(2048, SIZE),
        "intermediate_size": Key(6144, SIZE),
        "num_hidden_layers": Key(24, LAYERS),
        "num_key_value_heads": Key(4, SIZE),
        "head_dim": Key(None, SIZE),
        "max_position_embeddings": Key(32768, SIZE),
        "attention_bias": Key(False, FLAG),
        "use_sliding_window": Key(False, FLAG),
        "sliding_window": Key(4096, COUNT, null=True),
        "decoder_sparse_step": Key(1, SIZE),
        "moe_intermediate_size": Key(768, SIZE),
        "num_experts_per_tok": Key(8, SIZE),
        "num_local_experts": Key(128, SIZE),
        "norm_topk_prob": Key(False, FLAG),
        "mlp_only_layers": Key(None, INDICES, null=True),
        "router_aux_loss_coef": Key(0.001, NUMBER),
    },
}
_THETAS = {"mixtral": 1e6, "qwen3_moe": 1e4}


def read(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of Mixtral or of a Qwen 3 mixture, as transformers 5 reads it.

    Raises: UserError for another architecture, and for values that no layer here computes.
    """
    check_causal(config)
    kind = config["model_type"]
    c = read_keys(with_one_count(config), KEYS[kind])
    if c.get("router_jitter_noise"):
        raise UserError(
            f"config.json: router_jitter_noise={c['router_jitter_noise']} is not supported; set it"
            " to 0.0, as in the published Mixtral models"
        )
    window, count = c["sliding_window"], c["num_hidden_layers"]
    if kind == "qwen3_moe":
        window = window if c["use_sliding_window"] else None
        _check_sparse(c)
    c["layer_types"] = None  # transformers does not use it: all layers slide, or none
    (window, *_) = layer_windows(c, window, (window is not None,) * count)
    spec = LayerSpec(
        window=window,
        activation=activation(c),
        qk_norm="head" if kind == "qwen3_moe" else None,
        experts=checked_experts(c),
    )
    biased = bool(c.get("attention_bias"))
    made = decoder_config(config, c, (spec,) * count, qkv_bias=biased, default_theta=_THETAS[kind])
    return replace(made, router_loss=float(c["router_aux_loss_coef"]))


def with_one_count(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with `num_local_experts`, of which `num_experts` is another name.

    Raises: UserError for two numbers.
    """
    if "num_experts" not in config:
        return dict(config)
    names = {name: config[name] for name in ("num_experts", "num_local_experts") if name in config}
    if len({json.dumps(one) for one in names.values()}) > 1:
        raise UserError(f"config.json: {names} are two numbers of experts; leave one of them out")
    return {**config, "num_local_experts": config["num_experts"]}


def checked_experts(c: Mapping[str, Any]) -> ExpertSpec:
    """Return the experts of each layer. Raises UserError for more of a token than there are."""
    count, active = c["num_local_experts"], c["num_experts_per_tok"]
    if active > count:
        raise UserError(
            f"config.json: num_experts_per_tok={active}, but there are {count} experts; expected at"
            " most so many"
        )
    width = c.get("moe_intermediate_size", c["intermediate_size"])
    # Mixtral always divides the weights of a token's experts by their sum.
    return ExpertSpec(count, active, width, normalised=c.get("norm_topk_prob", True))


def _check_sparse(c: Mapping[str, Any]) -> None:
    """Raise UserError for layers without experts among others. No published model has both."""
    dense, step = c["mlp_only_layers"] or [], c["decoder_sparse_step"]
    for i in range(c["num_hidden_layers"]):
        if i in dense or (i + 1) % step:
            raise UserError(
                f"config.json: layer {i} has no experts (mlp_only_layers={dense},"
                f" decoder_sparse_step={step}), and only mixtures in which every layer has them are"
                " supported, as the published ones: [] and 1"
            )


def _rules(start: str, gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the weight table by the start of the mixture's names, and those of its matrices."""
    key, path = "model.layers.{i}." + start, "layers.mlp."
    return (
        Rule(key + "gate.weight", path + "router.kernel", "e d -> d e"),
        Rule(f"{key}experts.{{e}}.{gate}.weight", path + "experts.gate_proj.kernel", "f d -> d f"),
        Rule(f"{key}experts.{{e}}.{up}.weight", path + "experts.up_proj.kernel", "f d -> d f"),
        Rule(f"{key}experts.{{e}}.{down}.weight", path + "experts.down_proj.kernel", "d f -> f d"),
        *(rule for rule in llama.RULES if ".mlp." not in rule.key),
    )


def as_mixture(source: Source, start: str, gate: str, up: str, down: str) -> Source:
    """Return the source under the names of `_rules`, which has the same arguments.

    Raises: UserError for fused experts of another shape, and as `as_decoder`.
    """
    tensors, ends = source.tensors, {"gate_up_proj": (gate, up), "down_proj": (down,)}
    if tensors is None:
        return as_decoder(source)
    cut = {key: key.partition("mlp.experts.") for key in tensors.keys()}  # noqa: SIM118
    fused = {key: parts for key, parts in cut.items() if parts[2] in ends}
    if not fused:
        return as_decoder(source)
    slabs: dict[str, Slab] = {}
    for key, (layer, _, end) in fused.items():
        (shape, _), names = tensors.info(key), ends[end]
        if len(shape) != 3 or shape[1] % len(names):
            raise UserError(
                f"{source.name}: tensor {key} has shape {shape}; expected [experts, {len(names)} *"
                " rows, columns], as transformers 5 saves fused experts"
            )
        slabs |= {
            f"{layer}{start}experts.{e}.{name}.weight": Slab(key, e, i, len(names))
            for e in range(shape[0])
            for i, name in enumerate(names)
        }
    kept = [key for key in cut if key not in fused]
    others = {key.replace(".mlp.gate.", f".{start}gate."): key for key in kept}
    if both := sorted(slabs.keys() & others.keys()):
        raise UserError(f"{source.name}: tensor {both[0]} is there twice, alone and fused")
    return as_decoder(replace(source, tensors=Unfused(tensors, slabs, others)))


MIXTRAL_NAMES = ("block_sparse_moe.", "w1", "w3", "w2")
QWEN3_MOE_NAMES = ("mlp.", "gate_proj", "up_proj", "down_proj")
RULES = _rules(*MIXTRAL_NAMES)
QWEN3_MOE_RULES = _rules(*QWEN3_MOE_NAMES)
ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: "MixtralForCausalLM",
    config=lambda config, where: read(config),
    rules=lambda cfg: RULES,
    opened=lambda source: as_mixture(source, *MIXTRAL_NAMES),
)
QWEN3_MOE = ARCHITECTURE._replace(
    class_name=lambda config: "Qwen3MoeForCausalLM",
    rules=lambda cfg: QWEN3_MOE_RULES,
    opened=lambda source: as_mixture(source, *QWEN3_MOE_NAMES),
)
