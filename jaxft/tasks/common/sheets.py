"""Portions of rows for one compiled function, and sheets of sampled pictures."""

from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jaxtyping import Int, UInt8

from jaxft.tasks.common.pictures import grid

SHOWN = 8  # rows of a picture grid
CELL = 96  # least size of an image in it, in pixels


def portions(arrays: Any, count: int, size: int) -> Iterator[tuple[Int[np.ndarray, " size"], Any]]:
    """Yield (places, `size` rows of every array) until all `count` rows are covered.

    The last portion repeats its rows.
    """
    for first in range(0, count, size):

        def rows(x: np.ndarray, first: int = first) -> np.ndarray:
            return np.resize(x[first : first + size], (size, *x.shape[1:]))

        yield np.arange(first, first + size), jax.tree.map(rows, arrays)


class Compared:
    """Sheets of the same pictures at every evaluation, beside those of the first evaluation."""

    def __init__(self) -> None:
        self._before: np.ndarray | None = None

    def sheet(
        self,
        captions: list[str],
        columns: Mapping[str, UInt8[np.ndarray, "B Y X 3"] | None],
        made: UInt8[np.ndarray, "B Y X 3"],
    ) -> UInt8[np.ndarray, "H W 3"]:
        """Return SHOWN rows: caption, the columns that are not None, before, now."""
        if self._before is None:
            self._before = made
        every = {**columns, "before": self._before, "now": made}
        kept = {name: pictures for name, pictures in every.items() if pictures is not None}
        shown = np.linspace(0, len(made) - 1, min(SHOWN, len(made))).astype(int)
        rows = [[pictures[i] for pictures in kept.values()] for i in shown]
        return grid(rows, [captions[i] for i in shown], list(kept), CELL)
