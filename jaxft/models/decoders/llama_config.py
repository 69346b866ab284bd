"""The config.json of a LLaMA-family model as one frozen dataclass."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models.decoders.llama_keys import architecture, read_keys
from jaxft.nn import rope

ACTIVATIONS = ("silu", "swish")  # two names of one function
OLD_NAMES = {"attention": "full_attention"}  # transformers renames it on reading


@dataclass(frozen=True)
class LlamaConfig:
    """One decoder of the family. `windows` and `rotary` have an entry for each layer."""

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
        """Read the config.json of a supported model_type, as transformers 5 reads it.

        Raises UserError for another model_type or architecture, and for values that no layer here
        computes.
        """
        kind = architecture(config)
        c = read_keys(config, kind)
        heads = c["num_attention_heads"]
        kv_heads = c["num_key_value_heads"] or heads
        head_dim = c["head_dim"] or c["hidden_size"] // heads
        _check_shapes(c, heads, kv_heads, head_dim)
        rotary = _rotary(c)
        biased = bool(c.get("attention_bias"))
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
            tied=c["tie_word_embeddings"],
            qkv_bias=kind == "qwen2" or biased,
            o_bias=biased,
            mlp_bias=bool(c.get("mlp_bias")),
            qk_norm=kind == "qwen3",
            rope=rope.from_hf({**config, **c}, head_dim, 2e6 if kind == "smollm3" else 1e4),
            rotary=rotary,
            windows=_windows(c, kind, rotary),
            bos_id=c["bos_token_id"],
            eos_ids=_ids(c["eos_token_id"]),
            pad_id=c["pad_token_id"],
        )


def _check_shapes(c: Mapping[str, Any], heads: int, kv_heads: int, head_dim: int) -> None:
    if c["hidden_act"] not in ACTIVATIONS:
        raise UserError(
            f"config.json: hidden_act={c['hidden_act']!r} is not supported, only"
            f" {' or '.join(ACTIVATIONS)}"
        )
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
    if head_dim % 2:
        raise UserError(f"config.json: head_dim={head_dim} is odd, but rope rotates pairs")


def _rotary(c: Mapping[str, Any]) -> tuple[bool, ...]:
    """Return for each layer whether it rotates: SmolLM 3 leaves every fourth without positions."""
    count = c["num_hidden_layers"]
    if "no_rope_layers" not in c:
        return (True,) * count
    listed, interval = c["no_rope_layers"], c["no_rope_layer_interval"]
    if listed is None:
        return tuple((i + 1) % interval != 0 for i in range(count))
    if len(listed) < count:
        raise UserError(f"config.json: no_rope_layers has {len(listed)} entries for {count} layers")
    return tuple(bool(one) for one in listed[:count])


def _windows(c: Mapping[str, Any], kind: str, rotary: tuple[bool, ...]) -> tuple[int | None, ...]:
    """Each layer's sliding window in tokens, None for full attention."""
    count, window = c["num_hidden_layers"], c.get("sliding_window")
    if kind in ("qwen2", "qwen3") and not c["use_sliding_window"]:
        window = None
    if c["layer_types"] is not None:
        sliding = _listed(c["layer_types"], count, window, kind)
    elif kind == "smollm3":
        sliding = tuple(c["use_sliding_window"] and not rotates for rotates in rotary)
    elif "max_window_layers" in c:
        sliding = tuple(i >= c["max_window_layers"] for i in range(count))
    else:
        sliding = (True,) * count  # mistral's; llama has no window
    if window == 0 and any(sliding):
        raise UserError("config.json: sliding_window=0 sees nothing; expected a number or null")
    return tuple(window if slides else None for slides in sliding)


def _listed(types: list[str], count: int, window: int | None, kind: str) -> tuple[bool, ...]:
    """Return for each layer whether `layer_types` gives it a sliding window."""
    names = [OLD_NAMES.get(name, name) for name in types]
    if len(names) != count:
        raise UserError(f"config.json: layer_types has {len(names)} entries for {count} layers")
    for name in names:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"config.json: layer_types has {name!r}; supported are full_attention,"
                " sliding_attention"
            )
    if "sliding_attention" in names and kind == "llama":
        raise UserError(
            "config.json: layer_types asks for sliding_attention, which transformers' llama trains"
            " without and decodes with; set model_type to mistral, or all layers to full_attention"
        )
    if "sliding_attention" in names and window is None:
        raise UserError(
            "config.json: layer_types asks for sliding_attention, but sliding_window is not set"
            " (or use_sliding_window is false)"
        )
    return tuple(name == "sliding_attention" for name in names)


def _ids(value: int | list[int] | None) -> tuple[int, ...]:
    return () if value is None else tuple(value) if isinstance(value, list) else (value,)
