"""Lines and entries of the tables of GGUF: names of tensors, keys of metadata, architectures.

A line of a table has llama.cpp's name and that of transformers. Reading and writing use the same
lines, each in its own direction. The tables are in gguf_architectures.py.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from jaxft.weights.rules import Sizes, rearrange, rearranged_shape

# Keys of config.json with this start belong into its dict of a YaRN rope.
IN_ROPE = "rope_parameters."
NO_CONSTANTS: Mapping[str, Any] = {}


class TensorName(NamedTuple):
    """A tensor of llama.cpp, and that of transformers.

    `{i}` is the number of a layer. The matrices of all experts `{e}` are one tensor of llama.cpp,
    stacked on axis 0. layout: an arrow from transformers to llama.cpp, "" for none. Its `n` are the
    heads of q, its `k` those of k and v, and `u` is 2. part: one of the slabs on axis 0 of the
    array behind the arrow, each of which is a tensor of llama.cpp. shift: llama.cpp's values are
    higher by it.
    """

    name: str
    key: str
    layout: str = ""
    part: int | None = None
    shift: float = 0.0

    def stored(self, array: np.ndarray, sizes: Sizes) -> np.ndarray:
        """Return the tensor of llama.cpp from transformers' (of one expert where it has many)."""
        moved = rearrange(array, self.layout, sizes) if self.layout else array
        slab = moved if self.part is None else moved[self.part]
        return np.ascontiguousarray(slab + np.float32(self.shift) if self.shift else slab)

    def stored_shape(self, shape: tuple[int, ...], sizes: Sizes) -> tuple[int, ...]:
        """Return the shape of `stored`."""
        moved = rearranged_shape(shape, self.layout, sizes)
        return moved if self.part is None else moved[1:]


class MetadataKey(NamedTuple):
    """A key of the metadata behind the architecture's name, and that of config.json.

    default: the value of a file without the key, in which None is an error, or null with `null`.
    """

    name: str
    key: str
    kind: type = int
    default: int | float | None = None
    null: bool = False


class GgufArchitecture(NamedTuple):
    """One architecture of llama.cpp.

    model_types: those of config.json that are written so. Reading gives the first. constants: keys
    of config.json that a file does not have. marker: the key of the metadata that tells this entry
    from another of the same name. ropes: the scaled kinds. yarn: constants of a YaRN dict. period:
    the layers of a default pattern of windows, the last of which has full attention, and 0 for an
    architecture without windows. two_ropes: layers with a window have a rope of their own.
    partial: a part of each head may rotate. head: False for a head that is always tied, True for
    one that never is. wide_layers: the number of layers at which a Gemma scales its queries by the
    width of the model over its heads, and not by that of a head. square: all heads of q together
    are as wide as the model.
    """

    name: str
    class_name: str
    model_types: tuple[str, ...]
    tensors: tuple[TensorName, ...]
    keys: tuple[MetadataKey, ...]
    constants: Mapping[str, Any]
    marker: str = ""
    ropes: tuple[str, ...] = ("linear", "yarn")
    yarn: Mapping[str, Any] = NO_CONSTANTS
    period: int = 0
    two_ropes: bool = False
    partial: bool = False
    head: bool | None = None
    wide_layers: int = 0
    square: bool = False

    def lines(self, name: str) -> tuple[TensorName | None, str]:
        """Return the line of a tensor of llama.cpp, and the key of transformers, `{e}` unfilled."""
        template, numbers = _template(name)
        line = next((one for one in self.tensors if one.name == template), None)
        return line, line.key.replace("{i}", "".join(numbers)) if line else ""

    def placed(self, key: str) -> Iterator[tuple[str, TensorName, int | None]]:
        """Yield name, line and place in a stack of each of llama.cpp's tensors of a HF key."""
        template, numbers = _template(key)
        for line in self.tensors:
            if line.key == template:
                expert = int(numbers[1]) if "{e}" in template else None
                yield line.name.replace("{i}", "".join(numbers[:1])), line, expert


def stored_shapes(
    entry: GgufArchitecture, shapes: Mapping[str, tuple[int, ...]], sizes: Sizes
) -> dict[str, tuple[int, ...]]:
    """Return the shapes of llama.cpp's tensors, from those of transformers' by their keys."""
    made: dict[str, tuple[int, ...]] = {}
    for key, shape in shapes.items():
        for name, line, expert in entry.placed(key):
            one = line.stored_shape(shape, sizes)
            count = 0 if expert is None else max(made.get(name, (0,))[0], expert + 1)
            made[name] = (count, *one) if count else one
    return made


def stored_tensors(
    entry: GgufArchitecture,
    tensors: Iterable[tuple[str, np.ndarray]],
    shapes: Mapping[str, tuple[int, ...]],
    sizes: Sizes,
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield llama.cpp's tensors of transformers'. A stack of experts is held until it is full.

    shapes: those of `stored_shapes`.
    """
    stacks: dict[str, dict[int, np.ndarray]] = {}
    for key, array in tensors:
        for name, line, expert in entry.placed(key):
            made = line.stored(array, sizes)
            if expert is None:
                yield name, made
                continue
            stack = stacks.setdefault(name, {})
            stack[expert] = made
            if len(stack) == shapes[name][0]:
                yield name, np.stack([stack[i] for i in range(len(stack))])
                del stacks[name]


def _template(name: str) -> tuple[str, list[str]]:
    numbers = re.findall(r"(?<=\.)\d+(?=\.)", name)
    holes = iter(("{i}", "{e}", *numbers))
    return re.sub(r"(?<=\.)\d+(?=\.)", lambda _: next(holes), name), numbers
