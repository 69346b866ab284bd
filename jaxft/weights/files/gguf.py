"""GGUF files, read as a Hugging Face folder would be."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.gguf_architectures import GGUF_ARCHITECTURES
from jaxft.weights.files.gguf_config import ROPE_TENSORS, Metadata, model_config
from jaxft.weights.files.gguf_header import TYPES, GgufTensor, read_header
from jaxft.weights.files.gguf_table import GgufArchitecture, TensorName
from jaxft.weights.files.gguf_tokenizer import GgufTokenizer
from jaxft.weights.files.tensor_files import Info
from jaxft.weights.rules import rearrange, rearranged_shape

MOST_EXPERTS = 2**14  # far above those of any model. Each has keys of its own


class StoredTensor(NamedTuple):
    """A tensor of a file, or the matrix of one expert in it, and its line in the table."""

    tensor: GgufTensor
    line: TensorName


class GgufFile:
    """A GGUF file: tensors under Hugging Face keys, config and side files.

    Opening reads only the header. `read` dequantises one tensor. Quantised types are read as
    float32, and the others keep their dtype.
    Raises: UserError that names the file, if it is damaged or of another architecture.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._data, self.metadata, stored = read_header(self.path)
        architecture = self._architecture()
        self._meta = Metadata(str(self.path), architecture, self.metadata)
        self.tokenizer = GgufTokenizer(self.path, self.metadata)
        heads = self._meta.integer("attention.head_count")
        kv_heads = self._meta.integer("attention.head_count_kv", heads)
        self._sizes = {"n": heads, "k": kv_heads, "u": 2}
        self._factors = {name: stored.pop(name) for name in ROPE_TENSORS if name in stored}
        self._tensors: dict[str, list[StoredTensor]] = {}
        for tensor in stored.values():
            for key, one in self._placed(tensor):
                self._tensors.setdefault(key, []).append(one)
        for key in self._tensors:
            self._check(key)
        if "model.embed_tokens.weight" not in self._tensors:
            raise self._error("tensor token_embd.weight is missing; download the file again")

    def _error(self, text: str) -> UserError:
        return UserError(f"{self.path}: {text}")

    def _architecture(self) -> GgufArchitecture:
        kind = str(self.metadata.get("general.architecture"))
        named = [one for one in GGUF_ARCHITECTURES if one.name == kind]
        marked = [one for one in named if one.marker and self.metadata.get(f"{kind}.{one.marker}")]
        found = next(iter(marked or [one for one in named if not one.marker]), None)
        experts = self.metadata.get(f"{kind}.expert_count")
        if not found or (experts and found.marker != "expert_count"):
            known = ", ".join(dict.fromkeys(one.name for one in GGUF_ARCHITECTURES))
            shown = f"{kind} with experts" if experts else repr(kind)
            raise self._error(f"architecture {shown}; expected {known}; use its HF folder")
        return found

    def _placed(self, tensor: GgufTensor) -> Iterator[tuple[str, StoredTensor]]:
        """Yield transformers' keys of a tensor: one, or one for each expert."""
        line, key = self._meta.architecture.lines(tensor.name)
        if line is None:
            raise self._error(
                f"tensor {tensor.name!r} is not part of a {self._meta.architecture.name} model; use"
                " its HF folder"
            )
        if "_exps." in tensor.name:
            count = self._meta.integer("expert_count")
            if tensor.shape[0] != count or count > MOST_EXPERTS or len(tensor.shape) < 2:
                raise self._error(
                    f"{tensor.name} of shape {tensor.shape} has not the {count} experts of its"
                    " metadata; download the file again"
                )
        if "{e}" not in key:
            yield key, StoredTensor(tensor, line)
            return
        size = tensor.nbytes // tensor.shape[0]
        for i in range(tensor.shape[0]):
            one = tensor._replace(shape=tensor.shape[1:], offset=tensor.offset + i * size)
            yield key.replace("{e}", str(i)), StoredTensor(one, line)

    def _check(self, key: str) -> None:
        """Raise UserError for a tensor that lacks a part, or that has another number of heads."""
        stored = sorted(self._tensors[key], key=lambda one: one.line.part or 0)
        (tensor, line), self._tensors[key] = stored[0], stored
        wanted = [name for name, _, _ in self._meta.architecture.placed(key)]
        if len(wanted) != len(stored):
            raise self._error(f"tensor {key} needs all of {', '.join(wanted)}; download it again")
        if any(one.tensor.shape != tensor.shape for one in stored):
            raise self._error(f"the parts {', '.join(wanted)} of {key} have unequal shapes")
        try:
            self._shape(stored)
        except ValueError as error:
            sizes = {name: size for name, size in self._sizes.items() if f"{name} " in line.layout}
            raise self._error(
                f"{tensor.name} of shape {tensor.shape} does not split by {sizes} ({error})"
            ) from None

    def keys(self) -> Sequence[str]:
        return list(self._tensors)

    def _shape(self, stored: list[StoredTensor]) -> tuple[int, ...]:
        (tensor, line), parts = stored[0], () if stored[0].line.part is None else (len(stored),)
        return rearranged_shape((*parts, *tensor.shape), _reverse(line.layout), self._sizes)

    def info(self, key: str) -> Info:
        """Return (shape, dtype) of the array that `read` returns."""
        stored = self._tensors[key]
        dtypes = {TYPES[tensor.type][3] for tensor, _ in stored}
        return self._shape(stored), dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def read(self, key: str) -> np.ndarray:
        """Return the tensor in the layout of transformers."""
        stored = self._tensors[key]
        line, arrays = stored[0].line, [self._array(tensor) for tensor, _ in stored]
        if line.part is None:
            array = arrays[0]
        else:  # parts of other types may have other dtypes
            array = np.stack([one.astype(self.info(key)[1], copy=False) for one in arrays])
        if line.shift:
            with np.errstate(all="ignore"):  # as in `_array`
                array = (array.astype(np.float32) - np.float32(line.shift)).astype(array.dtype)
        if not line.layout:
            return array
        return np.ascontiguousarray(rearrange(array, _reverse(line.layout), self._sizes))

    def _array(self, tensor: GgufTensor) -> np.ndarray:
        name, block, _, dtype = TYPES[tensor.type]
        raw = np.asarray(self._data[tensor.offset : tensor.offset + tensor.nbytes])
        if block == 1:
            return raw.view(dtype).copy().reshape(tensor.shape)
        from gguf import GGMLQuantizationType, quants  # 0.2 s that others do not need

        # It takes 16 rows at a time. Wider ones take half the time.
        rows = math.prod(tensor.shape) // tensor.shape[-1]
        wide = raw.reshape(rows // math.gcd(rows, 16), -1)
        with np.errstate(all="ignore"):  # numbers that are not finite are refused later, by name
            return quants.dequantize(wide, GGMLQuantizationType[name]).reshape(tensor.shape)

    def config(self) -> dict[str, Any]:
        """Return config.json with the keys of both transformers 4 and 5."""
        factors = {name: self._array(tensor) for name, tensor in self._factors.items()}
        (rows, *_), dtype = self.info("model.embed_tokens.weight")[0], self._dtype().name
        return {
            **model_config(self._meta, self._tensors, rows, factors),
            "attention_dropout": 0.0,
            "initializer_range": 0.02,
            "use_cache": True,
            "bos_token_id": self.tokenizer.token_id("bos"),
            "eos_token_id": self.tokenizer.token_id("eos"),
            "pad_token_id": self.tokenizer.token_id("padding"),
            "dtype": dtype,
            "torch_dtype": dtype,
        }

    def _dtype(self) -> np.dtype:
        """Return the dtype of most elements. Norms are float32 even in half-precision files."""
        sizes: dict[np.dtype, int] = {}
        for tensor, _ in (one for stored in self._tensors.values() for one in stored):
            dtype = TYPES[tensor.type][3]
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.shape)
        return max(sizes, key=lambda dtype: sizes[dtype])

    def side_files(self) -> dict[str, bytes]:
        """Return the files that save_pretrained writes beside the weights."""
        config = json.dumps(self.config(), indent=2) + "\n"
        length = self._meta.integer("context_length")
        return {"config.json": config.encode(), **self.tokenizer.files(length)}


def _reverse(layout: str) -> str:
    return " -> ".join(reversed(layout.split(" -> "))) if layout else ""
