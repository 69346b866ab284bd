"""Files with one JSON object a line."""

import json
import mmap
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.core.errors import UserError


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
