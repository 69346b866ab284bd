"""Files of tables: Parquet and Arrow files, and folders that Hugging Face datasets saved."""

import json
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.sources import hub
from jaxft.data.sources.files import find_files, refuse_mixed_files

_ENDINGS = (".parquet", ".arrow")


def open_table_files(spec: str, path: Path) -> "list[ArrowFile | ParquetFile]":
    """Open a file, folder or glob of Parquet files, the folder of a saved dataset, or a hub's set.

    Raises UserError that names the file for missing, mixed or broken files, and without the package
    pyarrow.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{spec!r} needs pyarrow: pip install pyarrow") from None
    files = _table_files(spec, path) or hub.download(spec, str(path))
    parts = []
    for file in files:
        try:
            if file.suffix.lower() == ".arrow":
                parts.append(ArrowFile(file, pyarrow))
            else:
                parts.append(ParquetFile(file, pyarrow.parquet))
        except (OSError, ValueError, KeyError, pyarrow.ArrowException) as error:
            raise UserError(f"cannot read {file} ({spec}): {_first_line(error)}") from None
    return parts


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no reason given")


def _table_files(spec: str, path: Path) -> list[Path]:
    """Return the table files of one split, without caches and other files beside a saved set.

    A path that is not there has none.
    """
    base, files = find_files(str(path), _ENDINGS)
    base, files = _one_split(spec, base, files)
    if not path.is_file():
        files = [p for p in files if not p.name.startswith("cache-") or p.suffix != ".arrow"]
    named = {folder: _saved_files(folder) for folder in {p.parent for p in files}}
    if not path.is_file():
        files = [p for p in files if (saved := named[p.parent]) is None or p.name in saved]
    if not files and path.exists():
        raise UserError(f"no table at {path} ({spec}): expected .parquet or .arrow files")
    refuse_mixed_files(spec, base, files)
    if len({p.suffix.lower() for p in files}) > 1:
        raise UserError(
            f"{spec!r} mixes .parquet and .arrow files, which may hold the same rows: name one "
            f"kind, such as hf:{files[0].parent / '*.parquet'}"
        )
    return files


def _one_split(spec: str, base: Path, files: list[Path]) -> tuple[Path, list[Path]]:
    """Return the only split of a saved DatasetDict. Raises UserError if it has several."""
    listing = base / "dataset_dict.json"
    if not listing.is_file():
        return base, files
    splits = _read_json(listing).get("splits")
    splits = splits if isinstance(splits, list) else []
    inside = [split for split in splits if any(base / split in p.parents for p in files)]
    if len(inside) > 1:
        raise UserError(
            f"{spec!r} holds the splits {', '.join(inside)}: name one, such as "
            f"hf:{base / inside[0]}"
        )
    kept = [p for p in files if not inside or base / inside[0] in p.parents]
    return (base / inside[0] if inside else base), kept


def _saved_files(folder: Path) -> set[str] | None:
    """Return the names of the files that `save_to_disk` wrote, or None without its state.json."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    content = _read_json(state)
    if content.get("_indices_data_files"):
        raise UserError(
            f"{state}: the set was saved as a selection of rows: save its flatten_indices() again"
        )
    listed = content.get("_data_files")
    if not isinstance(listed, list):
        return None
    names = {str(file.get("filename")) for file in listed if isinstance(file, dict)}
    if missing := sorted(name for name in names if not (folder / name).is_file()):
        raise UserError(f"{folder / missing[0]} is missing: {state} names it, copy it too")
    return names


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return content if isinstance(content, dict) else {}


class ArrowFile:
    """An Arrow file of `Dataset.save_to_disk` or another writer, mapped into memory."""

    def __init__(self, path: Path, pyarrow: Any):
        self.path = path
        mapped = pyarrow.memory_map(str(path))
        streamed = mapped.read(6) != b"ARROW1"
        mapped.seek(0)
        opened = pyarrow.ipc.open_stream(mapped) if streamed else pyarrow.ipc.open_file(mapped)
        self._table = opened.read_all()
        self.schema = self._table.schema

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> Any:
        return self._table[name]

    def cells(self, names: Sequence[str], row: int) -> dict[str, Any]:
        return {name: self._table[name][row].as_py() for name in names}


class ParquetFile:
    """A Parquet file. The last row groups read stay in memory, as they decode only as a whole."""

    def __init__(self, path: Path, parquet: Any):
        self.path = path
        self._file = parquet.ParquetFile(path, memory_map=True)
        self.schema = self._file.schema_arrow
        groups = range(self._file.num_row_groups)
        self._ends = list(accumulate(self._file.metadata.row_group(g).num_rows for g in groups))
        self._lock = threading.Lock()
        self._group = lru_cache(maxsize=2)(self._read_group)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def column(self, name: str) -> Any:
        try:
            return self._file.read(columns=[name])[name]
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path}: {_first_line(error)}") from None

    def cells(self, names: Sequence[str], row: int) -> dict[str, Any]:
        group = bisect_right(self._ends, row)
        with self._lock:
            table = self._group(group, tuple(names))
        place = row - (self._ends[group - 1] if group else 0)
        return {name: table[name][place].as_py() for name in names}

    def _read_group(self, group: int, names: tuple[str, ...]) -> Any:
        try:
            return self._file.read_row_group(group, columns=list(names))
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {self.path}: {_first_line(error)}") from None


TableFile = ArrowFile | ParquetFile
