"""Masks of attention: the keys that each query attends to."""

from typing import NamedTuple

from jax import Array
from jaxtyping import Bool, Int


class Coordinates(NamedTuple):
    """Position and segment of each token, from which a mask is computed.

    Both are int32 [B or 1, T], or broadcast against scores. `segments` is None if all tokens are
    one segment.
    """

    positions: Int[Array, "*b T"]
    segments: Int[Array, "*b T"] | None


def attention_mask(
    queries: Coordinates,
    keys: Coordinates,
    *,
    causal: bool,
    window: int | Int[Array, ""] | None = None,
) -> Bool[Array, "*b T S"] | None:
    """Return True for each key that a query attends to, or None if that is every key.

    The coordinates broadcast against each other: [.., T, 1] of queries and [.., 1, S] of keys. A
    query attends to keys of its own segment. If `causal`, keys after its own position are left out.
    `window` is the number of keys up to the query's own position. It needs `causal`.
    """
    mask = None
    if causal:
        distance = queries.positions - keys.positions  # [.., T, S]
        mask = distance >= 0
        if window is not None:
            mask &= distance < window
    if queries.segments is not None and keys.segments is not None:
        same = queries.segments == keys.segments  # [.., T, S]
        mask = same if mask is None else mask & same
    return mask
