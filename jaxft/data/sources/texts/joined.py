"""Several sets of text records as one, in order."""

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.data.sources.texts import TextRecords


class JoinedRecords:
    """Records of several sets, one set after another."""

    def __init__(self, spec: str, parts: Sequence[TextRecords]):
        self._spec, self._parts = spec, parts
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> dict[str, Any]:
        part, row = locate(self._ends, index)
        return self._parts[part][row]

    def __repr__(self) -> str:
        if len(self._parts) == 1:
            return repr(self._parts[0])
        return f"JoinedRecords({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        part, row = locate(self._ends, index)
        return self._parts[part].where(row)

    def counts(self, ids: Int[np.ndarray, " n"]) -> list[int]:
        """Return how many of the ascending `ids` of records lie in each part."""
        return np.diff(np.searchsorted(ids, [0, *self._ends])).tolist()


def locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Return (part, place in it) of an index into parts that end at `ends`."""
    part = bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)
