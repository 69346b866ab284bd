"""The configuration of a decoder, layer by layer, and the reading of a config.json's keys.

An absent key has the default of the class of its model_type. null is accepted for the keys for
which that class accepts it, and refused for the others.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Literal, NamedTuple

from jaxft.core.errors import UserError
from jaxft.nn import rope
from jaxft.nn.gated import Clamp
from jaxft.nn.norm import RMSKind
from jaxft.weights.fields import MOST, MOST_LAYERS

LONGEST_PERIOD = 8  # layers that are compiled apart in one scan
ACTIVATION_NAMES = {"silu": "silu", "swish": "silu"}  # two names of one function
OLD_NAMES = {"attention": "full_attention"}  # transformers renames it on reading


class ExpertSpec(NamedTuple):
    """The experts of a layer: their count, how many a token has, and the width of each.

    normalised: the weights of a token's experts sum to 1. Otherwise those of all experts do.
    fused: gate and up are one matrix, and all matrices have a bias, that of the router too. clamp:
    it replaces the activation.
    """

    count: int
    active: int
    width: int
    normalised: bool
    fused: bool = False
    clamp: Clamp | None = None


@dataclass(frozen=True)
class LayerSpec:
    """The kind of one layer. Every field is a Python value, so a step is compiled for it.

    window: the number of keys that a query attends to, its own included. None is all keys.
    rope: the index of the rotation in `DecoderConfig.ropes`. None is no position embedding.
    norms: "pre" is x + f(norm(x)), "post" is x + norm(f(x)), "sandwich" is x + norm(f(norm(x))).
    activation: a key of `gated.ACTIVATIONS`. qk_norm: an RMSNorm of q and k, of each head or of all
    heads of a token together. attention_scale: the factor of scores, None for 1 / sqrt(head_dim).
    soft_cap: scores s become soft_cap * tanh(s / soft_cap), None for no change.
    residual_scale: the factor of both branches of a layer before they are added. experts: they
    replace the MLP. sinks: each head has a learned score, as in `kernels.attention`.
    """

    window: int | None = None
    rope: int | None = 0
    norms: Literal["pre", "post", "sandwich"] = "pre"
    activation: str = "silu"
    qk_norm: Literal["head", "width"] | None = None
    attention_scale: float | None = None
    soft_cap: float | None = None
    residual_scale: float = 1.0
    experts: ExpertSpec | None = None
    sinks: bool = False


class QueryScaling(NamedTuple):
    """The factor 1 + beta * ln(1 + floor(position / original)) of rotated queries."""

    beta: float
    original: int


@dataclass(frozen=True)
class DecoderConfig:
    """The values of a whole decoder, and the kind of each of its layers.

    norm: the kind of every RMSNorm. embedding_scale: the factor of the embeddings of tokens,
    rounded to their dtype. logits_divisor: the logits of the vocabulary are divided by it, and
    scores of `num_labels` are not. logits_soft_cap: as `LayerSpec.soft_cap`, for these logits.
    image_ids: tokens that stand for pictures, which no text may hold. fused: q, k and v are one
    projection, and so are gate and up. rope_by_end: a continuation has the longrope frequencies of
    its last possible token from its start. router_loss: the weight that the checkpoint states for
    the loss that balances experts.
    Raises: ValueError for layers whose parameters differ, because layers are stacked in one array.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
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
    ropes: tuple[rope.Rope, ...]
    layers: tuple[LayerSpec, ...]
    fused: bool = False
    rope_by_end: bool = False
    norm: RMSKind = "cast_first"
    embedding_scale: float = 1.0
    logits_divisor: float = 1.0
    logits_soft_cap: float | None = None
    query_scaling: QueryScaling | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    pad_id: int | None = None
    image_ids: tuple[int, ...] = ()
    router_loss: float = 0.0
    num_labels: int = 0  # outputs of a head of scores, which replaces that of the vocabulary

    def __post_init__(self) -> None:
        kinds = {(one.norms, one.qk_norm, one.experts, one.sinks) for one in self.layers}
        if len(kinds) != 1:
            raise ValueError(
                "layers with different norms, experts or sinks have different parameters"
            )

    @property
    def num_layers(self) -> int:
        return len(self.layers)


class LayerScan(NamedTuple):
    """The layers of one scan, from `start` on: a period of kinds, repeated `times` times."""

    start: int
    period: tuple[LayerSpec, ...]
    times: int


