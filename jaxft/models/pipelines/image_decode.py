"""Guided sampling of a fixed number of image codes, in one compiled loop with a KV cache."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxft.kernels.cross_entropy import linear_cross_entropy
from jaxft.kernels.elementwise import soft_capped
from jaxft.kernels.loops import cache_growth
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.generation.cache import Cache, init_cache, lengthened
from jaxft.models.decoders.generation.sampling import Sampling, pick
from jaxft.nn.linear import gather_rows


class CodeModel(Protocol):
    """A model that continues text with codes: their embeddings, loss and logits.

    In rows of tokens and in targets a code has its id in the model: counted from 0 in Janus, and
    from `offset` in `Unified`.
    """

    @property
    def decoder(self) -> Decoder:
        """The decoder of all tokens."""
        ...

    def embed(
        self,
        tokens: Int[Array, "B T"],
        images: Bool[Array, "B T"],
        dtype: Any,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the embeddings of tokens. `images` is True where a token is a code.

        keys: one a row, for the dropout of adapters, here and in `cross_entropy`.
        """
        ...

    def embed_codes(self, codes: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
        """Return the embeddings of codes, counted from 0."""
        ...

    def cross_entropy(
        self,
        hidden: Float[Array, "B S D"],
        targets: Int[Array, "B S"],
        weights: Float[Array, "B S"],
        z_loss: float,
        keys: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return `linear_cross_entropy` with the model's head."""
        ...

    def scorer(self) -> Callable[[Float[Array, "B D"]], Float[Array, "B K"]]:
        """Return a function from hidden states to fp32 logits of the next code.

        The logits of all other tokens are left out.
        """
        ...


class Unified(NamedTuple):
    """A language model whose vocabulary holds the codes, as ids from `offset` on."""

    decoder: Decoder
    offset: int
    codes: int

    def embed(
        self,
        tokens: Int[Array, "B T"],
        images: Bool[Array, "B T"],
        dtype: Any,
        keys: PRNGKeyArray | None = None,
    ) -> Float[Array, "B T D"]:
        del images, keys  # a code is a token like any other, and a table has no adapter
        return self.decoder.scaled_embeddings(self.decoder.embed_tokens(tokens, dtype))

    def embed_codes(self, codes: Int[Array, "..."], dtype: Any) -> Float[Array, "... D"]:
        # XLA:CPU splits the lookup in a large table over threads, which costs 40 us.
        table = self.decoder.embed_tokens.embedding[...]
        part = jax.lax.slice_in_dim(table, self.offset, self.offset + self.codes)
        return self.decoder.scaled_embeddings(gather_rows(part.astype(dtype), codes))

    def cross_entropy(
        self,
        hidden: Float[Array, "B S D"],
        targets: Int[Array, "B S"],
        weights: Float[Array, "B S"],
        z_loss: float,
        keys: PRNGKeyArray | None = None,
    ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """Return the loss over the whole vocabulary, as in the exported model."""
        head, first, soft_cap = self.decoder.head()
        measure = partial(linear_cross_entropy, vocab_first=first, z_loss=z_loss, soft_cap=soft_cap)
        return measure(self.decoder.features(hidden, keys), head, targets, weights)

    def scorer(self) -> Callable[[Float[Array, "B D"]], Float[Array, "B K"]]:
        """Return a function from hidden states to the logits of codes alone."""
        matrix, vocab_first, soft_cap = self.decoder.head()
        axis = 0 if vocab_first else 1
        part = jax.lax.slice_in_dim(matrix, self.offset, self.offset + self.codes, axis=axis)
        kernel = part.T if vocab_first else part  # [D, K] or [D + r, K]

        def logits(hidden: Float[Array, "B D"]) -> Float[Array, "B K"]:
            return soft_capped(score(self.decoder.features(hidden), kernel), soft_cap)[0]

        return logits


def score(
    hidden: Float[Array, "B D"],
    kernel: Float[Array, "D K"],
    bias: Float[Array, "K"] | float = 0.0,
) -> Float[Array, "B K"]:
    """Return fp32 logits. The inputs of the product are in hidden's dtype, its sums in fp32."""
    kernel = kernel.astype(hidden.dtype)
    logits = jnp.einsum("bd,dk->bk", hidden, kernel, preferred_element_type=jnp.float32)  # [B, K]
    return logits + bias


def generate_codes(
    code_model: CodeModel,
    tokens: Int[Array, "R T"],
    mask: Int[Array, "R T"],
    keys: PRNGKeyArray,
    *,
    count: int,
    guidance: Float[Array, ""] | float,
    how: Sampling,
    dtype: Any,
) -> Int[Array, "B S"]:
    """Sample `count` codes a row after prompts that end with BOI.

    tokens, mask: left-padded prompts, mask 0 on the padding, with R = 2 B rows. The first B rows
    have captions, and the last B are the same prompts without. keys: one PRNG key for each of the B
    rows. guidance: 1 for none. Logits are u + guidance * (c - u) in fp32, before temperature, top-k
    and top-p.

    Returns: codes [B, count].
    Source of the guidance: Ho & Salimans 2022, arXiv:2207.12598.
    """
    decoder, scores = code_model.decoder, code_model.scorer()
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)  # [R, T], 0 on the padding
    blocks, ends = decoder.unstacked(), cache_growth(count)
    step = partial(decoder.hidden, blocks=blocks, dtype=dtype)
    cache = init_cache(decoder.cfg, len(tokens), tokens.shape[1], dtype, bool(blocks))
    prompts = code_model.embed(tokens, jnp.zeros(tokens.shape, bool), dtype)
    hidden, cache = step(None, positions, mask, embeds=prompts, cache=cache)
    ones = jnp.ones((len(tokens), 1), jnp.int32)

    def choose(hidden: Array, number: Array | int) -> Array:
        """Return the next code of the B rows, from the last hidden state of all 2 B."""
        with_caption, without = jnp.split(scores(hidden[:, -1]), 2)  # [B, K] each
        mixed = without + guidance * (with_caption - without)
        # Keys by row and by number of the code: a row's codes do not depend on its batch.
        now = jax.vmap(jax.random.fold_in, (0, None))(keys, number)
        return pick(mixed, now, how).astype(jnp.int32)

    def body(carry: tuple[Cache, Array], number: Array) -> tuple[tuple[Cache, Array], Array]:
        cache, code = carry
        # Rows with and without caption continue with the same codes.
        embeds = code_model.embed_codes(jnp.tile(code, 2)[:, None], dtype)  # [R, 1, D]
        place = positions[:, -1:] + number
        hidden, cache = step(None, place, ones, embeds=embeds, cache=cache)
        assert cache is not None
        code = choose(hidden, number)
        return (cache, code), code

    assert cache is not None
    code = choose(hidden, 0)
    codes = [code[None]]
    for start, end in pairwise([1, *ends]):
        cache = lengthened(cache, tokens.shape[1] + end - 1)
        (cache, code), made = jax.lax.scan(body, (cache, code), jnp.arange(start, end))
        codes.append(made)  # [end - start, B]
    return jnp.concatenate(codes).T  # [B, count]
