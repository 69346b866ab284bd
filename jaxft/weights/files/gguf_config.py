"""config.json of transformers from the metadata of a GGUF file."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.fields import MOST_LAYERS
from jaxft.weights.files.gguf_table import IN_ROPE, GgufArchitecture, MetadataKey

ORIGINAL_LENGTH = "original_max_position_embeddings"
LOCAL_BASE = "rope.freq_base_swa"  # of layers with a window
PATTERN = "attention.sliding_window_pattern"
LONG_FACTORS = ("rope_factors_short.weight", "rope_factors_long.weight")
LLAMA3_FACTORS = "rope_freqs.weight"
ROPE_TENSORS = (*LONG_FACTORS, LLAMA3_FACTORS)


@dataclass(frozen=True)
class Metadata:
    """The metadata of one architecture. `where` begins the texts of errors.

    Raises: UserError for values that are missing or wrong.
    """

    where: str
    architecture: GgufArchitecture
    values: Mapping[str, Any]

    def error(self, text: str) -> UserError:
        return UserError(f"{self.where}: {text}")

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(f"{self.architecture.name}.{name}", default)

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.get(name, default)
        if type(value) is not int or not 0 < value < 2**31:
            raise self._wrong(name, "one positive integer")
        return value

    def decimal(self, name: str, default: float | None = None) -> float:
        """Return the shortest decimal of a stored float32: 1e-05, not 9.999999747378752e-06."""
        value = self.get(name, default)
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise self._wrong(name, "one positive number")
        return shortest(value)

    def _wrong(self, name: str, expected: str) -> UserError:
        name = f"{self.architecture.name}.{name}"
        return self.error(f"{name} is {self.values.get(name)!r}; expected {expected}")

    def value(self, line: MetadataKey) -> int | float | None:
        # 0 is no window and no cap in llama.cpp.
        if line.null and line.default is None and not self.get(line.name):
            return None
        if line.kind is float:
            return self.decimal(line.name, line.default)
        return self.integer(line.name, None if line.default is None else int(line.default))


def shortest(value: float) -> float:
    """Return the shortest decimal that is the same float32."""
    return float(str(np.float32(value)))


def model_config(
    meta: Metadata, keys: Collection[str], rows: int, factors: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Return the keys of config.json that concern the model, for both transformers 4 and 5.

    keys: the tensors under transformers' names. rows: of the embedding. factors: the tensors of the
    file that divide frequencies of rope.
    Raises: UserError for metadata that are missing, wrong, or of a model that is not supported.
    """
    entry = meta.architecture
    made: dict[str, Any] = {line.key: meta.value(line) for line in entry.keys}
    if made["num_hidden_layers"] > MOST_LAYERS:
        raise meta.error(f"{entry.name}.block_count is above {MOST_LAYERS}; it is damaged")
    in_rope = {
        key.removeprefix(IN_ROPE): made.pop(key) for key in list(made) if key.startswith(IN_ROPE)
    }
    width, heads = meta.integer("embedding_length"), meta.integer("attention.head_count")
    made["num_key_value_heads"] = made["num_key_value_heads"] or heads
    head_dim = meta.integer("attention.key_length", width // heads)
    rotated = meta.integer("rope.dimension_count", head_dim)
    if rotated != head_dim and not entry.partial:
        raise meta.error("rotates a part of each head only; use its HF folder")
    made |= {
        "architectures": [f"{entry.class_name}ForCausalLM"],
        "model_type": entry.model_types[0],
        "vocab_size": rows,
        "head_dim": head_dim,
        **_rope(meta, rotated, in_rope, factors),
        "tie_word_embeddings": "lm_head.weight" not in keys,
        "attention_bias": "model.layers.0.self_attn.q_proj.bias" in keys,
        "mlp_bias": "model.layers.0.mlp.up_proj.bias" in keys,
        **entry.constants,
    }
    if entry.partial:
        part = rotated / head_dim
        exact = int(part * head_dim) == rotated
        made["partial_rotary_factor"] = part if exact else math.nextafter(part, 2.0)
        made[ORIGINAL_LENGTH] = meta.integer(
            "rope.scaling.original_context_length", meta.integer("context_length")
        )
    if entry.wide_layers:
        wide = made["num_hidden_layers"] == entry.wide_layers
        made["query_pre_attn_scalar"] = width // heads if wide else head_dim
    if entry.period:
        made["layer_types"] = _layer_types(meta, made["num_hidden_layers"], made["sliding_window"])
    return made


def _layer_types(meta: Metadata, count: int, window: int | float | None) -> list[str]:
    """Return the kind of each layer by a number n (each n-th is full) or by a list of flags."""
    given = meta.get(PATTERN, meta.architecture.period)
    if type(given) is int and given >= 0:
        given = [not given or (i + 1) % given != 0 for i in range(count)]
    if not isinstance(given, list) or len(given) < count:
        raise meta.error(f"{meta.architecture.name}.{PATTERN} is no number or list of {count}")
    names = {True: "sliding_attention", False: "full_attention"}
    return [names[bool(slides and window)] for slides in given[:count]]


def _rope(
    meta: Metadata,
    rotated: int,
    in_rope: Mapping[str, Any],
    factors: Mapping[str, np.ndarray],
) -> dict[str, Any]:
    """Return the keys of the rope in both dialects. in_rope: further keys of a YaRN dict."""
    theta = meta.decimal("rope.freq_base", 10000.0)
    scaling = _scaling(meta, rotated, factors)
    if scaling and scaling["rope_type"] == "yarn":
        stated = {key: value for key, value in in_rope.items() if value is not None}
        scaling |= {**meta.architecture.yarn, **stated}
    full = {"rope_theta": theta, **(scaling or {"rope_type": "default"})}
    made: dict[str, Any] = {"rope_theta": theta, "rope_scaling": scaling, "rope_parameters": full}
    if meta.architecture.two_ropes:
        own = next((x for x in meta.architecture.keys if x.name == LOCAL_BASE), None)
        local = {"rope_theta": meta.value(own) if own else theta, "rope_type": "default"}
        made["rope_parameters"] = {"full_attention": full, "sliding_attention": local}
    return made


def _scaling(
    meta: Metadata, rotated: int, factors: Mapping[str, np.ndarray]
) -> dict[str, Any] | None:
    """Return the dict of a scaled rope, None for a plain one."""
    kind = meta.get("rope.scaling.type", "none")
    if factors:
        kind = "llama3" if LLAMA3_FACTORS in factors else "longrope"
    factor = meta.decimal("rope.scaling.factor", 1.0)
    if kind == "none" or (kind == "linear" and factor == 1.0):
        return None
    if kind not in meta.architecture.ropes:
        known = ", ".join(meta.architecture.ropes)
        raise meta.error(f"rope scaling {kind!r}; expected none, {known}; use its HF folder")
    if kind == "llama3":
        return _llama3(meta, rotated, factors[LLAMA3_FACTORS])
    if kind == "longrope":
        return _longrope(meta, rotated, factors)
    if kind == "linear":
        return {"rope_type": "linear", "factor": factor}
    length = meta.integer("rope.scaling.original_context_length")
    made = {"rope_type": "yarn", "factor": factor, ORIGINAL_LENGTH: length}
    attention = meta.decimal("rope.scaling.attn_factor", 1.0)
    # llama.cpp multiplies it with YaRN's own factor.
    own = 1.0 if factor <= 1 else 0.1 * math.log(factor) + 1.0
    return made if attention == 1.0 else {**made, "attention_factor": attention * own}


def _llama3(meta: Metadata, rotated: int, stored: np.ndarray) -> dict[str, Any] | None:
    """Return Llama 3.1's RoPE scaling, from the divisor that the file stores per frequency.

    The other constants of the formula are assumed, and the stored values are checked by them.
    """
    factor, low, high, length = float(stored.max()), 1.0, 4.0, 8192
    theta = meta.decimal("rope.freq_base", 10000.0)
    turns = length / (2 * np.pi * theta ** (np.arange(0, rotated, 2) / rotated))
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if stored.shape != expected.shape or not np.allclose(stored, expected, rtol=1e-4):
        raise meta.error("rope_freqs.weight is not of the Llama 3.1 form; use its HF folder")
    if factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        ORIGINAL_LENGTH: length,
    }


def _longrope(meta: Metadata, rotated: int, factors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return the dict of LongRoPE. An attention factor of the file replaces the formula's."""
    for name in LONG_FACTORS:
        if name not in factors:
            raise meta.error(f"tensor {name} is missing beside the other; download it again")
        if factors[name].shape != (rotated // 2,):
            raise meta.error(
                f"tensor {name} of shape {factors[name].shape} has not the {rotated // 2}"
                " frequencies of its metadata; download the file again"
            )
    short, long = ([shortest(x) for x in factors[name]] for name in LONG_FACTORS)
    original = meta.integer("rope.scaling.original_context_length")
    ratio = meta.integer("context_length") / original
    own = (
        1.0 if ratio <= 1 or original == 1 else math.sqrt(1 + math.log(ratio) / math.log(original))
    )
    attention = meta.decimal("rope.scaling.attn_factor", 1.0)
    made: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        ORIGINAL_LENGTH: original,
    }
    same = math.isclose(attention, own, rel_tol=1e-6)
    return made if same else {**made, "attention_factor": attention}
