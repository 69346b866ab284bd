"""Files of comma- or tab-separated values, of which the first row names the fields."""

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.data.sources.texts.contents import decoded, open_contents, text_start

_LONGEST_FIELD = (1 << 31) - 1  # the csv module stops at 128 KiB


class CsvRecords:
    """Records of a CSV or TSV file. Every value is a string, and an empty field is "".

    Rows are read by byte offset, so that a quoted field may hold newlines. The fields are separated
    by commas, or by semicolons or tabs if the first row has no comma. Indexing is safe in threads.
    """

    def __init__(self, spec: str, path: Path):
        self._spec, self._path = spec, path
        self._data = open_contents(spec, path)
        start = text_start(self._data)
        if self._data.find(b"\n") < 0 <= self._data.find(b"\r"):
            raise UserError(f"{path} ({spec}) ends its lines with \\r alone: save it with \\n")
        end = self._data.find(b"\n", start)
        head = self._data[start : end if end >= 0 else len(self._data)]
        self._delimiter = next((c for c in ",;\t" if c.encode() in head), ",")
        csv.field_size_limit(_LONGEST_FIELD)
        self._spans, self._lines = self._index(start)
        if not len(self._spans):
            raise UserError(f"{path} ({spec}) is empty: expected a row of field names, then rows")
        self._names = self._cells(0)
        named = [name for name in self._names if name]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise UserError(f"{self.where(-1)}: two fields are named {twice[0]!r}: rename one")
        if len(self._spans) == 1:
            raise UserError(f"{path} ({spec}) holds no records: only its row of field names")

    def __len__(self) -> int:
        return len(self._spans) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        cells = self._cells(index + 1)
        if len(cells) != len(self._names):
            raise UserError(
                f"{self.where(index)}: found {len(cells)} fields, but the first row names"
                f" {len(self._names)}: complete the row, or put a field that holds"
                f" {self._delimiter!r} in double quotes"
            )
        return {name: cell for name, cell in zip(self._names, cells, strict=True) if name}

    def __repr__(self) -> str:
        return f"CsvRecords({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return f"{self._path}:{self._lines[index + 1]}"

    def _cells(self, row: int) -> list[str]:
        text = decoded(self._data, self._spans[row], f"{self._path}:{self._lines[row]}")
        return next(csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter))

    def _index(self, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return byte span int64 [n, 2] and first line int64 [n] of every row that is not blank.

        The csv module finds the rows. Bytes are read as Latin-1, which keeps their offsets.
        """
        spans, numbers, line = [], [], 1
        file = io.BytesIO(self._data) if isinstance(self._data, bytes) else self._data
        file.seek(start)
        lines = (line.decode("latin-1") for line in iter(file.readline, b""))
        rows = csv.reader(lines, delimiter=self._delimiter, strict=True)
        try:
            for cells in rows:
                if len(cells) > 1 or any(map(str.strip, cells)):
                    spans.append((start, file.tell()))
                    numbers.append(line)
                start, line = file.tell(), rows.line_num + 1
        except csv.Error as error:
            raise UserError(
                f"{self._path}:{line}: invalid CSV ({error}): close the quotes of the field, and"
                " double the quotes inside it"
            ) from None
        return np.asarray(spans, np.int64).reshape(-1, 2), np.asarray(numbers, np.int64)