def layer_scans(layers: tuple[LayerSpec, ...], start: int = 0) -> tuple[LayerScan, ...]:
    """Cut layers into scans, so that only a few layers are compiled.

    A repeated pattern of up to LONGEST_PERIOD layers becomes one scan, and the rest of it another.
    Without one (windows from some layer on) each run of equal layers becomes a scan.
    """
    if not layers:
        return ()
    # The smallest number of layers after which all of them repeat.
    period = next(n for n in range(1, len(layers) + 1) if layers[n:] == layers[:-n])
    times = len(layers) // period
    if period > LONGEST_PERIOD:
        period, times = 1, len(list(takewhile(lambda layer: layer == layers[0], layers)))
    done = period * times
    return (LayerScan(start, layers[:period], times), *layer_scans(layers[done:], start + done))


# ---- the keys of config.json ------------------------------------------------------------------

SIZE, COUNT = "a whole number above 0", "a whole number from 0 on"
LAYERS = f"a whole number from 1 to {MOST_LAYERS}"
INDICES = "a list of layers, from 0 on"
NUMBER, FLAG, NAME = "a number from 0 on", "true or false", "a name"
IDS, NAMES, FLAGS = "a token id or a list of them", "a list of names", "a list of 0 and 1"


class Key(NamedTuple):
    """The default of a key, a description of its values, and if null is one of them."""

    default: Any
    values: str
    null: bool = False


COMMON = {
    "hidden_size": Key(4096, SIZE),
    "num_hidden_layers": Key(32, LAYERS),
    "num_attention_heads": Key(32, SIZE),
    "hidden_act": Key("silu", NAME),
    "initializer_range": Key(0.02, NUMBER),
    "rms_norm_eps": Key(1e-6, NUMBER),
    "tie_word_embeddings": Key(False, FLAG),
    "bos_token_id": Key(None, IDS, null=True),
    "eos_token_id": Key(None, IDS, null=True),
    "pad_token_id": Key(None, IDS, null=True),
    "layer_types": Key(None, NAMES, null=True),
}


def read_keys(config: Mapping[str, Any], keys: Mapping[str, Key]) -> dict[str, Any]:
    """Return the value of every key of a class, or its default where config.json lacks the key.

    Raises: UserError for a value of another type, and for a null that the class refuses.
    """
    for name, key in keys.items():
        if name in config:
            _check(name, config[name], key)
    return {name: config.get(name, key.default) for name, key in keys.items()}


def _check(name: str, value: Any, key: Key) -> None:
    if value is None and not key.null:
        instead = "" if key.default is None else f" for {json.dumps(key.default)}"
        raise UserError(
            f"config.json: {name} is null, which transformers refuses too; expected {key.values}:"
            f" give it, or leave the key out{instead}"
        )
    if value is not None and not _fits(value, key.values):
        raise UserError(f"config.json: {name}={json.dumps(value)}; expected {key.values}")


def _fits(value: Any, values: str) -> bool:
    # type() and not isinstance, because True is an int in Python.
    if values in (SIZE, COUNT, LAYERS):
        most = MOST_LAYERS if values == LAYERS else MOST
        return type(value) is int and (values == COUNT or value > 0) and 0 <= value <= most
    if values == NUMBER:
        return type(value) in (int, float) and 0 <= value < math.inf
    if values == FLAG:
        return type(value) is bool
    if values == NAME:
        return type(value) is str
    if values == NAMES:
        return type(value) is list and all(type(one) is str for one in value)
    if values == IDS and type(value) is int:
        return True
    return type(value) is list and all(type(one) in (int, bool) for one in value)


def decoder_config(
    config: Mapping[str, Any],
    c: Mapping[str, Any],
    layers: tuple[LayerSpec, ...],
    *,
    qkv_bias: bool,
    default_theta: float = 1e4,
    ropes: tuple[Mapping[str, Any], ...] = (),
    rotary: float = 1.0,
) -> DecoderConfig:
    """Return the configuration of a decoder with LLaMA's key names.

    config: config.json. c: its keys as `read_keys` returns them. layers: one spec a layer. ropes:
    the settings of each rope in keys of config.json, by default one rope by config.json itself.
    rotary: the fraction of each head that rotates.
    Raises: UserError for shapes that do not fit each other, and for a rope that is not supported.
    """
    heads = c["num_attention_heads"]
    kv_heads = c["num_key_value_heads"] or heads
    head_dim = c["head_dim"] or c["hidden_size"] // heads
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
    rotated = int(head_dim * rotary)
    if head_dim % 2 or rotated % 2 or not rotated:
        part = "" if rotary == 1.0 else f" times partial_rotary_factor={rotary}"
        raise UserError(f"config.json: head_dim={head_dim}{part} is odd, but rope rotates pairs")
    eos = c["eos_token_id"]  # one id, a list of them, or null
    return DecoderConfig(
        vocab_size=c["vocab_size"],
        hidden_size=c["hidden_size"],
        intermediate_size=c["intermediate_size"],
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        max_positions=c["max_position_embeddings"],
        rms_norm_eps=c["rms_norm_eps"],
        initializer_range=c["initializer_range"],
        tied=c["tie_word_embeddings"],
        qkv_bias=qkv_bias,
        o_bias=bool(c.get("attention_bias")),
        mlp_bias=bool(c.get("mlp_bias")),
        ropes=tuple(
            rope.from_hf({**config, **one, **c}, rotated, default_theta) for one in ropes or ({},)
        ),
        layers=layers,
        bos_id=c["bos_token_id"],
        eos_ids=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        pad_id=c["pad_token_id"],
    )


