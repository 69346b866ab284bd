"""Records of pictures and captions, the same from every kind of set, and samples left out."""

import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxft.core.errors import UserError

CAPTION_KEYS = ("text", "caption")
SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jfi", ".jif", ".pjpeg", ".pjp", ".webp",
    ".bmp", ".dib", ".gif", ".tif", ".tiff", ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpf",
    ".jpx", ".ppm", ".pgm", ".pbm", ".pnm", ".tga", ".qoi",
)  # fmt: skip
# Pictures that Pillow opens not at all, or as something else than what a person would see.
UNREADABLE = (
    ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jxr", ".wdp", ".hdp", ".bpg", ".flif",
    ".jls", ".svg", ".svgz", ".psd", ".psb", ".xcf", ".kra", ".ai", ".eps", ".exr", ".hdr", ".pfm",
    ".ico", ".icns", ".cur", ".dds", ".pcx", ".sgi", ".wmf", ".emf", ".avifs",
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef",
    ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
)  # fmt: skip
_TOLD, _NAMED = 10, 50  # bad samples that an error gives a reason for, and that it names


class Record(NamedTuple):
    """One picture: its place for messages, its caption ("" for none) and the file's bytes.

    `source`: the file of the picture that it was edited from, where the set was opened with them.
    """

    name: str
    caption: str
    content: bytes
    source: bytes | None = None


class Bad(NamedTuple):
    """A sample that was left out, and why."""

    name: str
    error: str


class ImageSource(Protocol):
    """The methods of each kind of set; every one is safe in threads."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def caption(self, index: int, /) -> str: ...

    def content(self, index: int, /) -> bytes:
        """The file's bytes."""
        ...


@dataclass(frozen=True)
class Records:
    """A random-access set of captioned pictures; bytes are read when indexed, safe in threads.

    edited: the pictures that each was edited from. left_out: pictures that nothing can read.
    sizes: int32 [n, 2], height and width of every upright picture. digests: SHA-256 of every
    file's bytes. Both are there once all headers were read.
    """

    spec: str
    source: ImageSource
    edited: ImageSource | None = None
    left_out: tuple[Bad, ...] = ()
    sizes: np.ndarray | None = field(default=None, compare=False)
    digests: tuple[bytes, ...] = field(default=(), compare=False)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        source = None if self.edited is None else self.edited.content(index)
        return Record(self.name(index), self.caption(index), self.source.content(index), source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def caption(self, index: int) -> str:
        """The caption alone, without reading the picture."""
        return self.source.caption(index)

    def keep(self, indices: Sequence[int]) -> "Records":
        """The records of these indices, in their order."""
        edited = None if self.edited is None else _Kept(self.edited, indices)
        sizes = None if self.sizes is None else self.sizes[np.asarray(indices, int)]
        digests = tuple(self.digests[i] for i in indices) if self.digests else ()
        return Records(
            self.spec, _Kept(self.source, indices), edited, self.left_out, sizes, digests
        )

    def __repr__(self) -> str:
        return f"Records({self.spec!r}, {len(self)} images)"


@dataclass(frozen=True)
class _Kept:
    """Some of a source's pictures."""

    source: ImageSource
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, index: int, /) -> str:
        return self.source.name(self.indices[index])

    def caption(self, index: int, /) -> str:
        return self.source.caption(self.indices[index])

    def content(self, index: int, /) -> bytes:
        return self.source.content(self.indices[index])


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
        found = ", ".join(repr(key) for key, value in record.items() if value is not None)
        raise UserError(
            f"{where}: the caption is missing: expected a field "
            + " or ".join(f'"{key}"' for key in CAPTION_KEYS)
            + (f", found {found}" if found else "")
        )
    return ""


def unreadable(name: str) -> Bad:
    """The entry of a picture whose ending stands for a format that is not read."""
    suffix = PurePath(name).suffix.lower()
    return Bad(name, f"{name}: {suffix} pictures are not read: convert it to PNG or JPEG")


def count_unreadable(left_out: Sequence[Bad]) -> str:
    """Number of left-out pictures by ending, the first of them and the fix, in one line."""
    counts = Counter(PurePath(bad.name).suffix.lower() for bad in left_out)
    endings = ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items()))
    return (
        f"{len(left_out)} in formats that are not read ({endings}; first: {left_out[0].name}): "
        "convert them to PNG or JPEG"
    )


def name_all(bad: Sequence[Bad]) -> str:
    """The bad samples in one line: of few the errors, of more the names, of many a file of all."""
    if len(bad) <= _TOLD:
        return "; ".join(one.error for one in bad)
    first = "; ".join(one.error for one in bad[:3])
    if len(bad) <= _NAMED:
        return f"{first}; and likewise {', '.join(one.name for one in bad[3:])}"
    with tempfile.NamedTemporaryFile(
        "w", prefix="jaxft-bad-", suffix=".jsonl", delete=False, encoding="utf-8"
    ) as file:
        file.writelines(json.dumps(one._asdict(), ensure_ascii=False) + "\n" for one in bad)
    return f"{first}; all {len(bad)} are listed in {file.name}, one a line"


def refuse_bad(bad: Sequence[Bad], what: str) -> None:
    """Raise one UserError that names all bad samples, if there are any."""
    if len(bad) == 1:
        raise UserError(bad[0].error)
    if bad:
        raise UserError(f"{len(bad)} {what}: {name_all(bad)}")
