"""Rotary position embeddings: frequencies from a Hugging Face config, and the rotation."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxft.core.errors import UserError

SUPPORTED = ("default", "linear", "llama3", "yarn")


class Rope(NamedTuple):
    """Frequencies (radians a position) of one half head, and the factor on cos and sin."""

    inv_freq: tuple[float, ...]
    scale: float = 1.0


def from_hf(config: Mapping[str, Any], head_dim: int, default_theta: float = 10000.0) -> Rope:
    """The rotation a config.json asks for, in the dialect of transformers 4 or of 5.

    transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`. Where a
    file holds both, `rope_scaling` describes the scaling and the theta inside the chosen dict wins
    over the one outside, as transformers 5 reads it. Formulas: transformers modeling_rope_utils.
    Raises UserError for a rope type that is not supported or that lacks a key.
    """
    rope = {"rope_theta": config.get("rope_theta") or default_theta}
    rope |= config.get("rope_scaling") or config.get("rope_parameters") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in SUPPORTED or any(isinstance(value, dict) for value in rope.values()):
        raise UserError(
            f"config.json: rope type {kind!r} in {rope} is not supported; supported are"
            f" {', '.join(SUPPORTED)} with one setting for all layers"
        )
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise UserError(f"config.json: partial_rotary_factor={partial} is not supported, only 1.0")
    longest = config.get("max_position_embeddings")
    original = config.get("original_max_position_embeddings")
    rope["original"] = original or rope.get("original_max_position_embeddings") or longest
    rope["longest"] = longest
    try:
        return _scaled(kind, rope, head_dim)
    except KeyError as error:
        raise UserError(f"config.json: rope type {kind!r} needs the key {error}: {rope}") from None


def cos_sin(
    positions: Int[Array, "B T"], inv_freq: Float[Array, " half"], scale: float = 1.0
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of every position's angles, fp32 whatever the activations are."""
    angles = positions[..., None].astype(jnp.float32) * jnp.asarray(inv_freq, jnp.float32)
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(
    x: Float[Array, "B T N H"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N H"]:
    """Rotate dims (i, i + H/2) of each head together, in fp32 (Su et al. 2021, arXiv:2104.09864).

    This half-split pairing is that of Hugging Face files; Meta's files pair (2i, 2i + 1).
    """
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[..., None, :], sin[..., None, :]
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)


def _scaled(kind: str, rope: Mapping[str, Any], head_dim: int) -> Rope:
    periods = _periods(rope["rope_theta"], head_dim)
    inv_freq, scale = np.float32(1) / periods, 1.0
    if kind == "linear":
        inv_freq = inv_freq / np.float32(rope["factor"])
    elif kind == "llama3":
        inv_freq = _llama3(inv_freq, rope)
    elif kind == "yarn":
        inv_freq, scale = _yarn(periods, rope, head_dim)
    return Rope(tuple(float(f) for f in inv_freq.astype(np.float32)), float(scale))


def _periods(theta: float, head_dim: int) -> np.ndarray:
    """theta^(2i/H): the power in fp64, rounded once, is nearest to torch's fp32 one."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    return np.power(float(theta), exponents.astype(np.float64)).astype(np.float32)


def _llama3(inv_freq: np.ndarray, rope: Mapping[str, Any]) -> np.ndarray:
    """Llama 3.1: long waves slowed by `factor`, short ones kept, a linear blend between."""
    factor, low, high = (rope[k] for k in ("factor", "low_freq_factor", "high_freq_factor"))
    wavelength = 2 * np.float32(math.pi) / inv_freq
    blend = (rope["original"] / wavelength - low) / (high - low)
    medium = (1 - blend) * inv_freq / factor + blend * inv_freq
    long, short = wavelength > rope["original"] / low, wavelength < rope["original"] / high
    return np.where(long, inv_freq / factor, np.where(short, inv_freq, medium))


def _yarn(periods: np.ndarray, rope: Mapping[str, Any], dim: int) -> tuple[np.ndarray, float]:
    """YaRN (Peng et al. 2023, arXiv:2309.00071): NTK-by-parts and the attention factor."""
    original, factor = rope["original"], rope["factor"] or rope["longest"] / rope["original"]

    def boundary(rotations: float) -> float:
        turns = original / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(rope["rope_theta"]))

    low, high = boundary(rope.get("beta_fast") or 32), boundary(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = (high - low) or 0.001
    ramp = np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    inv_freq = ramp / (factor * periods) + (1 - ramp) / periods
    return inv_freq, _attention_factor(rope, factor)


def _attention_factor(rope: Mapping[str, Any], factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return rope["attention_factor"]

    def temperature(mscale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0

    mscale, all_dims = rope.get("mscale"), rope.get("mscale_all_dim")
    if mscale and all_dims:
        return temperature(mscale) / temperature(all_dims)
    return temperature(1.0)