def activation(
    c: Mapping[str, Any],
    key: str = "hidden_act",
    names: Mapping[str, str] = ACTIVATION_NAMES,
) -> str:
    """Return the activation that `key` names. Raises UserError for all but `names`."""
    if c[key] not in names:
        raise UserError(
            f"config.json: {key}={c[key]!r} is not supported, only {' or '.join(names)}"
        )
    return names[c[key]]


def layer_windows(
    c: Mapping[str, Any], window: int | None, sliding: tuple[bool, ...]
) -> tuple[int | None, ...]:
    """Return each layer's window in tokens, None for full attention. Raises as `sliding_layers`."""
    slides = sliding_layers(c, window, sliding)
    return tuple(window if one else None for one in slides)


def sliding_layers(
    c: Mapping[str, Any], window: int | None, sliding: tuple[bool, ...]
) -> tuple[bool, ...]:
    """Return True for each layer that has a sliding window.

    `sliding` marks the layers that slide by default in the class. `layer_types` of config.json
    replaces it.
    Raises: UserError for layer types that are not supported or that contradict `sliding_window`.
    """
    if c["layer_types"] is not None:
        sliding = _listed(c["layer_types"], c["num_hidden_layers"], window)
    if window == 0 and any(sliding):
        raise UserError(
            "config.json: sliding_window=0 leaves no key to attend to; expected a number above 0"
            " or null"
        )
    return sliding


def layer_type_ropes(
    config: Mapping[str, Any], full_theta: float, sliding_theta: float
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the settings of two ropes, for layers of full attention and for sliding ones.

    `rope_parameters` has one dict for each. `rope_scaling` of transformers 4 concerns full layers
    alone. The thetas are for dicts without one.
    Raises: UserError for settings that are no dict, and for one dict for all layers.
    """
    types, scaling = ("full_attention", "sliding_attention"), config.get("rope_scaling") or {}
    given = config.get("rope_parameters")
    if given is None:
        # transformers starts from a rope_type, so that a `type` of rope_scaling has no effect.
        given = {one: {"rope_type": "default"} for one in types}
    nested = isinstance(given, dict) and (not given or any(one in given for one in types))
    parts = [*((given.get(one) or {}) for one in types), scaling] if nested else [given, None]
    if not all(isinstance(one, dict) for one in parts):
        raise UserError(
            f"config.json: rope_parameters={given} and rope_scaling={scaling}; expected an object"
            f" with one object of rope parameters for {' and one for '.join(types)}"
        )
    full, sliding, scaling = parts
    made = ({"rope_theta": full_theta, **full, **scaling}, {"rope_theta": sliding_theta, **sliding})
    # transformers does not read `truncate` of such a dict.
    kept = ({key: one[key] for key in one if key != "truncate"} for one in made)
    first, second = ({"rope_scaling": None, "rope_parameters": one} for one in kept)
    return first, second


def _listed(types: list[str], count: int, window: int | None) -> tuple[bool, ...]:
    """Return True for each layer that has a sliding window by `layer_types`."""
    names = [OLD_NAMES.get(name, name) for name in types]
    if len(names) != count:
        raise UserError(f"config.json: layer_types has {len(names)} entries for {count} layers")
    for name in names:
        if name not in ("full_attention", "sliding_attention"):
            raise UserError(
                f"config.json: layer_types has {name!r}; supported are full_attention,"
                " sliding_attention"
            )
    if "sliding_attention" in names and window is None:
        raise UserError(
            "config.json: layer_types asks for sliding_attention, but sliding_window is not set"
            " (or use_sliding_window is false)"
        )
    return tuple(name == "sliding_attention" for name in names)
