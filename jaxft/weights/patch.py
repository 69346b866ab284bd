"""Views of a checkpoint in which a few tensors are replaced, added or computed."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxft.weights.files.tensor_files import Tensors


class Overlaid(NamedTuple):
    """The tensors of `base`, replaced by those of `over` with the same keys. New keys come last."""

    base: Tensors
    over: Tensors

    def keys(self) -> list[str]:
        own = list(self.base.keys())
        return own + sorted(set(self.over.keys()) - set(own))

    def info(self, key: str) -> tuple[tuple[int, ...], Any]:
        return self._of(key).info(key)

    def read(self, key: str) -> np.ndarray:
        return self._of(key).read(key)

    def _of(self, key: str) -> Tensors:
        return self.over if key in set(self.over.keys()) else self.base


class Mapped(NamedTuple):
    """The tensors of `base`, some of them passed through a function: fp32, of the same shape."""

    base: Tensors
    functions: Mapping[str, Callable[[np.ndarray], np.ndarray]]

    def keys(self) -> list[str]:
        return list(self.base.keys())

    def info(self, key: str) -> tuple[tuple[int, ...], Any]:
        shape, dtype = self.base.info(key)
        return shape, np.dtype(np.float32) if key in self.functions else dtype

    def read(self, key: str) -> np.ndarray:
        tensor = self.base.read(key)
        if key not in self.functions:
            return tensor
        return self.functions[key](tensor.astype(np.float32))
