"""What a LLaMA-family config.json says, as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.core.errors import UserError
from jaxft.nn import rope

# What transformers' config classes assume where a config.json has no such key.
COMMON = {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "sliding_window": None,
    "use_sliding_window": False,
    "layer_types": None,
}
_QWEN = {
    "vocab_size": 151936,
    "intermediate_size": 22016,
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "max_position_embeddings": 2048,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "mistral": {
        "vocab_size": 32000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "qwen2": _QWEN,
    "qwen3": {**_QWEN, "head_dim": 128},
    "smollm3": {
        "vocab_size": 128256,
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "pad_token_id": 128004,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "tie_word_embeddings": True,
    },
}
ARCHITECTURES = tuple(f"{n}ForCausalLM" for n in ("Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3"))


@dataclass(frozen=True)
class LlamaConfig:
    """One decoder of the family; `windows` and `rotary` say what differs from layer to layer."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    initializer_range: float
    tied: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: rope.Rope
    rotary: tuple[bool, ...]
    windows: tuple[int | None, ...]
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None

    @classmethod
    def from_hf(cls, config: Mapping[str, Any]) -> "LlamaConfig":
        """Read a config.json of model_type llama, mistral, qwen2, qwen3 or smollm3.

        Absent keys take the default of the transformers 5 class. Raises UserError for another
        model_type or architecture, and for values that no layer here computes.
        """
        kind = config.get("model_type")
        _check_supported(kind, config.get("architectures") or [])
        c = {**COMMON, **DEFAULTS[str(kind)], **config}
        heads, kv_heads = c["num_attention_heads"], c["num_key_value_heads"]
        kv_heads = heads if kv_heads is None else kv_heads
        _check_shapes(c, heads, kv_heads)
        head_dim = c["head_dim"] or c["hidden_size"] // heads
        rotary = _rotary(c, str(kind))
        flexible = kind in ("llama", "qwen3", "smollm3") and bool(c["attention_bias"])
        return cls(
            vocab_size=c["vocab_size"],
            hidden_size=c["hidden_size"],
            intermediate_size=c["intermediate_size"],
            num_layers=c["num_hidden_layers"],
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            max_positions=c["max_position_embeddings"],
            rms_norm_eps=c["rms_norm_eps"],
            initializer_range=c["initializer_range"],
            tied=bool(c["tie_word_embeddings"]),
            qkv_bias=kind == "qwen2" or flexible,
            o_bias=flexible,
            mlp_bias=kind in ("llama", "smollm3") and bool(c["mlp_bias"]),
            qk_norm=kind == "qwen3",
            rope=rope.from_hf(c, head_dim, 2e6 if kind == "smollm3" else 1e4),
            rotary=rotary,
            windows=_windows(c, str(kind), rotary),
            bos_id=c["bos_token_id"],
            eos_ids=_ids(c["eos_token_id"]),
            pad_id=c["pad_token_id"],
        )


def _check_supported(kind: Any, architectures: list[str]) -> None:
    if kind not in DEFAULTS:
        raise UserError(
            f"config.json: model_type={kind!r} is not supported; supported are"
            f" {', '.join(DEFAULTS)}"
        )
    if architectures and not set(architectures) & set(ARCHITECTURES):
        raise UserError(
            f"config.json: architectures={architectures} is not a causal language model;"
            f" supported are {', '.join(ARCHITECTURES)}"
        )


def _check_shapes(c: Mapping[str, Any], heads: int, kv_heads: int) -> None:
    if c["hidden_act"] != "silu":
        raise UserError(f"config.json: hidden_act={c['hidden_act']!r} is not supported, only silu")
    if c["head_dim"] is None and c["hidden_size"] % heads:
        raise UserError(
            f"config.json: hidden_size={c['hidden_size']} is not a multiple of"
            f" num_attention_heads={heads}; set head_dim"
        )
    if heads % kv_heads:
        raise UserError(
            f"config.json: num_attention_heads={heads} is not a multiple of"
            f" num_key_value_heads={kv_heads}"
        )


def _rotary(c: Mapping[str, Any], kind: str) -> tuple[bool, ...]:
    """Which layers rotate: SmolLM 3 leaves every fourth one without positions."""
    count = c["num_hidden_layers"]
    if kind != "smollm3":
        return (True,) * count
    listed, interval = c.get("no_rope_layers"), c.get("no_rope_layer_interval", 4)
    if listed is None:
        return tuple((i + 1) % interval != 0 for i in range(count))
    return _per_layer("no_rope_layers", tuple(bool(one) for one in listed), count)


def _windows(c: Mapping[str, Any], kind: str, rotary: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens, None for full attention."""
    count, window = c["num_hidden_layers"], c["sliding_window"]
    if kind in ("llama", "mistral"):
        return (window if kind == "mistral" else None,) * count
    if kind != "smollm3" and not c["use_sliding_window"]:
        window = None
    if c["layer_types"] is not None:
        names = _per_layer("layer_types", tuple(c["layer_types"]), count)
        sliding = tuple(_is_sliding(name, window) for name in names)
    elif kind == "smollm3":
        sliding = tuple(bool(c["use_sliding_window"]) and not rotates for rotates in rotary)
    else:
        sliding = tuple(i >= c["max_window_layers"] for i in range(count))
    return tuple(window if slides else None for slides in sliding)


def _is_sliding(name: str, window: int | None) -> bool:
    if name not in ("full_attention", "sliding_attention"):
        raise UserError(
            f"config.json: layer_types has {name!r}; supported are full_attention,"
            " sliding_attention"
        )
    if name == "sliding_attention" and window is None:
        raise UserError(
            "config.json: layer_types asks for sliding_attention, but sliding_window is not set"
            " (or use_sliding_window is false)"
        )
    return name == "sliding_attention"


def _per_layer(name: str, values: tuple, count: int) -> tuple:
    if len(values) < count:
        raise UserError(f"config.json: {name} has {len(values)} entries for {count} layers")
    return values[:count]


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
