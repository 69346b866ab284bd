"""Safetensors files: checked, read and written in shards, with one tensor in memory at a time."""

import json
import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxft.core.errors import UserError
from jaxft.core.guards.inside import is_inside

STEMS = ("model", "diffusion_pytorch_model")
INDEX_SUFFIX = ".safetensors.index.json"
LFS = b"version https://git-lfs"  # start of the pointer that git writes without its LFS extension
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
SHARD = r".+-\d+-of-\d+\.safetensors"
MAX_HEADER_BYTES = 100_000_000
DTYPES = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),  # a power of 2, for scales
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

Info = tuple[tuple[int, ...], np.dtype]


class Tensors(Protocol):
    """A checkpoint under Hugging Face keys. `read` loads one tensor, never the whole file."""

    def keys(self) -> Sequence[str]: ...
    def info(self, key: str) -> Info: ...
    def read(self, key: str) -> np.ndarray: ...


class _Place(NamedTuple):
    """The place of one tensor: its file and the absolute byte offset there."""

    file: Path
    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


class TensorFiles:
    """The tensors of one or more safetensors files as one mapping from key to array."""

    def __init__(self, places: Mapping[str, _Place]):
        self._places = dict(places)

    @classmethod
    def open(cls, where: str | Path | Sequence[str | Path]) -> "TensorFiles":
        """Open a folder (single file or index), one file, an index, or a list of files.

        The headers of all files are checked before the first tensor is read.
        Raises: UserError that names the file, if it is truncated, corrupt, ambiguous or pickled.
        """
        if not isinstance(where, str | Path):
            return cls(_merge([Path(file) for file in where]))
        path = Path(where)
        if path.name.endswith(INDEX_SUFFIX):
            return cls(_open_index(path))
        return cls(_open_folder(path) if path.is_dir() else _header(path))

    def keys(self) -> Sequence[str]:
        return list(self._places)

    def info(self, key: str) -> Info:
        """Return (shape, dtype) from the header alone."""
        place = self._places[key]
        return place.shape, place.dtype

    def read(self, key: str) -> np.ndarray:
        """Return the tensor as a new array.

        The file is read and not mapped, because mapped pages count as memory of the process.
        """
        place = self._places[key]
        array = np.empty(place.shape, place.dtype)
        with place.file.open("rb") as file:
            file.seek(place.offset)
            if file.readinto(array.reshape(-1).view(np.uint8).data) != array.nbytes:
                raise UserError(f"{place.file}: ends inside tensor {key!r}; copy the file again")
        return array


def _open_folder(folder: Path) -> dict[str, _Place]:
    for stem in STEMS:
        # A single file is read before an index beside it, as transformers does.
        if (path := folder / f"{stem}.safetensors").exists():
            return _header(path)
        if (path := folder / f"{stem}{INDEX_SUFFIX}").exists():
            return _open_index(path)
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    if pickles:
        raise _pickle_error(pickles[0], folder)
    found = f"{folder}: found neither model.safetensors nor model{INDEX_SUFFIX}"
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if any(name.startswith("consolidated") for name in names):
        raise UserError(
            f"{found}, but {names[0]}, which has Mistral's own names; download the files of the"
            " same model that begin with model"
        )
    if shards := [name for name in names if re.fullmatch(SHARD, name)]:
        raise UserError(f"{found}, but shards ({_some(shards)}); download the index beside them")
    if names:
        raise UserError(f"{found}, but {_some(names)}; give one that is a whole model by its path")
    raise UserError(f"{found}; give a folder saved by save_pretrained")


def _pickle_error(path: Path, what: Path) -> UserError:
    """Return the error for a pickle, with the Python code that converts `what`, or its pipeline."""
    folder = what if what.is_dir() else what.parent
    pipeline = (folder.parent / "model_index.json").is_file()
    what = folder.parent if pipeline else folder if "-of-" in what.name else what
    return UserError(
        f"{path}: pickle files can run code and are refused; convert it once to safetensors (read"
        " with weights_only=True) in Python, where jaxft[verify] is installed:"
        " `from jaxft.verify.convert import convert;"
        f" convert({str(what)!r})`"
    )


