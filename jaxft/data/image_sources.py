"""Where pictures come from: one spec string names one random-access set of captioned images."""

import glob
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from jaxft.core.errors import UserError
from jaxft.data.image_tables import open_table
from jaxft.data.sources import DEMO_FOLDER, JsonlRecords, tfds_arguments

SCHEMES = "folder:PATH, wds:TARS, hf:PATH, tfds:NAME[:SPLIT][@DATA_DIR] or demo:emoji/train"
CAPTION_KEYS = ("text", "caption")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif")
DEMO_SETS = ("emoji/train", "emoji/valid", "stickers/train", "stickers/valid")


class Record(NamedTuple):
    """One picture: its place for messages, its caption ("" for none) and the file's bytes.

    `source`: the file of the picture that it was edited from, where the set was opened with them.
    """

    name: str
    caption: str
    content: bytes
    source: bytes | None = None


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
    edited: Source | None = None  # what each picture was edited from

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        source = None if self.edited is None else self.edited.content(index, -1)
        return Record(self.name(index), self.caption(index), self.source.content(index, -1), source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def caption(self, index: int) -> str:
        """The caption alone, without reading the picture."""
        return self.source.caption(index)

    def head(self, index: int, limit: int) -> bytes:
        """At least the first `limit` bytes of the picture's file, if it is that long."""
        return self.source.content(index, limit)

    def keep(self, indices: Sequence[int]) -> "Records":
        """The records of these indices, in their order."""
        edited = None if self.edited is None else _Kept(self.edited, indices)
        return Records(self.spec, _Kept(self.source, indices), edited)

    def __repr__(self) -> str:
        return f"Records({self.spec!r}, {len(self)} images)"


@dataclass(frozen=True)
class _Kept:
    """Some of a source's pictures."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int, /) -> str:
        return self.source.name(self.indices[index])

    def caption(self, index: int, /) -> str:
        return self.source.caption(self.indices[index])

    def content(self, index: int, limit: int, /) -> bytes:
        return self.source.content(self.indices[index], limit)


def open_images(spec: str, captions: bool = True, edited: bool = False) -> Records:
    """Open the set that `spec` names (see SCHEMES); only names and captions are read at once.

    captions: whether every picture must have one; without, those that have none get "".
    edited: whether every picture must name the one that it was edited from.
    Raises UserError for an unknown spec, a missing file, caption or optional package, an empty
    set.
    """
    scheme, _, rest = spec.partition(":")
    if scheme == "folder" and rest:
        source = _open_folder(spec, Path(rest).expanduser(), captions)
    elif scheme == "demo":
        if rest not in DEMO_SETS:
            names = ", ".join(f"demo:{name}" for name in DEMO_SETS)
            raise UserError(f"unknown demo images {spec!r}: expected one of {names}")
        source = _open_folder(spec, DEMO_FOLDER / rest, captions)
    elif scheme == "wds" and rest:
        source = _open_tars(spec, rest, captions)
    elif scheme == "hf" and rest:
        source = _open_tables(spec, Path(rest).expanduser(), captions)
    elif scheme == "tfds" and rest:
        source = _open_tfds(spec, rest, captions)
    else:
        hint = f"; did you mean folder:{spec}?" if Path(spec).expanduser().is_dir() else ""
        raise UserError(f"unknown image source {spec!r}: expected {SCHEMES}{hint}")
    if not len(source):
        raise UserError(f"{spec!r} holds no image: expected files such as *.png or *.jpg")
    return Records(spec, source, _open_edited(spec, rest) if edited else None)


def _open_edited(spec: str, rest: str) -> Source:
    """What each picture of a folder was edited from, as its metadata.jsonl says."""
    metadata = Path(rest).expanduser() / "metadata.jsonl"
    if not spec.startswith("folder:") or not metadata.is_file():
        raise UserError(
            f"{spec!r} names no source pictures, which an InstructPix2Pix model is trained on: "
            'expected folder:PATH with a metadata.jsonl of "file_name", "text" and "source"'
        )
    return _listed_files(spec, metadata, False, "source")


def caption_of(record: dict[str, Any], where: str, captions: bool) -> str:
    """The caption of a record's first caption field; UserError if it is needed and not there."""
    for key in CAPTION_KEYS:
        value = record.get(key)
        if isinstance(value, str) and (value.strip() or not captions):
            return value.strip()
        if value is not None and (captions or not isinstance(value, str)):
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


def _listed_files(spec: str, metadata: Path, captions: bool, key: str = "file_name") -> _Files:
    """The files that metadata.jsonl names under `key`, in its order."""
    rows = JsonlRecords(spec, metadata)
    paths, texts = [], []
    for index in range(len(rows)):
        row, where = rows[index], rows.where(index)
        name = row.get(key)
        if not isinstance(name, str) or not name:
            raise UserError(f'{where}: "{key}" is missing: expected the image\'s path')
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


class _Member(NamedTuple):
    """A picture in a tar: (first byte, size) of it and of its caption, whose name may be ""."""

    tar: Path
    name: str
    image: tuple[int, int]
    caption_name: str
    caption: tuple[int, int]


@dataclass(frozen=True)
class _Tars:
    """Members of webdataset tars, read in place by offset."""

    members: Sequence[_Member]
    captions: bool

    def __len__(self) -> int:
        return len(self.members)

    def name(self, index: int, /) -> str:
        member = self.members[index]
        return f"{member.tar}:{member.name}"

    def caption(self, index: int, /) -> str:
        member = self.members[index]
        if not member.caption_name:
            return ""
        where = f"{member.tar}:{member.caption_name}"
        try:
            text = _read_span(member.tar, *member.caption).decode().removeprefix("\ufeff").strip()
            record = json.loads(text) if member.caption_name.endswith(".json") else {"text": text}
        except ValueError as error:
            raise UserError(f"{where}: the caption is unreadable ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f'{where}: expected a JSON object such as {{"caption": "..."}}')
        return caption_of(record, where, self.captions)

    def content(self, index: int, limit: int, /) -> bytes:
        tar, (start, size) = self.members[index].tar, self.members[index].image
        return _read_span(tar, start, size if limit < 0 else min(size, limit))


def _read_span(path: Path, start: int, size: int) -> bytes:
    try:
        with open(path, "rb") as file:
            file.seek(start)
            data = file.read(size)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if len(data) < size:
        raise UserError(f"{path} ends at byte {start + len(data)}: it was cut since it was opened")
    return data


def _open_tars(spec: str, pattern: str, captions: bool) -> _Tars:
    paths = [Path(p) for p in sorted(glob.glob(str(Path(pattern).expanduser()), recursive=True))]
    if not paths:
        raise UserError(f"no file matches {pattern} ({spec}): expected tars such as shard-*.tar")
    members = [m for path in paths for m in _index_tar(path, captions)]
    return _Tars(members, captions)


def _index_tar(path: Path, captions: bool) -> Iterator[_Member]:
    """Group a tar's members by their path up to the first dot of the file name."""
    groups: dict[str, dict[str, tarfile.TarInfo]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, slash, file = info.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if info.isreg() and stem:
                    groups.setdefault(f"{folder}{slash}{stem}", {})[suffix.lower()] = info
            end = tar.offset
        # A damaged header ends the loop above like the end of the tar, which is a block of zeros.
        if any(_read_span(path, end, min(tarfile.BLOCKSIZE, path.stat().st_size - end))):
            raise tarfile.ReadError(f"no member and no end at byte {end}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"cannot read {path} as an uncompressed tar: {error}: expected whole files; make or "
            "fetch it again"
        ) from None
    for group in groups.values():
        if member := _member(path, group, captions):
            yield member


def _member(path: Path, group: dict[str, tarfile.TarInfo], captions: bool) -> _Member | None:
    """The picture of a group and its caption; None where the group has no picture."""
    suffixes = sorted((suffix.count("."), suffix) for suffix in group)
    images = [s for _, s in suffixes if f".{s}".endswith(SUFFIXES)]
    if not images:
        return None
    image = group[images[0]]
    text = next((group[s] for s in ("txt", "json") if s in group), None)
    if text is None and captions:
        raise UserError(
            f"{path}:{image.name} has no caption: expected a .txt or .json member of its name"
        )
    span = (text.offset_data, text.size) if text else (0, 0)
    name = text.name if text else ""
    return _Member(path, image.name, (image.offset_data, image.size), name, span)


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

    def content(self, index: int, limit: int, /) -> bytes:
        value = self.image(index)
        if isinstance(value, dict) and value.get("bytes") is None and value.get("path"):
            return _Files([self.folder / value["path"]], [""]).content(0, limit)
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
