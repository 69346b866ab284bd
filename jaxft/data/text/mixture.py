"""Several tokenised sets as one, of which each gives a share of the drawn examples."""

from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from jaxtyping import Int

from jaxft.data.loader import source_shares
from jaxft.data.sources.texts import TextRecords
from jaxft.data.sources.texts.joined import JoinedRecords, locate
from jaxft.data.text.dataset import Example, TextDataset


class MixedText:
    """Examples of several sets, one set after another. Its attributes are those of TextDataset.

    shares: examples and share of each part, in their order, or () to mix by size. chat: the format
    of the parts that hold conversations.
    """

    def __init__(self, spec: str, parts: Sequence[TextDataset], shares: Sequence[float]):
        self._spec, self.parts = spec, tuple(parts)
        self.records: TextRecords = JoinedRecords(spec, [part.records for part in parts])
        firsts = np.cumsum([0, *(len(part.records) for part in parts[:-1])])
        self.record_ids: Int[np.ndarray, " n"] = np.concatenate(
            [part.record_ids + first for part, first in zip(parts, firsts, strict=True)]
        )
        self.n_bytes: Int[np.ndarray, " n"] = np.concatenate([part.n_bytes for part in parts])
        self.labels = tuple(sorted({label for part in parts for label in part.labels}))
        counts = sum((Counter(part.report) for part in parts), Counter())
        longest = max(part.report["longest_trained"] for part in parts)
        names = dict.fromkeys(name for part in parts for name in part.report)
        self.report = {name: counts[name] for name in names} | {"longest_trained": longest}
        self.chat = next((part.chat for part in parts if part.chat), None)
        sizes = [len(part) for part in parts]
        self.shares = source_shares(sizes, shares)
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, index: int) -> Example:
        part, row = locate(self._ends, index)
        return self.parts[part][row]

    def inputs(self, index: int) -> int:
        """Return the number of input positions of an example: its tokens without the last."""
        part, row = locate(self._ends, index)
        return self.parts[part].inputs(row)

    def __repr__(self) -> str:
        return f"MixedText({self._spec!r}, {len(self)} examples)"