def _merge(files: Sequence[Path], copies: bool = False) -> dict[str, _Place]:
    """Return the tensors of all files.

    Raises: UserError for a key in two files. If `copies`, only for one with different values.
    """
    places: dict[str, _Place] = {}
    for file in files:
        for key, place in _header(file).items():
            other = places.setdefault(key, place)
            if other is not place and not (copies and _same(place, other)):
                rest = "with other values; delete the one of another save" if copies else ""
                raise UserError(
                    f"{file}: tensor {key!r} is also in {other.file.name} {rest}".strip()
                )
    return places


def _same(one: _Place, other: _Place) -> bool:
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    left, right = (TensorFiles({"": place}).read("").reshape(-1) for place in (one, other))
    return np.array_equal(left.view(np.uint8), right.view(np.uint8))


def _open_index(index: Path) -> dict[str, _Place]:
    """Read `*.safetensors.index.json` as a list of the shards to open, as transformers does.

    The tensors are found by the shards' own headers, so the index may be wrong about the shard of a
    tensor. Shards that it does not list belong to another save. A missing tensor is reported later,
    when the checkpoint is matched with a model.
    """
    if index.stat().st_size > MAX_HEADER_BYTES:
        raise UserError(f"{index}: larger than {MAX_HEADER_BYTES} bytes, not a weight index")
    content = _json(index.read_bytes(), index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: expected an object 'weight_map' from tensor to shard name")
    names = set()
    for key, name in weight_map.items():
        if not isinstance(name, str) or not is_inside(index.parent, name):
            raise UserError(f"{index}: tensor {key!r} names {name!r}; expected a file beside it")
        names.add(name)
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        stem = index.name.removesuffix(INDEX_SUFFIX)
        found = {path.name for path in index.parent.glob(f"{stem}-*.safetensors")} - names
        other = f", but there is {min(found)}: the index is of another save" if found else ""
        raise UserError(
            f"{index}: missing shards {_some(missing)}{other}; download index and shards again"
        )
    return _merge([index.parent / name for name in sorted(names)], copies=True)


def _header(file: Path) -> dict[str, _Place]:
    """Check one file with the safetensors library, then read the place of each tensor.

    Two malicious cases that the library accepts are refused here: duplicate keys, and shapes whose
    product is 0 but whose strides overflow.
    """
    if file.suffix in PICKLES:
        raise _pickle_error(file, file)
    try:
        with file.open("rb") as stream:
            first = stream.read(len(LFS))
            if first == LFS:
                raise UserError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull`")
            stream.seek(8)
            size = int.from_bytes(first[:8], "little")
            if size > min(MAX_HEADER_BYTES, file.stat().st_size - 8):
                raise UserError(f"{file}: not a safetensors file, or cut short; copy it again")
            with safe_open(file, "np"):
                header = _json(stream.read(size), file)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file}: not a readable safetensors file ({error})") from error
    header.pop("__metadata__", None)
    return {key: _place(file, key, entry, 8 + size) for key, entry in header.items()}


def _place(file: Path, key: str, entry: dict, start: int) -> _Place:
    shape = tuple(entry["shape"])
    if entry["dtype"] not in DTYPES:
        expected = ", ".join(DTYPES)
        raise UserError(f"{file}: {key!r} has dtype {entry['dtype']}; expected one of {expected}")
    dtype = DTYPES[entry["dtype"]]
    if math.prod(max(dim, 1) for dim in shape) * dtype.itemsize >= 2**62:
        raise UserError(f"{file}: tensor {key!r} has an impossible shape {shape}")
    return _Place(file, shape, dtype, start + entry["data_offsets"][0])


def _json(text: bytes, file: Path) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
            raise UserError(f"{file}: key {twice!r} appears twice; the file is not trustworthy")
        return result

    try:
        return json.loads(text, object_pairs_hook=unique)
    except UserError:
        raise
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: invalid JSON ({error})") from error


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:10]) + (f" and {len(names) - 10} more" if len(names) > 10 else "")


def write_sharded(
    folder: Path,
    tensors: Iterable[tuple[str, np.ndarray]],
    infos: Mapping[str, Info],
    max_shard_bytes: int = 5 * 10**9,
    stem: str = "model",
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write `{stem}.safetensors`, or numbered shards and their index, as transformers names them.

    `infos` (shape and dtype of every tensor) fixes the layout, so `tensors` may come in any order,
    and only one is held at a time. `metadata` is added to {"format": "pt"} in every header. The
    names are final: a caller that needs an atomic write passes a temporary folder and renames it.

    Returns: the weight files.
    Raises: ValueError for a tensor that is missing, repeated, unknown or not as in `infos`.

    Processes other than the first write nothing. They still iterate over `tensors`, because making
    one may gather an array from all processes.
    """
    shards = _split(infos, max_shard_bytes)
    files = [folder / f"{stem}.safetensors"]
    if len(shards) > 1:
        count = len(shards)
        files = [folder / f"{stem}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if jax.process_index():
        for _ in tensors:
            pass
        return files
    places: dict[str, _Place] = {}
    for file, keys in zip(files, shards, strict=True):
        places |= _write_header(file, {key: infos[key] for key in keys}, metadata or {})
    for key, value in tensors:
        if key not in places:
            raise ValueError(f"tensor {key!r} was not announced or came twice")
        place, array = places.pop(key), np.asarray(value, order="C")
        if (array.shape, array.dtype) != (place.shape, place.dtype):
            expected = f"{place.shape} {place.dtype}"
            raise ValueError(f"{key!r} is {array.shape} {array.dtype}; expected {expected}")
        with place.file.open("r+b") as stream:
            stream.seek(place.offset)
            stream.write(array.reshape(-1).view(np.uint8).data)
    if places:
        raise ValueError(f"tensors never written: {_some(sorted(places))}")
    for file in files:  # the bytes must be on disk before a rename is
        with file.open("r+b") as stream:
            os.fsync(stream.fileno())
    if len(shards) > 1:
        weight_map = {
            key: file.name for file, keys in zip(files, shards, strict=True) for key in sorted(keys)
        }
        total = sum(_nbytes(info) for info in infos.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}{INDEX_SUFFIX}").write_text(json.dumps(index, indent=2) + "\n")
    return files


def _nbytes(info: Info) -> int:
    return math.prod(info[0]) * np.dtype(info[1]).itemsize


def _split(infos: Mapping[str, Info], max_shard_bytes: int) -> list[list[str]]:
    """Fill shards in the given order. A tensor larger than the limit is alone in its shard."""
    shards: list[list[str]] = [[]]
    room = max_shard_bytes
    for key, info in infos.items():
        size = _nbytes(info)
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(key)
        room -= size
    return shards


def _write_header(
    file: Path, infos: Mapping[str, Info], metadata: Mapping[str, str]
) -> dict[str, _Place]:
    """Write the header and reserve the data. Wide dtypes come first to keep all tensors aligned."""
    spans: dict[str, tuple[int, int]] = {}
    end = 0
    for key in sorted(infos, key=lambda key: -np.dtype(infos[key][1]).itemsize):
        spans[key] = (end, end + _nbytes(infos[key]))
        end = spans[key][1]
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **metadata}}
    for key, span in spans.items():
        shape, dtype = infos[key]
        name = DTYPE_NAMES[np.dtype(dtype)]
        header[key] = {"dtype": name, "shape": list(shape), "data_offsets": span}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with file.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        stream.truncate(start + end)
    return {
        key: _Place(file, tuple(infos[key][0]), np.dtype(infos[key][1]), start + begin)
        for key, (begin, _) in spans.items()
    }
