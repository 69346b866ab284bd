"""Sources of pictures in rows of tables: parquet and arrow files, and TFDS splits."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.core.guards.inside import is_below
from jaxft.data.sources.images.folders import ImageFiles
from jaxft.data.sources.images.records import CAPTION_KEYS, caption_of
from jaxft.data.sources.images.tables import open_table
from jaxft.data.sources.texts.tfds import tfds_arguments


@dataclass(frozen=True)
class TableImages:
    """Pictures of a table's rows.

    `image(i)` returns bytes or {"bytes", "path"}. `text(i)` returns the caption.
    """

    spec: str
    folder: Path
    n: int
    image: Callable[[int], Any]
    text: Callable[[int], Any]
    captions: bool

    def __len__(self) -> int:
        return self.n

    def name(self, index: int, /) -> str:
        return f"{self.spec} row {index}"

    def caption(self, index: int, /) -> str:
        return caption_of({"text": self.text(index)}, self.name(index), self.captions)

    def content(self, index: int, /) -> bytes:
        value = self.image(index)
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            path = self.folder / value["path"]
            if not is_below(self.folder, path):
                raise UserError(f"{self.name(index)}: {path}: expected a path below {self.folder}")
            return ImageFiles([path], [""]).content(0)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise UserError(f"{self.name(index)}: the image is missing: expected its bytes")
        return content


def open_table_images(spec: str, rest: str, captions: bool) -> TableImages:
    """Open the pictures of parquet or arrow files, or of a folder of them."""
    path = Path(rest).expanduser()
    table = open_table(spec, path, CAPTION_KEYS if captions else ())
    folder = path if path.is_dir() else path.parent
    return TableImages(spec, folder, len(table), table.image, table.text, captions)


def open_tfds_images(spec: str, rest: str, captions: bool) -> TableImages:
    """Open a TFDS split. Its pictures stay encoded, because TFDS would drop their orientation."""
    tfds, name, where = tfds_arguments(spec, rest)
    try:
        probe: Any = tfds.data_source(name, **where)
        features: Any = probe.dataset_info.features
        images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
        if not images:
            raise UserError(f"no image among its features {', '.join(features)}")
        skip = {images[0]: tfds.decode.SkipDecoding()}
        source: Any = tfds.data_source(name, **where, decoders=skip)
    except Exception as error:  # TFDS raises many kinds; each becomes one line
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(
            f"cannot open {spec!r}: {type(error).__name__}: {reason}; expected a prepared TFDS "
            "dataset of images in array_record or parquet format, and one of its splits"
        ) from error
    key = next((k for k in (*CAPTION_KEYS, "label") if k in features), None)
    named = getattr(features[key], "int2str", None) if key else None

    def text(index: int) -> Any:
        value = source[index][key] if key else None
        if isinstance(value, bytes):
            return value.decode(errors="replace")
        return named(int(value)) if named and value is not None else value

    return TableImages(spec, Path(), len(source), lambda i: source[i][images[0]], text, captions)
