"""Tables with one picture a row: Parquet files and saved Hugging Face datasets."""

from bisect import bisect_right
from collections.abc import Sequence
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from PIL import Image

from jaxft.core.errors import UserError
from jaxft.data.sources.images.records import FORMATS
from jaxft.data.sources.table_files import TableFile, open_table_files

# Columns that are tried first, with the most common name in front.
_IMAGE_NAMES = ("image", "jpg", "jpeg", "png", "webp", "img", "picture", "photo", "pixel_values")
_PROBED = 16  # rows that are searched for the first picture of a column


class Table:
    """Random access to the pictures and captions of many files as one table. Safe in threads.

    Captions are in memory. Pictures are read at each access.
    """

    def __init__(self, parts: Sequence[TableFile], image: str, text: str | None):
        self._parts, self._image = parts, image
        self._texts = [part.column(text) for part in parts] if text else None
        self._ends = list(accumulate(len(part) for part in parts))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def image(self, index: int) -> Any:
        """Return a cell of the image column: bytes, or {"bytes": ..., "path": ...}."""
        part, row = self._place(index)
        return _as_bytes(self._parts[part].cells([self._image], row)[self._image])

    def text(self, index: int) -> Any:
        """Return the caption, or None without a caption column."""
        part, row = self._place(index)
        return None if self._texts is None else self._texts[part][row].as_py()

    def _place(self, index: int) -> tuple[int, int]:
        part = bisect_right(self._ends, index)
        return part, index - (self._ends[part - 1] if part else 0)


def _as_bytes(value: Any) -> Any:
    """Return a cell with its bytes as bytes. Polars may write them as a list of numbers."""
    if isinstance(value, dict):
        return {**value, "bytes": _as_bytes(value.get("bytes"))}
    return bytes(value) if isinstance(value, list) else value


def open_table(spec: str, path: Path, caption_keys: Sequence[str]) -> Table:
    """Open a file, folder or glob of Parquet files, or the folder of a saved dataset.

    caption_keys: names of the caption column, of which one is required. () is for no captions.
    Raises UserError that names the file for missing or mixed files and columns, and without the
    package pyarrow.
    """
    parts = open_table_files(spec, path)
    filled = [part for part in parts if len(part)] or parts
    return Table(filled, *_columns(spec, filled, caption_keys))


def _columns(
    spec: str, parts: Sequence[TableFile], caption_keys: Sequence[str]
) -> tuple[str, str | None]:
    """Return the names of the image and the caption column, which are the same in all parts."""
    kinds = {field.name: field.type for field in parts[0].schema}
    image = _image_column(spec, parts[0])
    known = [key for key in caption_keys if key in kinds]
    text = next((key for key in known if _is_text(kinds[key])), next(iter(known), None))
    if text is None and caption_keys:
        texts = [name for name, kind in kinds.items() if _is_text(kind)]
        hint = f"; rename the one of {', '.join(texts)} that holds captions" if texts else ""
        raise UserError(
            f"{spec!r} has no column {' or '.join(caption_keys)}: found {', '.join(kinds)}{hint}"
        )
    for part in parts:
        found = {field.name: field.type for field in part.schema}
        fits = image in found and _may_hold_images(found[image])
        if not fits or (text is not None and (text not in found or not _is_text(found[text]))):
            columns = ", ".join(f"{name}: {kind}" for name, kind in found.items())
            pictures = f"{image!r} of pictures" + (f" and {text!r} of texts" if text else "")
            raise UserError(f"{part.path}: expected the columns {pictures}, found {columns}")
    return image, text


def _image_column(spec: str, part: TableFile) -> str:
    kinds = {field.name: field.type for field in part.schema}
    names = [name for name, kind in kinds.items() if _may_hold_images(kind)]
    if not names:
        found = {name: str(kind) for name, kind in kinds.items()}
        raise UserError(f'{spec!r} has no image column: expected {{"bytes", "path"}} in {found}')
    known = [name for name in _IMAGE_NAMES if name in names]
    if len(names) == 1 and (known or _is_struct(kinds[names[0]])):
        return names[0]
    holding = [name for name in [*known, *names] if _holds_image(part, name)]
    if not holding:
        raise UserError(
            f"{part.path}: none of the columns {', '.join(names)} starts with a picture that can "
            "be read: expected PNG, JPEG or WebP bytes"
        )
    if holding[0] not in known and len(set(holding)) > 1:
        raise UserError(
            f"{part.path}: the columns {', '.join(holding)} all hold pictures: name the one to "
            "train on 'image'"
        )
    return holding[0]


def _is_struct(kind: Any) -> bool:
    """Return True for a column of `Image` in Hugging Face datasets: a struct with bytes."""
    fields = [kind.field(i) for i in range(kind.num_fields)] if "struct<" in str(kind)[:7] else []
    return any(field.name == "bytes" and _is_bytes(field.type) for field in fields)


def _is_bytes(kind: Any) -> bool:
    name = str(kind).replace("element: ", "").replace("item: ", "").replace(" not null", "")
    if name.startswith("dictionary<values="):
        return _is_bytes(kind.value_type)
    return name in ("binary", "large_binary", "binary_view") or (
        name.endswith("list<uint8>") or name.startswith("fixed_size_list<uint8>")
    )


def _may_hold_images(kind: Any) -> bool:
    return _is_struct(kind) or _is_bytes(kind)


def _is_text(kind: Any) -> bool:
    name = str(kind)
    if name.startswith("dictionary<values="):
        return _is_text(kind.value_type)
    return name in ("string", "large_string", "string_view", "null")


def _holds_image(part: TableFile, name: str) -> bool:
    """Return True if the first cell of a column that is not empty has the header of a picture."""
    cells = (_as_bytes(part.cells([name], row)[name]) for row in range(min(_PROBED, len(part))))
    for cell in cells:
        content = cell.get("bytes") if isinstance(cell, dict) else cell
        if content is None and not (isinstance(cell, dict) and cell.get("path")):
            continue
        try:
            Image.open(BytesIO(content), formats=FORMATS) if content is not None else None
        except Exception:  # Pillow raises many kinds
            return False
        return True
    return False
