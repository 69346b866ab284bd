"""Sources of pictures: one spec string names one random-access set of captioned images."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.sources.image_folders import ImageFiles, open_edited, open_folder
from jaxft.data.sources.image_records import (
    CAPTION_KEYS,
    Bad,
    ImageSource,
    Records,
    caption_of,
    count_unreadable,
)
from jaxft.data.sources.image_tables import open_table
from jaxft.data.sources.image_tars import open_tars
from jaxft.data.sources.texts import tfds_arguments
from jaxft.demo import demo_path

IMAGE_SCHEMES = "folder:PATH, wds:TARS, hf:PATH, tfds:NAME[:SPLIT][@DATA_DIR] or demo:emoji/train"


def open_images(spec: str, captions: bool = True, edited: bool = False) -> Records:
    """Open the set that `spec` names (see IMAGE_SCHEMES); only names and captions are read at once.

    captions: whether every picture must have one; without, those that have none get "".
    edited: whether every picture must name the one that it was edited from.
    Pictures in formats that nothing here reads are left out, counted in a printed line and listed
    in `left_out`. Raises UserError for an unknown spec, a missing file, caption or optional
    package, several splits at once, an empty set.
    """
    scheme, _, rest = spec.partition(":")
    left_out: list[Bad] = []
    source: ImageSource
    if scheme == "folder" and rest:
        source, left_out = open_folder(spec, Path(rest).expanduser(), captions)
    elif (demo := demo_path(spec, "images")) is not None:
        source, left_out = open_folder(spec, demo, captions)
    elif scheme == "wds" and rest:
        source, left_out = open_tars(spec, rest, captions)
    elif scheme == "hf" and rest:
        source = _open_tables(spec, Path(rest).expanduser(), captions)
    elif scheme == "tfds" and rest:
        source = _open_tfds(spec, rest, captions)
    else:
        hint = f"; did you mean folder:{spec}?" if Path(spec).expanduser().is_dir() else ""
        raise UserError(f"unknown image source {spec!r}: expected {IMAGE_SCHEMES}{hint}")
    if not len(source):
        found = f", but {count_unreadable(left_out)}" if left_out else ""
        raise UserError(f"{spec!r} holds no image: expected files such as *.png or *.jpg{found}")
    if left_out:
        print(f"left out images of {spec}: {count_unreadable(left_out)}", flush=True)
    before = open_edited(spec, Path(rest).expanduser()) if edited else None
    return Records(spec, source, before, tuple(left_out))


@dataclass(frozen=True)
class _Rows:
    """Rows of a table: image(i) is bytes or {"bytes", "path"}, text(i) the caption."""

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
            return ImageFiles([self.folder / value["path"]], [""]).content(0)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise UserError(f"{self.name(index)}: the image is missing: expected its bytes")
        return content


def _open_tables(spec: str, path: Path, captions: bool) -> _Rows:
    table = open_table(spec, path, CAPTION_KEYS if captions else ())
    folder = path if path.is_dir() else path.parent
    return _Rows(spec, folder, len(table), table.image, table.text, captions)


def _open_tfds(spec: str, rest: str, captions: bool) -> _Rows:
    """A TFDS split, its pictures left encoded: TFDS would drop their orientation."""
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

    return _Rows(spec, Path(), len(source), lambda i: source[i][images[0]], text, captions)
