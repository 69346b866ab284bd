"""Header of a GGUF file: its metadata, and the place of each tensor. Takes no jax to import."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from jaxft.core.errors import UserError

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
SCALARS = {0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?"}
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
_F32 = np.dtype(np.float32)
# ggml's type number: name, elements a block, bytes a block, dtype of the array that is read.
TYPES = {
    0: ("F32", 1, 4, _F32), 1: ("F16", 1, 2, np.dtype(np.float16)),
    2: ("Q4_0", 32, 18, _F32), 3: ("Q4_1", 32, 20, _F32), 6: ("Q5_0", 32, 22, _F32),
    7: ("Q5_1", 32, 24, _F32), 8: ("Q8_0", 32, 34, _F32), 10: ("Q2_K", 256, 84, _F32),
    11: ("Q3_K", 256, 110, _F32), 12: ("Q4_K", 256, 144, _F32), 13: ("Q5_K", 256, 176, _F32),
    14: ("Q6_K", 256, 210, _F32), 16: ("IQ2_XXS", 256, 66, _F32), 17: ("IQ2_XS", 256, 74, _F32),
    18: ("IQ3_XXS", 256, 98, _F32), 19: ("IQ1_S", 256, 50, _F32), 20: ("IQ4_NL", 32, 18, _F32),
    21: ("IQ3_S", 256, 110, _F32), 22: ("IQ2_S", 256, 82, _F32), 23: ("IQ4_XS", 256, 136, _F32),
    29: ("IQ1_M", 256, 56, _F32), 30: ("BF16", 1, 2, np.dtype(ml_dtypes.bfloat16)),
    34: ("TQ1_0", 256, 54, _F32), 35: ("TQ2_0", 256, 66, _F32), 39: ("MXFP4", 32, 17, _F32),
}  # fmt: skip
# Types of ggml that are not read, by their names in llama.cpp.
UNREAD_TYPES = {
    9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 40: "NVFP4",
    41: "Q1_0",
}  # fmt: skip


class GgufTensor(NamedTuple):
    """A tensor of a GGUF file as stored: shape in row-major order, absolute byte offset."""

    name: str
    shape: tuple[int, ...]
    type: int
    offset: int

    @property
    def nbytes(self) -> int:
        _, block, size, _ = TYPES[self.type]
        return math.prod(self.shape) // block * size


def read_header(path: Path) -> tuple[np.memmap, dict[str, Any], dict[str, GgufTensor]]:
    """Return the bytes of a file, its metadata, and its tensors by name.

    Raises: UserError that names the file, if it is damaged.
    """
    try:
        data = np.memmap(path, np.uint8, "r")
    except (OSError, ValueError) as error:  # ValueError: numpy cannot map an empty file
        raise UserError(f"{path}: not a readable GGUF file ({error})") from error
    return data, *_Header(path, data.data).read()


def read_positions(path: Path) -> dict[str, Any]:
    """Return the keys of config.json that bound the length of a text, from the header alone."""
    _, metadata, tensors = read_header(path)
    kind = metadata.get("general.architecture")
    scaling = metadata.get(f"{kind}.rope.scaling.type", "none")
    if scaling == "linear" and metadata.get(f"{kind}.rope.scaling.factor", 1.0) == 1.0:
        scaling = "none"
    scaling = "llama3" if "rope_freqs.weight" in tensors else scaling
    scaling = "longrope" if "rope_factors_long.weight" in tensors else scaling
    return {
        "max_position_embeddings": metadata.get(f"{kind}.context_length"),
        "rope_scaling": None if scaling == "none" else {"rope_type": scaling},
    }


class _Header:
    """Reader of the header of a GGUF file. Every length is checked against the remaining bytes."""

    def __init__(self, path: Path, data: memoryview):
        self.path, self.data, self.at = path, data, 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        """Return metadata and tensors by name. Raises: UserError for a damaged file."""
        if bytes(self.data[:4]) != b"GGUF":
            raise UserError(f"{self.path}: not a GGUF file; expected it to start with 'GGUF'")
        self.at = 4
        version = self.integer(4)
        if version not in (2, 3):
            raise UserError(f"{self.path}: GGUF version {version}; expected 2 or 3, little-endian")
        tensors, values = self.integer(8), self.integer(8)
        metadata: dict[str, Any] = {}
        for _ in range(values):
            key = self.string()
            metadata[key] = self.value(self.integer(4))
        if (files := metadata.get("split.count", 1)) not in (0, 1):
            raise UserError(
                f"{self.path}: one of the {files} files of a split model; join them by"
                " llama-gguf-split --merge FIRST OUT, and give OUT"
            )
        entries = [self.tensor() for _ in range(tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment <= 0 or alignment % 8:
            raise UserError(f"{self.path}: alignment {alignment!r}; expected a multiple of 8")
        start = -(-self.at // alignment) * alignment
        placed = {tensor.name: tensor._replace(offset=start + tensor.offset) for tensor in entries}
        for tensor in placed.values():
            if tensor.offset + tensor.nbytes > len(self.data):
                raise UserError(f"{self.path}: ends inside {tensor.name!r}; download it again")
        if len(placed) != tensors:
            raise UserError(f"{self.path}: two tensors share a name; the file is not trustworthy")
        return metadata, placed

    def take(self, size: int) -> memoryview:
        if size > len(self.data) - self.at:
            raise UserError(f"{self.path}: ends inside its header; download the file again")
        self.at += size
        return self.data[self.at - size : self.at]

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "little")

    def string(self) -> str:
        return str(self.take(self.integer(8)), "utf-8", "replace")

    def value(self, kind: int, nested: bool = False) -> Any:
        if kind == STRING:
            return self.string()
        if kind == ARRAY and not nested:
            item, count = self.integer(4), self.integer(8)
            if item in SCALARS:
                dtype = np.dtype(SCALARS[item])
                return np.frombuffer(self.take(count * dtype.itemsize), dtype).tolist()
            return [self.value(item, nested=True) for _ in range(count)]
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self.take(dtype.itemsize), dtype)[0].item()
        raise UserError(f"{self.path}: metadata of unknown type {kind}; the file is damaged")

    def tensor(self) -> GgufTensor:
        name, rank = self.string(), self.integer(4)
        if not 1 <= rank <= 4:
            raise UserError(f"{self.path}: tensor {name!r} has {rank} dims; expected 1 to 4")
        shape = tuple(self.integer(8) for _ in range(rank))[::-1]
        kind, offset = self.integer(4), self.integer(8)
        if kind not in TYPES:
            raise UserError(
                f"{self.path}: {name!r} has ggml type {UNREAD_TYPES.get(kind, kind)}, which is not"
                " read; give the model's F16, BF16, Q8_0 or Q4_K_M file, or its HF folder"
            )
        if 0 in shape or shape[-1] % TYPES[kind][1]:
            raise UserError(f"{self.path}: {name!r} of shape {shape} cannot be {TYPES[kind][0]}")
        return GgufTensor(name, shape, kind, offset)
