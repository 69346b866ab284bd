"""GGUF files, written tensor by tensor."""

import math
import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_header import ARRAY, STRING, TYPES

ALIGNMENT = 32  # bytes, llama.cpp's default
VERSION = 3
# The number of a metadata type by a value's Python type, and by the dtype of an array's items.
SCALAR_LAYOUTS = {bool: (7, "<?"), int: (4, "<I"), float: (6, "<f")}
ITEMS = {"int32": 5, "float32": 6}
TYPE_NUMBERS = {row[0]: number for number, row in TYPES.items()}
ARRAYS = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
WRITTEN = {np.dtype(dtype): name for name, dtype in ARRAYS.items()}
Announced = Mapping[str, tuple[tuple[int, ...], str]]  # shape and type of each tensor


def type_name(name: str, shape: tuple[int, ...], dtype: np.dtype, quantised: str) -> str:
    """Return the type that a tensor has in the file: `quantised`, or by its dtype if that is "".

    Vectors, biases and routers are F32, as from llama.cpp's converter. So is a matrix that cannot
    be quantised, because its rows are no multiple of a block, or whose dtype GGUF lacks.
    """
    if len(shape) == 1 or not name.endswith(".weight") or "ffn_gate_inp" in name:
        return "F32"
    if quantised:
        return "F32" if shape[-1] % TYPES[TYPE_NUMBERS[quantised]][1] else quantised
    return WRITTEN.get(dtype, "F32")


def write_gguf(
    path: Path,
    metadata: Mapping[str, Any],
    infos: Announced,
    tensors: Iterable[tuple[str, np.ndarray]],
) -> None:
    """Write a file. `tensors` are float32, in any order, and only one is held at a time.

    A value of the metadata is text, a list of texts, a bool, an int (uint32), a float (float32), or
    an array of int32 or float32. The name is final: a caller that needs an atomic write renames the
    file or its folder.
    Raises: ValueError for tensors that are not those of `infos`, UserError for one that overflows.
    """
    places, at = {}, 0
    head = bytearray(b"GGUF" + struct.pack("<IQQ", VERSION, len(infos), len(metadata)))
    for key, value in metadata.items():
        head += _text(key) + _value(value)
    for name, (shape, kind) in infos.items():
        places[name] = at
        head += _text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        head += struct.pack("<IQ", TYPE_NUMBERS[kind], at)
        _, block, size, _ = TYPES[TYPE_NUMBERS[kind]]
        at += _aligned(math.prod(shape) // block * size)
    start = _aligned(len(head))
    with path.open("wb") as file:
        file.write(head)
        file.truncate(start + at)
        for name, array in tensors:
            shape, kind = infos[name]
            if array.shape != shape or name not in places:
                raise ValueError(f"{name!r} is {array.shape}, or came twice; expected {shape}")
            file.seek(start + places.pop(name))
            file.write(_encoded(name, array, kind).reshape(-1).view(np.uint8).data)
        if places:
            raise ValueError(f"tensors never written: {sorted(places)[:5]}")
        file.flush()
        os.fsync(file.fileno())  # the bytes must be on disk before a rename is


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _text(text: str) -> bytes:
    content = text.encode()
    return struct.pack("<Q", len(content)) + content


def _value(value: Any) -> bytes:
    if isinstance(value, str):
        return struct.pack("<I", STRING) + _text(value)
    if isinstance(value, np.ndarray):
        number = ITEMS[value.dtype.name]
        return struct.pack("<IIQ", ARRAY, number, len(value)) + value.tobytes()
    if isinstance(value, list):
        return struct.pack("<IIQ", ARRAY, STRING, len(value)) + b"".join(map(_text, value))
    number, layout = SCALAR_LAYOUTS[type(value)]
    return struct.pack("<I", number) + struct.pack(layout, value)


def _encoded(name: str, array: np.ndarray, kind: str) -> np.ndarray:
    if kind not in ARRAYS:
        from gguf import GGMLQuantizationType, quants  # 0.2 s that others do not need

        return quants.quantize(np.ascontiguousarray(array, np.float32), GGMLQuantizationType[kind])
    with np.errstate(over="ignore"):
        narrow = np.ascontiguousarray(array, ARRAYS[kind])
    if kind == "F16" and not np.isfinite(narrow).all():
        raise UserError(f"tensor {name} overflows float16; export with export.dtype=bfloat16")
    return narrow
