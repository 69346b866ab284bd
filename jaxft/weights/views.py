"""Views of a checkpoint: tensors renamed, rearranged, replaced, computed or extended when read."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxft.weights.files.tensor_files import Info, Tensors
from jaxft.weights.rules import rearrange, rearranged_shape
from jaxft.weights.transfer import Export

ATTENTION = r".*\.(query|key|value|proj_attn|to_q|to_k|to_v|to_out\.0)\.weight"
FLOAT8 = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))


class Renamed:
    """A checkpoint's tensors under other keys."""

    def __init__(self, tensors: Tensors, old: Mapping[str, str]):
        self._tensors, self._old = tensors, dict(old)

    def keys(self) -> Sequence[str]:
        return list(self._old)

    def info(self, key: str) -> Info:
        return self._tensors.info(self._old[key])

    def read(self, key: str) -> np.ndarray:
        return self._tensors.read(self._old[key])


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


class InMemory(NamedTuple):
    """Tensors that are computed already."""

    arrays: Mapping[str, np.ndarray]

    def keys(self) -> Sequence[str]:
        return list(self.arrays)

    def info(self, key: str) -> Info:
        return self.arrays[key].shape, self.arrays[key].dtype

    def read(self, key: str) -> np.ndarray:
        return self.arrays[key]


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


class MoreInputs(NamedTuple):
    """The tensors of `base`, in which the kernel `key` has `channels` more inputs, all zero."""

    base: Tensors
    key: str
    channels: int

    def keys(self) -> Sequence[str]:
        return self.base.keys()

    def info(self, key: str) -> Info:
        shape, dtype = self.base.info(key)
        if key == self.key:
            shape = (shape[0], shape[1] + self.channels, *shape[2:])
        return shape, dtype

    def read(self, key: str) -> np.ndarray:
        """Return one tensor, the kernel as [out, in + channels, ...]."""
        tensor = self.base.read(key)
        if key != self.key:
            return tensor
        zeros = np.zeros((len(tensor), self.channels, *tensor.shape[2:]), tensor.dtype)
        return np.concatenate([tensor, zeros], axis=1)


class Drawn(NamedTuple):
    """One new fp32 tensor from N(0, std). The same seed gives the same values at every read."""

    key: str
    shape: tuple[int, ...]
    std: float
    seed: int

    def keys(self) -> Sequence[str]:
        return [self.key]

    def info(self, key: str) -> tuple[tuple[int, ...], Any]:
        return self.shape, np.dtype(np.float32)

    def read(self, key: str) -> np.ndarray:
        drawn = np.random.default_rng(self.seed).standard_normal(self.shape, np.float32)
        return np.float32(self.std) * drawn


class RowSpan(NamedTuple):
    """The rows of one tensor in a fused tensor: the parts start ... stop of `of` equal parts."""

    start: int
    stop: int
    of: int


THIRDS = tuple(RowSpan(i, i + 1, 3) for i in range(3))  # of q, k and v in a fused tensor


class Place(NamedTuple):
    """A tensor's key on the other side, its layout, and its rows in a fused tensor.

    `layout` is an arrow as in `rules`, "" for none. `rows` is None for a tensor that is not fused.
    The two halves of a `swapped` tensor are in the other order there.
    """

    key: str
    layout: str = ""
    rows: RowSpan | None = None
    swapped: bool = False


