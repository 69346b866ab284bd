"""Sources of texts: JSON lines, text files and TFDS splits as random-access sequences of dicts."""

import json
import mmap
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jaxft.core.errors import UserError
from jaxft.data.sources.files import find_files, refuse_mixed_folders

_TFDS_SPEC = re.compile(r"(?P<name>[^:@]+(:\d+\.\d+\.\d+)?)(:(?P<split>[^@]+))?(@(?P<folder>.+))?")


class TextRecords(Protocol):
    """A random-access set of records. Its `repr` is the same in every process and run."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict[str, Any]: ...

    def where(self, index: int) -> str:
        """Return the place of record `index` for messages, such as "rows.jsonl:12"."""
        ...


class JsonlRecords:
    """Records of a file with one JSON object a line, without blank lines.

    Lines are read by byte offset. Indexing is safe in threads.
    """

    def __init__(self, spec: str, path: Path):
        self._spec, self._path = spec, path
        try:
            with open(path, "rb") as file:
                empty = file.seek(0, 2) == 0  # an empty file cannot be mapped
                self._data = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"cannot read {path} ({spec}): {error.strerror or error}") from None
        self._spans, self._lines = _line_index(self._data)
        if not len(self._lines):
            raise UserError(f"{path} ({spec}) holds no records: expected one JSON object a line")

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, index: int) -> dict[str, Any]:
        start, stop = self._spans[index]
        line = self._data[start:stop]
        try:
            record = json.loads(line.decode())
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.where(index)}: invalid UTF-8 at byte {int(start) + error.start} of the "
                "file: save it as UTF-8"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.where(index)}: invalid JSON ({error}): expected one JSON object a line"
            ) from None
        if not isinstance(record, dict):
            raise UserError(
                f"{self.where(index)}: expected a JSON object such as "
                f'{{"text": "..."}}, found {type(record).__name__}'
            )
        return record

    def __repr__(self) -> str:
        return f"JsonlRecords({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index]}"


def _line_index(data: mmap.mmap | bytes) -> tuple[np.ndarray, np.ndarray]:
    """Return byte span int64 [n, 2] and line number int64 [n] of every line that is not blank."""
    spans, numbers = [], []
    start = 3 if data[:3] == b"\xef\xbb\xbf" else 0  # a byte order mark is not content
    number = 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            spans.append((start, end))
            numbers.append(number)
        start = end + 1
    return np.asarray(spans, np.int64).reshape(-1, 2), np.asarray(numbers, np.int64)


class TextFiles:
    """Records of text files: {"text": whole file} for each file, with newlines unchanged."""

    def __init__(self, spec: str, paths: Sequence[Path]):
        self._spec, self._paths = spec, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            return {"text": path.read_bytes().decode().removeprefix("\ufeff")}
        except OSError as error:
            raise UserError(
                f"cannot read {path} ({self._spec}): {error.strerror or error}"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: invalid UTF-8 at byte {error.start}: save the file as UTF-8"
            ) from None

    def __repr__(self) -> str:
        return f"TextFiles({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return str(self._paths[index])


def open_text_files(spec: str, pattern: str) -> TextFiles:
    """Open one text file, every visible .txt file below a folder, or the files of a glob."""
    path = Path(pattern).expanduser()
    base, paths = find_files(pattern, (".txt",))
    if not paths and path.is_dir():
        raise UserError(f"{path} ({spec}) holds no .txt file: expected at least one")
    if not paths:
        raise UserError(f"no file matches {path} ({spec}): expected a file, folder or glob")
    refuse_mixed_folders(spec, base, paths)
    if not any(p.stat().st_size for p in paths):
        raise UserError(f"{spec} is empty: every file it names has 0 bytes")
    return TextFiles(spec, paths)


class TfdsRecords:
    """Records of a TFDS split, read without TensorFlow. Texts are decoded, class labels named."""

    def __init__(self, spec: str, source: Any, features: Any, text_keys: set[str]):
        self._spec, self._source = spec, source
        self._text_keys = text_keys
        self._class_names = {k: f.int2str for k, f in features.items() if hasattr(f, "int2str")}

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: self._readable(index, key, v) for key, v in self._source[index].items()}

    def _readable(self, index: int, key: str, value: Any) -> Any:
        if key in self._class_names:
            return self._class_names[key](int(value))
        if key in self._text_keys and isinstance(value, bytes):
            try:
                return value.decode()
            except UnicodeDecodeError as error:
                raise UserError(
                    f"{self.where(index)}: field {key!r} is invalid UTF-8 at byte {error.start}"
                ) from None
        return value

    def __repr__(self) -> str:
        return f"TfdsRecords({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return f"{self._spec} record {index}"


def tfds_arguments(spec: str, rest: str) -> tuple[Any, str, dict[str, Any]]:
    """Return the TFDS package, a dataset's name, and the other arguments of `tfds.data_source`."""
    match = _TFDS_SPEC.fullmatch(rest)
    if match is None:
        raise UserError(f"cannot read {spec!r}: expected tfds:NAME[:SPLIT][@DATA_DIR]")
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f'{spec!r} needs tensorflow-datasets: pip install "jaxft[data]"') from None
    where = {"split": match["split"] or "train", "data_dir": match["folder"]}
    return tfds, match["name"], where


def open_tfds_texts(spec: str, rest: str) -> TextRecords:
    """Open a split of a TFDS dataset of texts."""
    tfds, name, where = tfds_arguments(spec, rest)
    try:
        source: Any = tfds.data_source(name, **where)
    except Exception as error:  # TFDS raises many kinds; each becomes one line
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(
            f"cannot open {spec!r}: {type(error).__name__}: {reason}; expected an installed or "
            "prepared TFDS dataset in array_record or parquet format, and one of its splits"
        ) from error
    if not len(source):
        raise UserError(f"{spec!r} is empty: choose another split")
    features = source.dataset_info.features
    text_keys = {key for key, f in features.items() if isinstance(f, tfds.features.Text)}
    return TfdsRecords(spec, source, features, text_keys)
