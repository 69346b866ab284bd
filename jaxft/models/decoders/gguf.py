"""A decoder in a GGUF file: its metadata, and what llama.cpp would compute in another way.

The metadata are read back, as from a file. A model that then differs is refused.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.config import DecoderConfig, layer_type_ropes
from jaxft.models.decoders.families import gpt_oss
from jaxft.models.decoders.families.llama import MINISTRAL3_ROPE
from jaxft.models.decoders.families.wrapped import TEXT_TYPES
from jaxft.nn.rope import ORIGINAL, Long, Rope
from jaxft.weights.files.gguf_architectures import GGUF_ARCHITECTURES
from jaxft.weights.files.gguf_config import (
    IN_ROPE,
    LLAMA3_FACTORS,
    LONG_FACTORS,
    PATTERN,
    Metadata,
    model_config,
)
from jaxft.weights.files.gguf_table import GgufArchitecture

# The entry that writes each model_type, which a model of pictures and text has in its text_config.
GGUF_NAMES = {kind: one for one in reversed(GGUF_ARCHITECTURES) for kind in one.model_types}
GGUF_WRITTEN = (*GGUF_NAMES, *TEXT_TYPES)
_INSTEAD = "use export.kind='merged'"
# Ropes of a config.json without one, and the bases of a rope without one: of all layers, and of
# those with a window.
DEFAULT_ROPES = {"gpt_oss": gpt_oss.ROPE, "ministral3": MINISTRAL3_ROPE}
THETAS = {
    "smollm3": (2e6, 0.0),
    "mixtral": (1e6, 0.0),
    "gpt_oss": (1.5e5, 0.0),
    "gemma3_text": (1e6, 1e4),
    "olmo3": (5e5, 5e5),
}
BIASES = {
    "qkv_bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "o_bias": ("self_attn.o_proj.bias",),
    "mlp_bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias", "mlp.down_proj.bias"),
}
# Values that change nothing in what is computed. Layers and ropes are compared one by one.
UNCOMPARED = {"bos_id", "eos_ids", "pad_id", "image_ids", "initializer_range", "router_loss"}
UNCOMPARED |= {"layers", "ropes", "max_positions"}


def gguf_architecture(config: Mapping[str, Any], cfg: DecoderConfig) -> GgufArchitecture:
    """Return llama.cpp's architecture of a decoder.

    config: the content of config.json. Raises UserError for a model that llama.cpp does not have
    under one of these names, or would compute in another way.
    """
    config = _text(config)
    kind, stated = str(config.get("model_type")), asdict(cfg)
    if kind not in GGUF_NAMES or cfg.num_labels:
        what = "a head of scores" if cfg.num_labels else f"model_type={kind!r}"
        raise UserError(
            f"export.kind='gguf' writes {', '.join(GGUF_WRITTEN)} with a head of the vocabulary,"
            f" not {what}; {_INSTEAD}"
        )
    entry = GGUF_NAMES[kind]
    keys = [] if cfg.tied else ["lm_head.weight"]
    found = []
    for bias, ends in BIASES.items():
        names = [f"model.layers.0.{end}" for end in ends if stated[bias]]
        keys += names
        found += [bias] if any(not [*entry.placed(name)] for name in names) else []
    if entry.head is cfg.tied:
        found.append(f"tie_word_embeddings={str(cfg.tied).lower()}")
    if entry.square and cfg.num_heads * cfg.head_dim != cfg.hidden_size:
        found.append(f"head_dim={cfg.head_dim}")
    if entry.period and all(layer.window for layer in cfg.layers):
        found.append("a window in every layer")  # its engine aborts
    given = {key: x for key, x in _rope(config).items() if not isinstance(x, list)}
    rope = f"rope type {_kind(given)!r} of {given}"
    theirs = cfg if found else _read_back(config, cfg, keys)
    if differing := [*found, *_differences(cfg, theirs, rope)]:
        raise UserError(
            f"export.kind='gguf': {', '.join(differing)} is not in llama.cpp's {entry.name};"
            f" {_INSTEAD}"
        )
    return entry


def text_key(key: str) -> str:
    """Return the key that a tensor of a model of pictures and text has in its text model."""
    return key.removeprefix("language_model.").replace("model.language_model.", "model.", 1)


def _text(config: Mapping[str, Any]) -> Mapping[str, Any]:
    kind, text = config.get("model_type"), config.get("text_config")
    return {"model_type": TEXT_TYPES[kind][0], **text} if text and kind in TEXT_TYPES else config


def _read_back(config: Mapping[str, Any], cfg: DecoderConfig, keys: list[str]) -> DecoderConfig:
    """Return the configuration that the file of a model has when it is read."""
    entry, factors = GGUF_NAMES[config["model_type"]], rope_factors(config, cfg)
    # A file holds all divisors of llama3, from which a reader gets back only Meta's own settings.
    exact = factors.pop(LLAMA3_FACTORS, None) is not None and "llama3" in entry.ropes
    meta = Metadata("export.kind='gguf'", entry, model_metadata(config, cfg))
    read = model_config(meta, keys, cfg.vocab_size, factors)
    read |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    theirs = registry.find(read, "decoder").config(read, "config.json")
    return replace(theirs, ropes=cfg.ropes) if exact else theirs


def _differences(ours: DecoderConfig, theirs: DecoderConfig, rope: str) -> Iterator[str]:
    """Yield values of a model that another one does not have. rope: the words for its rope."""
    one, other = asdict(ours), asdict(theirs)
    for key in sorted(one.keys() - UNCOMPARED):
        if not _same(one[key], other[key]):
            yield f"{key}={one[key]!r} (but {other[key]!r})"
    for spec, read in zip(ours.layers, theirs.layers, strict=True):
        mine, its = asdict(spec), asdict(read)
        for values in (mine, its):  # a window beyond the last position has no effect
            window = values["window"]
            values["window"] = window if window and window < theirs.max_positions else None
        ropes = [
            None if x.rope is None else _numbers(cfg.ropes[x.rope])
            for x, cfg in ((spec, ours), (read, theirs))
        ]
        differing = [key for key in mine if key != "rope" and not _same(mine[key], its[key])]
        yield from (f"{key}={mine[key]!r} (but {its[key]!r})" for key in differing)
        if not differing and not _same(*ropes):
            yield "other layers without rope" if None in ropes else rope
        if differing or not _same(*ropes):
            return  # one layer is enough


def _same(one: Any, other: Any) -> bool:
    """Return True for equal values, in which a file rounds numbers to float32."""
    if isinstance(one, float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and bool(np.allclose(one, other, rtol=1e-5, atol=0))
    return one == other


def _numbers(rope: Rope) -> list[float]:
    beyond = () if rope.beyond is None else (rope.beyond.limit, *np.ravel(rope.beyond[1]))
    return [rope.scale, *rope.inv_freq, *beyond]


def model_metadata(config: Mapping[str, Any], cfg: DecoderConfig) -> dict[str, Any]:
    """Return the keys of the architecture, as llama.cpp's converter writes them.

    In an architecture without sliding windows the context ends where the window does.
    """
    config = _text(config)
    entry = GGUF_NAMES[config["model_type"]]
    values, made = _values(entry, config, cfg), {}
    for line in entry.keys:
        if values[line.key] is not None:
            made[line.name] = line.kind(values[line.key])
    made |= {
        "vocab_size": cfg.vocab_size,
        "rope.dimension_count": 2 * len(cfg.ropes[0].inv_freq),
        **_scaling(entry, config, cfg),
    }
    if config.get("head_dim") or cfg.head_dim * cfg.num_heads != cfg.hidden_size:
        made |= {"attention.key_length": cfg.head_dim, "attention.value_length": cfg.head_dim}
    if entry.period and values["sliding_window"]:
        made[PATTERN] = _period(cfg)
    return {f"{entry.name}.{key}": value for key, value in made.items()}


def _values(
    entry: GgufArchitecture, config: Mapping[str, Any], cfg: DecoderConfig
) -> dict[str, Any]:
    """Return the values of the keys of config.json that a file may hold."""
    windows, layer = [spec.window for spec in cfg.layers if spec.window], cfg.layers[0]
    experts, rope = layer.experts, _rope(config)
    return {
        "num_hidden_layers": cfg.num_layers,
        "max_position_embeddings": min([cfg.max_positions, *([] if entry.period else windows)]),
        "hidden_size": cfg.hidden_size,
        "intermediate_size": cfg.intermediate_size,
        "num_attention_heads": cfg.num_heads,
        "num_key_value_heads": cfg.num_kv_heads,
        "rms_norm_eps": cfg.rms_norm_eps,
        "rope_theta": rope["rope_theta"],
        "rope_local_base_freq": _rope(config, sliding=True)["rope_theta"],
        IN_ROPE + "mscale_all_dim": rope.get("mscale_all_dim"),
        IN_ROPE + "llama_4_scaling_beta": rope.get("llama_4_scaling_beta"),
        "sliding_window": min(windows, default=None),
        "num_local_experts": experts and experts.count,
        "num_experts": experts and experts.count,
        "num_experts_per_tok": experts and experts.active,
        "moe_intermediate_size": experts and experts.width,
        "attn_logit_softcapping": layer.soft_cap,
        "final_logit_softcapping": cfg.logits_soft_cap,
        "embedding_multiplier": cfg.embedding_scale,
        "attention_multiplier": layer.attention_scale,
        "residual_multiplier": layer.residual_scale,
        "logits_scaling": cfg.logits_divisor,
    }


def _period(cfg: DecoderConfig) -> int:
    """Return n if each n-th layer alone has no window. Other patterns give no n that fits."""
    full = [i + 1 for i, spec in enumerate(cfg.layers) if not spec.window]
    return full[0] if full else cfg.num_layers + 1


def rope_factors(config: Mapping[str, Any], cfg: DecoderConfig) -> dict[str, np.ndarray]:
    """Return the tensors of a file that divide the frequencies of its rope, float32 [H / 2]."""
    rope = _rope(_text(config))
    kind = _kind(rope)
    if kind == "longrope":
        factors = (rope["short_factor"], rope["long_factor"])
        return {
            name: np.array(one, np.float32) for name, one in zip(LONG_FACTORS, factors, strict=True)
        }
    if kind != "llama3":
        return {}
    plain = float(rope["rope_theta"]) ** (-np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    return {LLAMA3_FACTORS: (plain / np.array(cfg.ropes[0].inv_freq)).astype(np.float32)}


def _rope(config: Mapping[str, Any], sliding: bool = False) -> dict[str, Any]:
    """Return the rope parameters, as `rope.from_hf` reads them. sliding: those of local layers."""
    kind = config["model_type"]
    theta, local = THETAS.get(kind, (1e4, 0.0))
    given = config.get("rope_scaling") or config.get("rope_parameters")
    given = DEFAULT_ROPES.get(kind, {}) if given is None else given
    if GGUF_NAMES[kind].two_ropes:
        theta, local = config.get("rope_theta", theta), config.get("rope_local_base_freq", local)
        given = layer_type_ropes(config, theta, local)[sliding]["rope_parameters"]
    return {"rope_theta": config.get("rope_theta", theta), **given}


def _kind(rope: Mapping[str, Any]) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "longrope" if "short_factor" in rope else kind  # old files of Phi have other names


def _scaling(
    entry: GgufArchitecture, config: Mapping[str, Any], cfg: DecoderConfig
) -> dict[str, Any]:
    """Return the keys of a scaled rope."""
    rope, (main, *_) = _rope(config), cfg.ropes
    kind = _kind(rope)
    if isinstance(main.beyond, Long):
        made = {"rope.scaling.original_context_length": main.beyond.limit}
        return {**made, "rope.scaling.attn_factor": float(main.scale)}
    if kind not in ("linear", "yarn"):
        return {}
    original = config.get(ORIGINAL) or rope.get(ORIGINAL) or cfg.max_positions
    factor = float(rope.get("factor") or cfg.max_positions / original)
    made = {"rope.scaling.type": kind, "rope.scaling.factor": factor}
    if kind == "linear":
        return made
    # llama.cpp multiplies it with YaRN's own factor. Ministral 3 has it in another key.
    own = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    stated = any(line.key == IN_ROPE + "mscale_all_dim" for line in entry.keys)
    if not stated and not math.isclose(main.scale, own, rel_tol=1e-6):
        made["rope.scaling.attn_factor"] = main.scale / own
    return {**made, "rope.scaling.original_context_length": original}
