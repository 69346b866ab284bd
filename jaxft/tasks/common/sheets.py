"""Portions of rows for one compiled function, and the choice of sampled pictures to show."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from jaxft.tasks import Sheet

SHOWN = 8  # rows of a sheet


def portions(arrays: Any, count: int, size: int) -> Iterator[tuple[Int[np.ndarray, " size"], Any]]:
    """Yield (places, `size` rows of every array) until all `count` rows are covered.

    The last portion repeats its rows.
    """
    for first in range(0, count, size):

        def rows(x: np.ndarray, first: int = first) -> np.ndarray:
            return np.resize(x[first : first + size], (size, *x.shape[1:]))

        yield np.arange(first, first + size), jax.tree.map(rows, arrays)


def shown_sheet(
    captions: Sequence[str], columns: Mapping[str, UInt8[np.ndarray, "B Y X 3"] | None]
) -> Sheet:
    """Return SHOWN examples, equally far apart, with the columns that are not None."""
    kept = {name: pictures for name, pictures in columns.items() if pictures is not None}
    places = np.linspace(0, len(captions) - 1, min(SHOWN, len(captions)))
    shown = [int(place) for place in places]
    return Sheet(tuple(captions[i] for i in shown), {name: x[shown] for name, x in kept.items()})