class Relaid:
    """The tensors of a checkpoint under the keys of `places`, in their layouts."""

    def __init__(self, tensors: Tensors, places: Mapping[str, Place]):
        self._tensors, self._places = tensors, dict(places)

    def keys(self) -> Sequence[str]:
        return list(self._places)

    def info(self, key: str) -> Info:
        place = self._places[key]
        shape, dtype = self._tensors.info(place.key)
        if rows := place.rows:
            return (shape[0] // rows.of * (rows.stop - rows.start), *shape[1:]), dtype
        # A shape that does not fit its layout is returned unchanged: `rules.plan` reports it.
        fits = place.layout and len(shape) == len(place.layout.split("->")[0].split())
        return rearranged_shape(shape, place.layout, {}) if fits else shape, dtype

    def read(self, key: str) -> np.ndarray:
        place = self._places[key]
        array = self._tensors.read(place.key)
        if rows := place.rows:
            part = len(array) // rows.of
            return array[rows.start * part : rows.stop * part].copy()
        return _moved(array, place)


class Slab(NamedTuple):
    """One matrix in a fused tensor [E, of * N, K]: expert `expert`, part `part` of `of` parts."""

    key: str
    expert: int
    part: int
    of: int


class Unfused:
    """A checkpoint whose fused experts are read one by one, under the keys of `slabs`.

    All other tensors are read as they are, under the keys of `others`. The last fused tensor is
    kept, because its experts are read one after the other.
    """

    def __init__(self, tensors: Tensors, slabs: Mapping[str, Slab], others: Mapping[str, str]):
        self._tensors, self._slabs, self._others = tensors, dict(slabs), dict(others)
        self._last: tuple[str, np.ndarray] | None = None

    def keys(self) -> Sequence[str]:
        return [*self._others, *self._slabs]

    def info(self, key: str) -> Info:
        if key in self._others:
            return self._tensors.info(self._others[key])
        slab = self._slabs[key]
        (_, rows, width), dtype = self._tensors.info(slab.key)
        return (rows // slab.of, width), dtype

    def read(self, key: str) -> np.ndarray:
        if key in self._others:
            return self._tensors.read(self._others[key])
        slab = self._slabs[key]
        if self._last is None or self._last[0] != slab.key:
            self._last = slab.key, self._tensors.read(slab.key)
        rows = self._last[1].shape[1] // slab.of
        return self._last[1][slab.expert, slab.part * rows : (slab.part + 1) * rows].copy()


def as_matrices(tensors: Tensors) -> Tensors:
    """Return the checkpoint with matrices where its attention is stored as 1x1 convolutions.

    Tools that convert LDM checkpoints keep the convolutions, but diffusers reads only matrices.
    """
    names = tensors.keys()
    places = {key: Place(key, matrix_layout(tensors, key)) for key in names}
    return Relaid(tensors, places) if any(place.layout for place in places.values()) else tensors


def matrix_layout(tensors: Tensors, key: str) -> str:
    """Return the layout from the 1x1 convolution of a VAE's attention to its matrix, or ""."""
    shape, _ = tensors.info(key)
    if len(shape) < 3 or set(shape[2:]) != {1} or not re.fullmatch(ATTENTION, key):
        return ""
    return "o i 1 1 -> o i" if len(shape) == 4 else "o i 1 -> o i"


class Widened:
    """A checkpoint whose float8 tensors are read as float16, which represents all their values.

    An export keeps the dtype of the source, and float8 is too coarse for trained weights.
    """

    def __init__(self, tensors: Tensors):
        self._tensors = tensors

    def keys(self) -> Sequence[str]:
        return self._tensors.keys()

    def info(self, key: str) -> Info:
        shape, dtype = self._tensors.info(key)
        return shape, np.dtype(np.float16) if dtype in FLOAT8 else dtype

    def read(self, key: str) -> np.ndarray:
        array = self._tensors.read(key)
        return array.astype(np.float16) if array.dtype in FLOAT8 else array


def widened(tensors: Tensors) -> Tensors:
    """Return the checkpoint as Widened if it has a float8 tensor, else unchanged."""
    narrow = any(tensors.info(key)[1] in FLOAT8 for key in tensors.keys())  # noqa: SIM118
    return Widened(tensors) if narrow else tensors


def relaid(made: Export, places: Mapping[str, Place]) -> Export:
    """Return an export under the keys and layouts of `places`, by the export's own keys.

    A tensor without a place is left out. Tensors that share a key (as q, k and v) become one.
    """
    infos: dict[str, Info] = {}
    for key, place in places.items():
        shape, dtype = made.infos[key]
        if rows := place.rows:
            whole = shape[0] // (rows.stop - rows.start) * rows.of
            infos[place.key] = ((whole, *shape[1:]), dtype)
        else:
            infos[place.key] = (rearranged_shape(shape, place.layout, {}), dtype)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        waiting: dict[str, dict[RowSpan, np.ndarray]] = {}
        for key, array in made.tensors:
            if (place := places.get(key)) is None:
                continue
            if not (rows := place.rows):
                yield place.key, _moved(array, place)
                continue
            pieces = waiting.setdefault(place.key, {})
            pieces[rows] = array
            if sum(one.stop - one.start for one in pieces) == rows.of:
                yield place.key, np.concatenate([pieces[one] for one in sorted(pieces)])
                del waiting[place.key]

    return Export(infos, tensors())


def _moved(array: np.ndarray, place: Place) -> np.ndarray:
    if place.swapped:
        return np.roll(array, len(array) // 2, axis=0)
    return np.ascontiguousarray(rearrange(array, place.layout, {})) if place.layout else array
