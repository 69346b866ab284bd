"""Where pictures come from: one spec string names one random-access set of captioned images."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxft.core.errors import UserError
from jaxft.data.sources import DEMO_FOLDER, JsonlRecords

SCHEMES = "folder:PATH, wds:TARS, hf:PATH, tfds:NAME[:SPLIT][@DATA_DIR] or demo:emoji/train"
CAPTION_KEYS = ("text", "caption")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
DEMO_SETS = ("emoji/train", "emoji/valid")


class Record(NamedTuple):
    """One picture: its place for messages, its caption ("" for none) and the file's bytes."""

    name: str
    caption: str
    content: bytes


class Source(Protocol):
    """What each kind of set implements; every method is safe in threads."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def caption(self, index: int, /) -> str: ...

    def content(self, index: int, limit: int, /) -> bytes:
        """The file's bytes, or (limit >= 0) at least its first `limit` bytes."""
        ...


@dataclass(frozen=True)
class Records:
    """A random-access set of captioned pictures; bytes are read when indexed, safe in threads."""

    spec: str
    source: Source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        return Record(self.name(index), self.caption(index), self.source.content(index, -1))

    def name(self, index: int) -> str:
        return self.source.name(index)

    def caption(self, index: int) -> str:
        """The caption alone, without reading the picture."""
        return self.source.caption(index)

    def head(self, index: int, limit: int) -> bytes:
        """At least the first `limit` bytes of the picture's file, if it is that long."""
        return self.source.content(index, limit)

    def __repr__(self) -> str:
        return f"Records({self.spec!r}, {len(self)} images)"


def open_images(spec: str, captions: bool = True) -> Records:
    """Open the set that `spec` names (see SCHEMES); only names and captions are read at once.

    captions: whether every picture must have one; without, those that have none get "".
    Raises UserError for an unknown spec, a missing file, caption or optional package, an empty
    set.
    """
    scheme, _, rest = spec.partition(":")
    if scheme == "folder" and rest:
        source = _open_folder(spec, Path(rest).expanduser(), captions)
    elif scheme == "demo":
        if rest not in DEMO_SETS:
            names = " or ".join(f"demo:{name}" for name in DEMO_SETS)
            raise UserError(f"unknown demo images {spec!r}: expected {names}")
        source = _open_folder(spec, DEMO_FOLDER / rest, captions)
    else:
        hint = f"; did you mean folder:{spec}?" if Path(spec).expanduser().is_dir() else ""
        raise UserError(f"unknown image source {spec!r}: expected {SCHEMES}{hint}")
    if not len(source):
        raise UserError(f"{spec!r} holds no image: expected files such as *.png or *.jpg")
    return Records(spec, source)


def caption_of(record: dict[str, Any], where: str, captions: bool) -> str:
    """The caption of a record's first caption field; UserError if it is needed and not there."""
    for key in CAPTION_KEYS:
        value = record.get(key)
        if isinstance(value, str) and (value.strip() or not captions):
            return value.strip()
        if value is not None:
            found = f"found {str(value)[:40]!r}"
            raise UserError(f"{where}: caption {key!r} must be a text that is not empty, {found}")
    if captions:
        raise UserError(
            f"{where}: the caption is missing: expected a field "
            + " or ".join(f'"{key}"' for key in CAPTION_KEYS)
        )
    return ""


@dataclass(frozen=True)
class _Files:
    """One picture a file; `captions` is as long as `paths`."""

    paths: Sequence[Path]
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int, /) -> str:
        return str(self.paths[index])

    def caption(self, index: int, /) -> str:
        return self.captions[index]

    def content(self, index: int, limit: int, /) -> bytes:
        try:
            with open(self.paths[index], "rb") as file:
                return file.read(limit)
        except OSError as error:
            raise UserError(f"cannot read {self.paths[index]}: {error.strerror or error}") from None


def _open_folder(spec: str, folder: Path, captions: bool) -> _Files:
    if not folder.is_dir():
        raise UserError(f"{folder} ({spec}) is no folder: expected one that holds images")
    metadata = folder / "metadata.jsonl"
    if metadata.is_file():
        return _listed_files(spec, metadata, captions)
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return _Files(paths, [_caption_beside(path, captions) for path in paths])


def _listed_files(spec: str, metadata: Path, captions: bool) -> _Files:
    """The files that metadata.jsonl names, in its order."""
    rows = JsonlRecords(spec, metadata)
    paths, texts = [], []
    for index in range(len(rows)):
        row, where = rows[index], rows.where(index)
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            raise UserError(f'{where}: "file_name" is missing: expected the image\'s path')
        path = metadata.parent / name
        if not path.is_file():
            raise UserError(f"{where}: {path} does not exist: expected an image file")
        paths.append(path)
        texts.append(caption_of(row, where, captions))
    return _Files(paths, texts)


def _caption_beside(path: Path, captions: bool) -> str:
    """The text of the .txt file with the picture's stem."""
    beside = path.with_suffix(".txt")
    try:
        text = beside.read_bytes().decode().removeprefix("\ufeff").strip()
    except FileNotFoundError:
        if captions:
            raise UserError(
                f"{path} has no caption: expected {beside.name} beside it, or metadata.jsonl "
                'with "file_name" and "text" in the folder'
            ) from None
        return ""
    except UnicodeDecodeError as error:
        raise UserError(
            f"{beside}: invalid UTF-8 at byte {error.start}: save it as UTF-8"
        ) from None
    if captions and not text:
        raise UserError(f"{beside} is empty: expected the caption of {path.name}")
    return text
