"""Records of pictures and captions, common to all kinds of sets, and samples left out."""

import json
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
# What Pillow may open, by the contents of a file and whatever its name is. Its other formats are
# rare, and one of them (EPS) starts a program.
FORMATS = (
    "PNG", "JPEG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "AVIF", "JPEG2000", "PPM", "TGA", "QOI",
)  # fmt: skip
# Formats that Pillow does not open, or opens as another picture than a viewer shows.
UNREADABLE = (
    ".heic", ".heics", ".heif", ".heifs", ".hif", ".jxl", ".jxr", ".wdp", ".hdp", ".bpg", ".flif",
    ".jls", ".svg", ".svgz", ".psd", ".psb", ".xcf", ".kra", ".ai", ".eps", ".exr", ".hdr", ".pfm",
    ".ico", ".icns", ".cur", ".dds", ".pcx", ".sgi", ".wmf", ".emf", ".avifs",
    ".3fr", ".arw", ".cr2", ".cr3", ".crw", ".dcr", ".dng", ".erf", ".iiq", ".kdc", ".mrw", ".nef",
    ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".rwl", ".sr2", ".srf", ".srw", ".x3f",
)  # fmt: skip
# Numbers of bad samples up to which an error gives all reasons, or all names.
_TOLD, _NAMED = 10, 50


class Record(NamedTuple):
    """One picture: its name in messages, its caption ("" for none) and the file's bytes.

    source: the bytes of the picture before the edit, or None in other sets.
    """

    name: str
    caption: str
    content: bytes
    source: bytes | None = None


class Bad(NamedTuple):
    """A sample that was left out, with its error."""

    name: str
    error: str


class ImageSource(Protocol):
    """Methods of each kind of set. All are safe in threads."""

    def __len__(self) -> int: ...

    def name(self, index: int, /) -> str: ...

    def caption(self, index: int, /) -> str: ...

    def content(self, index: int, /) -> bytes:
        """Return the bytes of the file."""
        ...


@dataclass(frozen=True)
class Records:
    """A random-access set of captioned pictures. Bytes are read at each access, safe in threads.

    edited: the pictures before the edit. left_out: pictures in formats that are not read.
    masks: the pictures whose grey, or with `alpha` whose transparency, weights the loss.
    sizes: int32 [n, 2], height and width of every upright picture. digests: SHA-256 of every
    file's bytes. Both are set after all headers have been read.
    """

    spec: str
    source: ImageSource
    edited: ImageSource | None = None
    left_out: tuple[Bad, ...] = ()
    sizes: np.ndarray | None = field(default=None, compare=False)
    digests: tuple[bytes, ...] = field(default=(), compare=False)
    masks: ImageSource | None = None
    alpha: bool = False

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> Record:
        source = None if self.edited is None else self.edited.content(index)
        return Record(self.name(index), self.caption(index), self.source.content(index), source)

    def name(self, index: int) -> str:
        return self.source.name(index)

    def caption(self, index: int) -> str:
        """Return the caption without reading the picture."""
        return self.source.caption(index)

    def keep(self, indices: Sequence[int]) -> "Records":
        """Return the records of these indices, in their order."""
        edited = None if self.edited is None else _Kept(self.edited, indices)
        sizes = None if self.sizes is None else self.sizes[np.asarray(indices, int)]
        digests = tuple(self.digests[i] for i in indices) if self.digests else ()
        masks = None if self.masks is None else _Kept(self.masks, indices)
        source = _Kept(self.source, indices)
        return Records(self.spec, source, edited, self.left_out, sizes, digests, masks, self.alpha)

    def __repr__(self) -> str:
        return f"Records({self.spec!r}, {len(self)} images)"


@dataclass(frozen=True)
class _Kept:
    """Pictures of a source at some indices."""

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
    """Return the caption of a record. Raises UserError if it is required and missing or bad."""
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
    """Return the Bad of a picture in a format that is not read, by its ending."""
    suffix = PurePath(name).suffix.lower()
    return Bad(name, f"{name}: {suffix} pictures are not read: convert it to PNG or JPEG")


def count_unreadable(left_out: Sequence[Bad]) -> str:
    """Return one line: counts of left-out pictures by ending, the first one and the fix."""
    counts = Counter(PurePath(bad.name).suffix.lower() for bad in left_out)
    endings = ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items()))
    return (
        f"{len(left_out)} in formats that are not read ({endings}; first: {left_out[0].name}): "
        "convert them to PNG or JPEG"
    )


def name_all(bad: Sequence[Bad]) -> str:
    """Return one line about bad samples.

    It has all errors of a few, all names of some more, and for many the path of a file with all.
    """
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
    """Raise one UserError for all bad samples, if there are any."""
    if len(bad) == 1:
        raise UserError(bad[0].error)
    if bad:
        every = [one._asdict() for one in bad]
        raise UserError(f"{len(bad)} {what}: {name_all(bad)}", bad=every)


@contextmanager
def all_bad(records: Any, check: Callable[[int], None]) -> Iterator[None]:
    """Turn the error of the first bad record into one that names all, if there are several.

    records: they have a length, and `where(index)`. `check(index)` raises UserError for a bad one.
    """
    try:
        yield
    except UserError:
        bad = []
        for index in range(len(records)):
            try:
                check(index)
            except UserError as error:
                bad.append(Bad(records.where(index), str(error)))
        if len(bad) > 1:
            refuse_bad(bad, f"of {len(records)} records are bad")
        raise
