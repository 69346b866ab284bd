"""Rotary position embeddings: frequencies from a Hugging Face config, and the rotation."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.errors import UserError

SUPPORTED = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
# Keys of a rope dict that are numbers. Some may be null: transformers then computes a default.
ORIGINAL = "original_max_position_embeddings"
ROPE_NUMBERS = ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", ORIGINAL)
FROM_LENGTHS = ("yarn", "longrope")  # a null factor is the ratio of two lengths
ROPE_OPTIONAL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


class Ntk(NamedTuple):
    """Settings of `dynamic`: beyond `limit` positions the base grows with the longest row."""

    limit: int
    factor: float


class Long(NamedTuple):
    """Settings of `longrope`: the frequencies of a batch with more than `limit` positions."""

    limit: int
    inv_freq: tuple[float, ...]


class Rope(NamedTuple):
    """Frequencies (radians a position) of one half head, and the factor on cos and sin."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0
    beyond: Ntk | Long | None = None


def from_hf(config: Mapping[str, Any], head_dim: int, default_theta: float = 10000.0) -> Rope:
    """Return the rotation of a config.json of transformers 4 or 5.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. If a
    file has both, `rope_scaling` is used. A theta inside this dict has priority over a theta
    outside, as in transformers 5.
    Raises: UserError for a rope type that is not supported or that lacks a key.
    Source of the formulas: transformers' modeling_rope_utils.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, dict):
        raise UserError(f"config.json: rope_scaling={given!r} is no object of rope parameters")
    rope = {"rope_theta": config.get("rope_theta", default_theta), **given}
    kind = rope.get("rope_type", rope.get("type", "default"))
    shown = {key: value for key, value in rope.items() if not isinstance(value, list)}
    if kind not in SUPPORTED or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"config.json: rope type {kind!r} in {shown} is not supported; supported are"
            f" {', '.join(SUPPORTED)} with one setting for all layers"
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"config.json: partial_rotary_factor={partial} is not supported, only 1.0")
    longest = config.get("max_position_embeddings")
    if kind in ("llama3", "yarn", "longrope") and config.get(ORIGINAL, 0) is None:
        raise UserError(
            f"config.json: {ORIGINAL}=null beside rope type {kind!r}, which needs that number;"
            " remove the key, or give the number of positions of the pretraining"
        )
    original = config.get(ORIGINAL) or rope.get(ORIGINAL) or longest
    rope |= {key: n for key, n in ((ORIGINAL, original), ("longest", longest)) if n is not None}
    _check_numbers(kind, rope)
    try:
        return _scaled(kind, rope, head_dim)
    except KeyError as error:
        raise UserError(f"config.json: rope type {kind!r} needs the key {error}: {shown}") from None
    except ArithmeticError as error:
        raise UserError(f"config.json: rope type {kind!r}: {error} in {shown}") from None


def _check_numbers(kind: str, rope: Mapping[str, Any]) -> None:
    for key in (*ROPE_NUMBERS, *ROPE_OPTIONAL):
        value = rope.get(key, 1.0)
        free = key in ROPE_OPTIONAL or (key == "factor" and kind in FROM_LENGTHS)
        if value is None and free:
            continue
        number = value if isinstance(value, int | float) and value is not True else 0
        if not 0 < number < math.inf:
            raise UserError(
                f"config.json: rope parameter {key}={json.dumps(value)}; expected a number above 0"
            )


def frequencies(
    rope: Rope, positions: Int[Array, "B T"], longest: int = 0
) -> Float[Array, " half"]:
    """Return the frequencies of a batch. For some kinds they depend on its largest position.

    The positions of padding count too, as in transformers. longest: the positions that its rows
    will have at their end, for `longrope`, whose keys in a cache would otherwise be rotated by
    others.
    """
    inv_freq = jnp.array(rope.inv_freq)
    if rope.beyond is None:
        return inv_freq
    length = jnp.max(positions) + 1
    if isinstance(rope.beyond, Long):
        length = jnp.maximum(length, longest) if longest else length
        return jnp.where(length > rope.beyond.limit, jnp.array(rope.beyond.inv_freq), inv_freq)
    # transformers multiplies the base by ratio^(d / (d - 2)), so frequency i is multiplied by
    # ratio^(-2i / (d - 2)).
    limit, factor = rope.beyond
    ratio = jnp.maximum(factor * length / limit - (factor - 1), 1.0)
    i = jnp.arange(len(rope.inv_freq), dtype=jnp.float32)
    return inv_freq * ratio ** (-i / max(len(rope.inv_freq) - 1, 1))


def cos_sin(
    positions: Int[Array, "B T"], inv_freq: Float[Array, " half"], scale: float = 1.0
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """Return cos and sin of the angles at each position, times `scale`, in fp32."""
    inv_freq = jnp.asarray(inv_freq, jnp.float32)
    angles = positions[..., None].astype(jnp.float32) * inv_freq  # [B, T, half]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate dims (i, i + half) of each head together, in fp32. Dims from 2 half on stay.

    Hugging Face files pair dims in this way. Meta's files pair (2i, 2i + 1).
    Source: Su et al. 2021, arXiv:2104.09864.
    """
    width = 2 * cos.shape[-1]
    if width < x.shape[-1]:
        turned = rotate(x[..., :width], cos, sin)
        return jnp.concatenate([turned, x[..., width:]], axis=-1)  # [B, T, N, H]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, N, half]
    cos, sin = cos[..., None, :], sin[..., None, :]  # [B, T, 1, half]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)  # [B, T, N, H]


