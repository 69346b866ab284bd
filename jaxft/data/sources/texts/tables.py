"""Rows of Parquet and Arrow files, and of folders that Hugging Face datasets saved, as records."""

import json
import re
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.sources.table_files import TableFile, open_table_files
from jaxft.data.sources.texts import TextRecords
from jaxft.data.sources.texts.joined import JoinedRecords


class TableRecords:
    """Records of one table file. Columns of bytes, such as pictures, are left out.

    The numbers of a `ClassLabel` column of Hugging Face datasets are replaced by their names. A
    column of structs has the fields of all rows. Those that are null in a row are left out of it.
    """

    def __init__(self, spec: str, file: TableFile):
        self._spec, self._file = spec, file
        self._names = [field.name for field in file.schema if not _has_bytes(field.type)]
        twice = sorted({name for name in self._names if self._names.count(name) > 1})
        if twice:
            raise UserError(f"{file.path}: two columns are named {twice[0]!r}: rename one")
        self._class_names = _class_names(file.schema.metadata or {})

    def __len__(self) -> int:
        return len(self._file)

    def __getitem__(self, index: int) -> dict[str, Any]:
        cells = self._file.cells(self._names, index)
        record = {name: _without_nulls(value) for name, value in cells.items()}
        for name, classes in self._class_names.items():
            if isinstance(value := record.get(name), int):
                record[name] = classes[value] if 0 <= value < len(classes) else None
        return record

    def __repr__(self) -> str:
        return f"TableRecords({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return f"{self._file.path} row {index}"


def _without_nulls(value: Any) -> Any:
    """Return a cell without the null fields of its structs, such as those of other rows' tools."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _has_bytes(kind: Any) -> bool:
    """Return True for an Arrow type of bytes, or one with such a part, as pictures have."""
    if not kind.num_fields:
        return re.match(r"(large_|fixed_size_)?binary", str(kind)) is not None
    return any(_has_bytes(kind.field(i).type) for i in range(kind.num_fields))


def _class_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """Return the names of the classes of each label column, which datasets writes as metadata."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return {
            name: feature["names"]
            for name, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def open_table_rows(spec: str, rest: str) -> TextRecords:
    """Open the rows of a file, folder or glob of Parquet or Arrow files as records."""
    files = open_table_files(spec, Path(rest).expanduser())
    parts = [TableRecords(spec, file) for file in files if len(file)]
    if not parts:
        raise UserError(f"{spec!r} holds no records: every table in it has 0 rows")
    return parts[0] if len(parts) == 1 else JoinedRecords(spec, parts)
