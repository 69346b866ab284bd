"""Activations by name, and the gated product of an MLP."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": lambda x: jax.nn.gelu(x, approximate=False),
    "gelu_tanh": jax.nn.gelu,
}


@partial(jax.checkpoint, static_argnums=2)
def gated(
    gate: Float[Array, "*b F"], up: Float[Array, "*b F"], activation: str
) -> Float[Array, "*b F"]:
    """Return act(gate) * up. The gradients recompute it instead of saving three more arrays."""
    return ACTIVATIONS[activation](gate) * up


class Clamp(NamedTuple):
    """Settings of `clamped`: the slope of its sigmoid, and the limit of gate and up."""

    slope: float
    limit: float


@partial(jax.checkpoint, static_argnums=2)
def clamped(
    gate: Float[Array, "*b F"], up: Float[Array, "*b F"], how: Clamp
) -> Float[Array, "*b F"]:
    """Return gate * sigmoid(slope gate) * (up + 1), gate and up within a limit.

    The gate has no lower limit. It is computed in fp32 and cast to gate's dtype. The gradients
    recompute it as those of `gated`.
    Source: GPT-OSS, arXiv:2508.10925, in transformers' GptOssExperts.
    """
    dtype, gate, up = gate.dtype, gate.astype(jnp.float32), up.astype(jnp.float32)
    gate, up = jnp.minimum(gate, how.limit), jnp.clip(up, -how.limit, how.limit)
    return (gate * jax.nn.sigmoid(how.slope * gate) * (up + 1)).astype(dtype)
