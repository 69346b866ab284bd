"""Guided sampling of a fixed number of image codes, one compiled loop with a KV cache."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.models.llama import Cache, Llama, init_cache
from jaxft.nn.sampling import Sampling, pick


def generate_codes(
    model: Llama,
    tokens: Int[Array, "R T"],
    mask: Int[Array, "R T"],
    keys: PRNGKeyArray,
    *,
    offset: int,
    codes: int,
    count: int,
    guidance: Float[Array, ""] | float,
    how: Sampling,
    dtype: Any,
) -> Int[Array, "B S"]:
    """`count` codes a row after left-padded prompts (mask 0 on the padding) that end with BOI.

    The first B rows have captions, the last B are the same without; code c has id offset + c, no
    other id is ever drawn. Logits are u + guidance * (c - u) in fp32 (Ho & Salimans 2022,
    arXiv:2207.12598, with 1 for no guidance), before temperature, top-k and top-p. `keys` holds
    one PRNG key for each of the B rows.
    """
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    cache = init_cache(model.cfg, len(tokens), tokens.shape[1] + count - 1, dtype)
    hidden, cache = model.hidden(tokens, positions, mask, cache=cache, dtype=dtype)
    head = _image_head(model, offset, codes)
    ones = jnp.ones((len(tokens), 1), jnp.int32)

    def choose(hidden: Array, number: Array | int) -> Array:
        """The next code of each of the B rows, from the last hidden state of all 2B."""
        x = hidden[:, -1]
        logits = jnp.einsum(
            "bd,dk->bk", x, head.astype(x.dtype), preferred_element_type=jnp.float32
        )
        with_caption, without = jnp.split(logits, 2)
        mixed = without + guidance * (with_caption - without)
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        return pick(mixed, now, how).astype(jnp.int32)

    def body(carry: tuple[Cache, Array], number: Array) -> tuple[tuple[Cache, Array], Array]:
        cache, code = carry
        token = jnp.tile(code + offset, 2)[:, None]
        place = positions[:, -1:] + number
        hidden, cache = model.hidden(token, place, ones, cache=cache, dtype=dtype)
        assert cache is not None
        code = choose(hidden, number)
        return (cache, code), code

    assert cache is not None
    first = choose(hidden, 0)
    _, rest = jax.lax.scan(body, (cache, first), jnp.arange(1, count))
    return jnp.concatenate([first[:, None], rest.T], axis=1)


def _image_head(model: Llama, offset: int, codes: int) -> Float[Array, "D K"]:
    """The columns of the output matrix that make codes: what suppressing all other ids leaves."""
    matrix, vocab_first = model.head()
    axis = 0 if vocab_first else 1
    part = jax.lax.slice_in_dim(matrix, offset, offset + codes, axis=axis)
    return part.T if vocab_first else part
