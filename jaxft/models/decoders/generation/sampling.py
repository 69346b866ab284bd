"""The next token from logits: greedy, temperature, top-k, top-p."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray


class Sampling(NamedTuple):
    """Settings of sampling. Temperature 0 is greedy. top_k 0 and top_p 1 filter nothing."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def pick(logits: Float[Array, "B V"], keys: PRNGKeyArray, how: Sampling) -> Int[Array, " B"]:
    """Return one token id a row from logits [B, V]. `keys` holds one PRNG key a row.

    The order is that of transformers' warpers. It is temperature, then top-k with all ties of the
    kth logit, then top-p with the first token past the mass (Holtzman et al. 2020,
    arXiv:1904.09751).
    """
    if how.temperature == 0:
        return jnp.argmax(logits, axis=-1)
    logits = logits.astype(jnp.float32) / how.temperature
    if how.top_k:
        kth = jax.lax.top_k(logits, min(how.top_k, logits.shape[-1]))[0][:, -1:]  # [B, 1]
        logits = jnp.where(logits < kth, -jnp.inf, logits)
    if how.top_p < 1:
        # The most likely tokens stay until their mass passes top_p. At least one stays.
        ordered = jnp.sort(logits, axis=-1)[:, ::-1]  # [B, V], descending
        before = jnp.cumsum(jax.nn.softmax(ordered), axis=-1) - jax.nn.softmax(ordered)
        kept = jnp.where(before < how.top_p, ordered, ordered[:, :1])
        logits = jnp.where(logits < jnp.min(kept, axis=-1, keepdims=True), -jnp.inf, logits)
    return jax.vmap(jax.random.categorical)(keys, logits)
