"""NF4 of bitsandbytes: the codes and scales of a folder, used as they are."""

import json
import re
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import Info, Tensors

GIVE_WHOLE = "give the model before quantisation, mostly the name without -bnb-4bit"
# Tensors that bitsandbytes saves beside a weight, and the settings among them, as JSON in bytes.
STATE = "quant_state.bitsandbytes__nf4"
BESIDE_NAMES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
BESIDE = re.compile(rf"(.+)\.({'|'.join(map(re.escape, (*BESIDE_NAMES, STATE)))})")


class PackedTensors:
    """The checkpoint of a model in NF4, with the names and shapes of its original weights.

    A weight that is in NF4 has its codes and scales `packed`. Its `read` decodes them, for a
    parameter that is held in full. tables: the values of codes, by the names of their tensors
    beside a weight.
    """

    def __init__(self, tensors: Tensors, where: str, tables: Mapping[str, np.ndarray]):
        self._tensors, self._where, self._tables = tensors, where, tables
        marked = [match for key in tensors.keys() if (match := BESIDE.fullmatch(key))]  # noqa: SIM118
        self._beside = {match[0] for match in marked}
        self._states = {match[1]: self._state(match[0]) for match in marked if match[2] == STATE}

    def keys(self) -> Sequence[str]:
        return [key for key in self._tensors.keys() if key not in self._beside]  # noqa: SIM118

    def info(self, key: str) -> Info:
        if state := self._states.get(key):
            return tuple(state["shape"]), np.dtype(np.float32)
        return self._tensors.info(key)

    def read(self, key: str) -> np.ndarray:
        if key not in self._states:
            return self._tensors.read(key)
        shape, found = self._states[key]["shape"], self._arrays(key)
        blocks, scales = (("codes", 2), ("scales", 64), ("nested", 64 * 256)), found["scales"]
        if any(x in found and found[x].size != -(-prod(shape) // size) for x, size in blocks):
            raise self._misfit(key)
        if "nested" in found:
            each = np.repeat(found["nested"], 256)[: scales.size]
            scales = self._tables["nested_quant_map"][scales] * each + found["offset"]
        numbers = np.stack([found["codes"] >> 4, found["codes"] & 15], -1).reshape(-1)
        numbers = self._tables["quant_map"][numbers[: prod(shape)]]
        return (numbers * np.repeat(scales, 64)[: numbers.size]).reshape(shape)

    def packed(self, key: str, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
        """Return the arrays of a weight, which have the names of `kernels.quantised.nf4.NF4`.

        Raises: UserError for a weight that is not in NF4, for other tables of values, and for
        arrays that do not fit `shapes`.
        """
        if key not in self._states:
            raise UserError(
                f"{self._where}: tensor {key} is not in NF4, as the others of this folder are; give"
                " a folder in which all projections are (not one of a dynamic quantisation)"
            )
        made = self._arrays(key)
        if {name: x.size for name, x in made.items()} != {x: prod(y) for x, y in shapes.items()}:
            raise self._misfit(key)
        return {name: array.reshape(shapes[name]) for name, array in made.items()}

    def _misfit(self, key: str) -> UserError:
        return UserError(
            f"{self._where}: the sizes of {key} and {key}.* are not those of config.json, or their"
            " scales are not (bnb_4bit_use_double_quant); get the folder again"
        )

    def _arrays(self, key: str) -> dict[str, np.ndarray]:
        """Return the arrays of a weight, flat. Raises UserError for other tables of values."""
        names = [name for name in BESIDE_NAMES if f"{key}.{name}" in self._beside]
        found = {name: self._tensors.read(f"{key}.{name}") for name in names}
        for name, table in self._tables.items():
            if name in found and not np.array_equal(found[name], table):
                raise UserError(
                    f"{self._where}: tensor {key}.{name} is not bitsandbytes' own table of values,"
                    f" and other tables are not read; {GIVE_WHOLE}"
                )
        codes = self._tensors.read(key).reshape(-1).view(np.uint8)
        made = {"codes": codes, "scales": found["absmax"]}
        if "nested_absmax" in found:
            made["nested"] = found["nested_absmax"]
            made["offset"] = np.array(self._states[key]["nested_offset"], np.float32)
        return made

    def _state(self, key: str) -> dict[str, Any]:
        """Return the settings of a weight. Raises UserError for blocks of another size."""
        try:
            state = json.loads(self._tensors.read(key).tobytes())
            sizes = state["blocksize"], state.get("nested_blocksize", 256)
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{self._where}: tensor {key} is not readable: {error}") from None
        if sizes != (64, 256):
            raise UserError(
                f"{self._where}: tensor {key} states blocks of {sizes}, and only (64, 256) are read"
            )
        return state
