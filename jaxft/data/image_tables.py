"""Tables with a picture a row: Parquet files and saved Hugging Face datasets."""

import glob
import re
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError


class Table:
    """Random access to the pictures and captions of many files as one; safe in threads.

    Captions are in memory; pictures are read when asked for.
    """

    def __init__(self, parts: "Sequence[_ArrowFile | _ParquetFile]", image: str, text: str | None):
        self._parts, self._image = parts, image
        self._texts = [part.column(text) for part in parts] if text else None
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1]

    def image(self, index: int) -> Any:
        """What the image column holds: bytes, or {"bytes": ..., "path": ...}."""
        part, row = self._place(index)
        return self._parts[part].cell(self._image, row)

    def text(self, index: int) -> Any:
        """The caption, or None without a caption column."""
        part, row = self._place(index)
        return None if self._texts is None else self._texts[part][row].as_py()

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def open_table(spec: str, path: Path, caption_keys: Sequence[str]) -> Table:
    """Open a file, folder or glob of Parquet files, or the folder of a saved dataset.

    caption_keys: the columns one of which must be there; () for none. Raises UserError naming
    `spec` for missing or mixed files, missing columns, or if the package pyarrow is missing.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{spec!r} needs pyarrow: pip install pyarrow") from None
    found = path.rglob("*") if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
    files = sorted(p for p in found if p.suffix in (".parquet", ".arrow") and p.is_file())
    _check_files(spec, path, files)
    try:
        parts = [
            _ArrowFile(p, pyarrow) if p.suffix == ".arrow" else _ParquetFile(p, pyarrow.parquet)
            for p in files
        ]
        return Table(parts, *_columns(spec, parts[0].schema, caption_keys))
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), "no reason given")
        raise UserError(f"cannot read {path} ({spec}): {reason}") from None


def _check_files(spec: str, path: Path, files: Sequence[Path]) -> None:
    if not files:
        raise UserError(f"no table at {path} ({spec}): expected .parquet or .arrow files")
    names = [str(p.relative_to(path) if path.is_dir() else p.name).lower() for p in files]
    splits = {word for name in names for word in re.split(r"[^a-z]+", name)}
    splits &= {"train", "test", "valid", "validation"}
    if len(splits) > 1:
        found = ", ".join(sorted(splits))
        raise UserError(f"{spec!r} mixes the splits {found}: name one, such as hf:PATH/train*")


def _columns(spec: str, schema: Any, caption_keys: Sequence[str]) -> tuple[str, str | None]:
    """The names of the picture's and the caption's column."""
    kinds = {field.name: str(field.type) for field in schema}
    images = [name for name, kind in kinds.items() if kind.startswith(("struct<bytes", "binary"))]
    if not images:
        raise UserError(f'{spec!r} has no image column: expected {{"bytes", "path"}} in {kinds}')
    text = next((key for key in caption_keys if key in kinds), None)
    if text is None and caption_keys:
        raise UserError(
            f"{spec!r} has no column {' or '.join(caption_keys)}: found {', '.join(kinds)}"
        )
    return ("image" if "image" in images else images[0]), text


class _ArrowFile:
    """A file of `Dataset.save_to_disk`, mapped into memory."""

    def __init__(self, path: Path, pyarrow: Any):
        self._table = pyarrow.ipc.open_stream(pyarrow.memory_map(str(path))).read_all()
        self.schema = self._table.schema

    def __len__(self) -> int:
        return len(self._table)

    def column(self, name: str) -> Any:
        return self._table[name]

    def cell(self, name: str, row: int) -> Any:
        return self._table[name][row].as_py()


class _ParquetFile:
    """A Parquet file, of which the last row groups read are kept: they decode only as a whole."""

    def __init__(self, path: Path, parquet: Any):
        self._file = parquet.ParquetFile(path, memory_map=True)
        self.schema = self._file.schema_arrow
        groups = range(self._file.num_row_groups)
        self._ends = list(accumulate(self._file.metadata.row_group(g).num_rows for g in groups))
        self._lock = threading.Lock()
        self._group = lru_cache(maxsize=2)(self._read_group)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def column(self, name: str) -> Any:
        return self._file.read(columns=[name])[name]

    def cell(self, name: str, row: int) -> Any:
        group = bisect_right(self._ends, row)
        with self._lock:
            column = self._group(group, name)
        return column[row - (self._ends[group - 1] if group else 0)].as_py()

    def _read_group(self, group: int, name: str) -> Any:
        return self._file.read_row_group(group, columns=[name])[name]
