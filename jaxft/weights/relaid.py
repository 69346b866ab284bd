"""A checkpoint under another library's names and layouts, where q, k and v may be one tensor."""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from jaxft.weights.rules import rearrange, rearranged_shape
from jaxft.weights.tensor_files import Info, Tensors
from jaxft.weights.transfer import Export


class Place(NamedTuple):
    """A tensor's key on the other side, the layout of the move, and which third it is there."""

    key: str
    layout: str = ""
    third: int | None = None


class Relaid:
    """The tensors of a checkpoint as `places` has them, by the keys that are asked for."""

    def __init__(self, tensors: Tensors, places: Mapping[str, Place]):
        self._tensors, self._places = tensors, dict(places)

    def keys(self) -> Sequence[str]:
        return list(self._places)

    def info(self, key: str) -> Info:
        place = self._places[key]
        shape, dtype = self._tensors.info(place.key)
        if place.third is not None:
            return (shape[0] // 3, *shape[1:]), dtype
        # A shape that does not fit its layout is shown as it is: the plan then names the tensor.
        fits = place.layout and len(shape) == len(place.layout.split("->")[0].split())
        return rearranged_shape(shape, place.layout, {}) if fits else shape, dtype

    def read(self, key: str) -> np.ndarray:
        place = self._places[key]
        array = self._tensors.read(place.key)
        if place.third is not None:
            return np.split(array, 3)[place.third].copy()
        return _moved(array, place.layout)


def relaid(made: Export, places: Mapping[str, Place]) -> Export:
    """An export as the other side has it; a tensor without a place there is left out."""
    infos: dict[str, Info] = {}
    for key, place in places.items():
        shape, dtype = made.infos[key]
        if place.third is None:
            infos[place.key] = (rearranged_shape(shape, place.layout, {}), dtype)
        else:
            infos[place.key] = ((3 * shape[0], *shape[1:]), dtype)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        waiting: dict[str, dict[int, np.ndarray]] = {}
        for key, array in made.tensors:
            if (place := places.get(key)) is None:
                continue
            if place.third is None:
                yield place.key, _moved(array, place.layout)
                continue
            thirds = waiting.setdefault(place.key, {})
            thirds[place.third] = array
            if len(thirds) == 3:
                yield place.key, np.concatenate([thirds[i] for i in range(3)])
                del waiting[place.key]

    return Export(infos, tensors())


def _moved(array: np.ndarray, layout: str) -> np.ndarray:
    return np.ascontiguousarray(rearrange(array, layout, {})) if layout else array
