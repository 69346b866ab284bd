"""Autoregressive decoding with a KV cache, one compiled loop for a whole batch."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.generation.cache import init_cache
from jaxft.models.decoders.generation.sampling import Sampling, pick


class _Loop(NamedTuple):
    """State of the loop: tokens made, their count, finished rows, the cache, the last logits."""

    made: Int[Array, "B M"]
    count: Int[Array, ""]
    done: Bool[Array, " B"]
    cache: Any
    logits: Float[Array, "B V"]


def generate(
    model: Decoder,
    tokens: Int[Array, "B T"],
    segment_ids: Int[Array, "B T"],
    keys: PRNGKeyArray,
    *,
    max_new: int,
    stop_ids: tuple[int, ...],
    how: Sampling,
    dtype: Any,
) -> tuple[Int[Array, "B M"], Int[Array, " B"]]:
    """Continue left-padded prompts (segment 0 on the padding) by up to `max_new` tokens.

    keys: one PRNG key a row.
    Returns: (tokens [B, max_new], lengths [B]). A row stops at the first of `stop_ids`, which its
    length counts. Past its length a row repeats that id.
    """
    rows, prompt = tokens.shape
    positions = jnp.maximum(jnp.cumsum(segment_ids, axis=1) - 1, 0)  # [B, T], 0 on the padding
    blocks = model.unstacked()
    longest = prompt + max_new if model.cfg.rope_by_end else 0
    step = partial(model.hidden, blocks=blocks, dtype=dtype, longest=longest)
    cache = init_cache(model.cfg, rows, prompt + max_new, dtype, bool(blocks))
    hidden, cache = step(tokens, positions, segment_ids, cache=cache)
    stops = jnp.asarray(stop_ids or (-1,), jnp.int32)  # -1 is the id of no token
    start = _Loop(
        jnp.zeros((rows, max_new), jnp.int32),
        jnp.zeros((), jnp.int32),
        jnp.zeros((rows,), bool),
        cache,
        model.logits(hidden[:, -1:])[:, 0],  # [B, V]
    )
    ones = jnp.ones((rows, 1), jnp.int32)

    def body(loop: _Loop) -> _Loop:
        # Keys by row and by number of the token: a row's tokens do not depend on its batch.
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, loop.count)
        last = loop.made[:, jnp.maximum(loop.count - 1, 0)]  # [B]
        token = jnp.where(loop.done, last, pick(loop.logits, now, how)).astype(jnp.int32)
        made = loop.made.at[:, loop.count].set(token)
        done = loop.done | jnp.isin(token, stops)
        place = positions[:, -1:] + 1 + loop.count  # [B, 1]
        hidden, cache = step(token[:, None], place, ones, cache=loop.cache)
        return _Loop(made, loop.count + 1, done, cache, model.logits(hidden[:, -1:])[:, 0])

    def going(loop: _Loop) -> Bool[Array, ""]:
        return (loop.count < max_new) & ~jnp.all(loop.done)

    end = jax.lax.while_loop(going, body, start)
    stopped = jnp.isin(end.made, stops) & (jnp.arange(max_new) < end.count)
    lengths = jnp.where(stopped.any(1), jnp.argmax(stopped, 1) + 1, end.count)
    return end.made, lengths
