"""A text model's checkpoint with a larger vocabulary than its files have."""

from typing import Any, NamedTuple

import numpy as np

from jaxft.weights.files.tensor_files import Tensors


class Grafted(NamedTuple):
    """The tensors of `base`, in which each of `tables` (V, D) has `rows` more rows.

    A new row is sampled from N(mean, std) of the table's rows, separately for each column, so that
    new embeddings have the size of the trained ones. The same seed gives the same rows at every
    read.
    """

    base: Tensors
    tables: tuple[str, ...]
    rows: int
    seed: int

    def keys(self) -> Any:
        return self.base.keys()

    def info(self, key: str) -> tuple[tuple[int, ...], Any]:
        shape, dtype = self.base.info(key)
        return ((shape[0] + self.rows, *shape[1:]) if key in self.tables else shape), dtype

    def read(self, key: str) -> np.ndarray:
        """Return one tensor, a table with its new rows [V + rows, D]."""
        table = self.base.read(key)
        if key not in self.tables:
            return table
        own = table.astype(np.float32)  # [V, D]
        random = np.random.default_rng((self.seed, self.tables.index(key)))
        drawn = random.standard_normal((self.rows, own.shape[1]), np.float32)
        added = own.mean(axis=0) + own.std(axis=0) * drawn
        return np.concatenate([table, added.astype(table.dtype)])
