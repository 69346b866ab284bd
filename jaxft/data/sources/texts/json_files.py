"""Files with one JSON object a line, or with one JSON array of objects."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.data.sources.texts.contents import Contents, decoded, open_contents, text_start

_SPACE = b" \t\r\n"
_TOKENS = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{},]', re.DOTALL)  # strings and structure


class JsonRecords:
    """Records of a file of JSON lines, without blank lines, or of a file that is a JSON array.

    A file whose first character is "[" is an array. Objects are read by byte offset. Indexing is
    safe in threads.
    """

    def __init__(self, spec: str, path: Path):
        self._spec, self._path = spec, path
        self._data = open_contents(spec, path)
        start = text_start(self._data)
        while self._data[start : start + 1] and self._data[start] in _SPACE:
            start += 1
        self._is_array = self._data[start : start + 1] == b"["
        if self._is_array:
            self._spans = self._elements(start)
            self._lines = np.zeros(0, np.int64)
        else:
            self._spans, self._lines = _line_index(self._data)
        if not len(self._spans):
            raise UserError(
                f"{path} ({spec}) holds no records: expected one JSON object a line, or an array"
            )

    def __len__(self) -> int:
        return len(self._spans)

    def __getitem__(self, index: int) -> dict[str, Any]:
        where = self.where(index)
        text = decoded(self._data, self._spans[index], where)
        expected = "an array of JSON objects" if self._is_array else "one JSON object a line"
        try:
            record = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: invalid JSON ({error}): expected {expected}") from None
        if not isinstance(record, dict):
            raise UserError(
                f"{where}: expected a JSON object such as "
                f'{{"text": "..."}}, found {type(record).__name__}'
            )
        return record

    def __repr__(self) -> str:
        return f"JsonRecords({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        if self._is_array:
            return f"{self._path} record {index}"
        return f"{self._path}:{self._lines[index]}"

    def _elements(self, start: int) -> np.ndarray:
        """Return the byte span int64 [n, 2] of each element of the array that begins at `start`."""
        spans, depth, begin = [], 0, start + 1
        for token in _TOKENS.finditer(self._data, start):
            mark = self._data[token.start()]
            if mark in b"[{":
                depth += 1
            elif mark in b"]}":
                depth -= 1
            if (mark in b"," and depth == 1) or not depth:
                spans.append((begin, token.start()))
                begin = token.end()
            if not depth:
                break
        if depth or self._data[begin:].strip(_SPACE):
            rest = "is cut: its JSON array never ends" if depth else "goes on after its JSON array"
            raise UserError(f"{self._path} ({self._spec}) {rest}: expected one array of objects")
        if len(spans) == 1 and not self._data[slice(*spans[0])].strip(_SPACE):
            spans = []
        return np.asarray(spans, np.int64).reshape(-1, 2)


def _line_index(data: Contents) -> tuple[np.ndarray, np.ndarray]:
    """Return byte span int64 [n, 2] and line number int64 [n] of every line that is not blank."""
    spans, numbers = [], []
    start, number = text_start(data), 0
    while start < len(data):
        number += 1
        end = data.find(b"\n", start)
        end = len(data) if end < 0 else end
        if data[start:end].strip():
            spans.append((start, end))
            numbers.append(number)
        start = end + 1
    return np.asarray(spans, np.int64).reshape(-1, 2), np.asarray(numbers, np.int64)