def rotate_neighbours(
    x: Float[Array, "B T N H"], cos: Float[Array, "*B T half"], sin: Float[Array, "*B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate dims (2i, 2i + 1) of each head together, in fp32, as FLUX and Meta's files do.

    cos, sin: those of each place, for all rows or for each row.
    """
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)  # [B, T, N, half, 2]
    first, second = pairs[..., 0], pairs[..., 1]  # [B, T, N, half]
    cos, sin = cos[..., None, :], sin[..., None, :]  # [T, 1, half] or [B, T, 1, half]
    turned = jnp.stack([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)  # [B, T, N, H]


def grid_cos_sin(
    places: Int[np.ndarray, "T A"], dims: Sequence[int], theta: float
) -> tuple[Float[np.ndarray, "T half"], Float[np.ndarray, "T half"]]:
    """Return cos and sin of the angles at places on A axes, computed in fp64 and rounded once.

    dims: the dims of a head that rotate by each axis, together those of the head.
    """
    frequencies = [theta ** (-np.arange(0, dim, 2) / dim) for dim in dims]
    angles = [np.outer(column, one) for column, one in zip(places.T, frequencies, strict=True)]
    whole = np.concatenate(angles, axis=1)  # [T, half]
    return np.cos(whole).astype(np.float32), np.sin(whole).astype(np.float32)


def _scaled(kind: str, rope: Mapping[str, Any], head_dim: int) -> Rope:
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)  # [half]
    # theta^(2i/H). The power in fp64, rounded once, is closest to torch's fp32 power.
    periods = np.power(float(rope["rope_theta"]), exponents.astype(np.float64)).astype(np.float32)
    inv_freq, scale, beyond = np.float32(1) / periods, 1.0, None
    if kind == "dynamic":
        beyond = Ntk(rope["longest"], rope["factor"])
    elif kind == "longrope":
        inv_freq, beyond, scale = _longrope(periods, rope)
    elif kind == "linear":
        inv_freq = inv_freq / np.float32(rope["factor"])
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif kind == "yarn":
        inv_freq, scale = _yarn(periods, rope, head_dim)
    return Rope(_floats(inv_freq), float(scale), beyond)


def _floats(inv_freq: np.ndarray) -> tuple[float, ...]:
    return tuple(float(f) for f in inv_freq.astype(np.float32))


def _llama3(inv_freq: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Return Llama 3.1's frequencies: those of long waves divided by `factor`, short waves kept.

    Frequencies between them are a linear blend of the two.
    """
    factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * np.float32(math.pi) / inv_freq
    blend = (rope[ORIGINAL] / wavelength - low) / (high - low)
    medium = (1 - blend) * inv_freq / factor + blend * inv_freq
    long, short = wavelength > rope[ORIGINAL] / low, wavelength < rope[ORIGINAL] / high
    return np.where(long, inv_freq / factor, np.where(short, inv_freq, medium))


def _yarn(periods: np.ndarray, rope: Mapping[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """Return NTK-by-parts frequencies and attention factor of YaRN (Peng et al., 2309.00071)."""
    original, factor = rope[ORIGINAL], rope["factor"] or rope["longest"] / rope[ORIGINAL]

    def boundary(rotations: float) -> float:
        # The index of the frequency that makes so many rotations over the original length.
        turns = original / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope["rope_theta"]))

    low, high = boundary(rope.get("beta_fast") or 32), boundary(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    # 0 for fast rotations, which are kept, to 1 for slow ones, which are divided by the factor.
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)  # [half]
    inv_freq = ramp / (factor * periods) + (1 - ramp) / periods
    return inv_freq, _attention_factor(rope, factor)


def _longrope(periods: np.ndarray, rope: Mapping[str, Any]) -> tuple[np.ndarray, Long, float]:
    """Return short and long frequencies and the attention factor of LongRoPE.

    The file has two sets of divisors, with one for each frequency.
    Raises: UserError for divisors that are no list of the right length.
    Source: Ding et al. 2024, arXiv:2402.13753.
    """
    sets = []
    for key in ("short_factor", "long_factor"):
        factors = rope[key]
        if not isinstance(factors, list) or not all(type(x) in (int, float) for x in factors):
            raise UserError(f"config.json: rope parameter {key}={factors!r} is no list of numbers")
        if len(factors) != len(periods) or 0 in factors:
            raise UserError(
                f"config.json: rope parameter {key} has {len(factors)} numbers; expected"
                f" {len(periods)} other than 0, half of the head's width"
            )
        sets.append(np.float32(1) / (np.array(factors, np.float32) * periods))
    original, scale = rope[ORIGINAL], rope.get("attention_factor")
    factor = rope.get("factor") or rope["longest"] / original
    if scale is None:
        scale = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    return sets[0], Long(original, _floats(sets[1])), scale


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dims:
        return temperature(mscale) / temperature(all_dims)
    return temperature(1.0)
