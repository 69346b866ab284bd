"""Folders of pictures, with captions in files beside them or in a list."""

import csv
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError
from jaxft.core.guards.inside import is_below
from jaxft.data.sources.files import refuse_mixed_folders, repeat_folders, visible_files
from jaxft.data.sources.images.records import (
    SUFFIXES,
    UNREADABLE,
    Bad,
    caption_of,
    refuse_bad,
    unreadable,
)
from jaxft.data.sources.texts.json_files import JsonRecords

_LISTS = ("metadata.jsonl", "metadata.csv")  # the names of the imagefolder in Hugging Face datasets
MASK_ENDING = ".mask.png"  # of the mask of a picture, in the place of the picture's own ending
_CAPTION_ENDINGS = (".txt", ".caption")  # the second is kohya's default


@dataclass(frozen=True)
class ImageFiles:
    """One picture a file. `captions` is as long as `paths`."""

    paths: Sequence[Path]
    captions: Sequence[str]

    def __len__(self) -> int:
        return len(self.paths)

    def name(self, index: int, /) -> str:
        return str(self.paths[index])

    def caption(self, index: int, /) -> str:
        return self.captions[index]

    def content(self, index: int, /) -> bytes:
        try:
            return self.paths[index].read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {self.paths[index]}: {error.strerror or error}") from None


def open_folder(spec: str, folder: Path, captions: bool) -> tuple[ImageFiles, list[Bad]]:
    """Return the pictures of a folder, and those left out because their formats are not read.

    The set has the pictures that are named by a list (`_LISTS`) in the folder itself, or else by
    lists in folders below it. Without a list it has every picture, with a caption file beside it.
    Raises UserError for mixed splits and for bad rows or captions.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} ({spec}) is no folder: expected one that holds images")
    files = visible_files(folder)
    lists = [p for p in files if p.name in _LISTS]
    lists = [p for p in lists if p.parent == folder] or lists
    if len({p.parent for p in lists}) < len(lists):
        raise UserError(f"{spec}: {lists[0]} and {lists[1].name} both list pictures: keep one")
    if not lists and (found := next((p for p in files if p.name == "metadata.parquet"), None)):
        raise UserError(f"{found} is not read: write it as metadata.jsonl or metadata.csv")
    pictures = [
        p for p in files if p.suffix.lower() in SUFFIXES and not p.name.endswith(MASK_ENDING)
    ]
    if not lists or lists[0].parent != folder:
        refuse_mixed_folders(spec, folder, lists or pictures)
    if lists:
        return _listed(spec, folder, lists, captions, pictures), []
    if repeats := repeat_folders(folder, pictures):
        print(
            f"{spec}: every picture counts once; the numbers of kohya's folders, such as "
            f"{repeats[0]}, are not applied",
            flush=True,
        )
    texts = {p.with_suffix(p.suffix.lower()): p for p in files}
    return _beside(pictures, texts, captions), [
        unreadable(str(p)) for p in files if p.suffix.lower() in UNREADABLE
    ]


def open_edited(spec: str, folder: Path) -> ImageFiles:
    """Return the pictures before the edit, which the folder's list names as "source"."""
    found = next((folder / name for name in _LISTS if (folder / name).is_file()), None)
    if not spec.startswith("folder:") or found is None:
        raise UserError(
            f"{spec!r} names no source pictures, which an InstructPix2Pix model is trained on: "
            'expected folder:PATH with a metadata.jsonl of "file_name", "text" and "source"'
        )
    return _files(*_read_lists(spec, [found]), folder, False, "source")


def open_masks(spec: str, folder: Path, source: ImageFiles) -> ImageFiles:
    """Return the masks of a folder's pictures: those of a list's "mask", or NAME.mask.png.

    Raises UserError for a picture without one.
    """
    found = next((folder / name for name in _LISTS if (folder / name).is_file()), None)
    if found is not None:
        rows, bad = _read_lists(spec, [found])
        if any("mask" in row.values for row in rows):
            return _files(rows, bad, folder, False, "mask")
    paths = [path.with_name(path.stem + MASK_ENDING) for path in source.paths]
    gone = [
        Bad(str(path), f"{path} has no mask: expected {mask.name} beside it, white where to learn")
        for path, mask in zip(source.paths, paths, strict=True)
        if not mask.is_file()
    ]
    refuse_bad(gone, f"of {len(paths)} images have no mask")
    return ImageFiles(paths, source.captions)


def _listed(
    spec: str, root: Path, lists: list[Path], captions: bool, pictures: Sequence[Path]
) -> ImageFiles:
    rows, bad = _read_lists(spec, lists)
    listed = _files(rows, bad, root, captions, "file_name")
    # Pictures in other columns, such as "source", are named as well.
    cells = ((row.folder, value) for row in rows for value in row.values.values())
    named = {
        os.path.abspath(folder / value)
        for folder, value in cells
        if isinstance(value, str) and value.lower().endswith(SUFFIXES)
    }
    named |= {os.path.abspath(path) for path in listed.paths}
    if unlisted := [p for p in pictures if os.path.abspath(p) not in named]:
        print(
            f"left out {len(unlisted)} images of {spec} that {lists[0].name} does not list, "
            f"first: {unlisted[0]}",
            flush=True,
        )
    return listed


class _Row(NamedTuple):
    """A row of a list, its place for messages, and the folder that its paths start from."""

    where: str
    folder: Path
    values: dict[str, Any]


def _read_lists(spec: str, lists: Sequence[Path]) -> tuple[list[_Row], list[Bad]]:
    """Return all rows, and the lines that are not valid."""
    rows, bad = [], []
    for path in lists:
        if path.suffix == ".csv":
            rows += [_Row(where, path.parent, row) for where, row in _read_csv(spec, path)]
            continue
        lines = JsonRecords(spec, path)
        for index in range(len(lines)):
            try:
                rows.append(_Row(lines.where(index), path.parent, lines[index]))
            except UserError as error:
                bad.append(Bad(lines.where(index), str(error)))
    return rows, bad


def _read_csv(spec: str, path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file)
            for row in reader:
                yield f"{path}:{reader.line_num}", {k: v for k, v in row.items() if k and v}
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: invalid UTF-8 ({error.reason}): save it as UTF-8") from None
    except (OSError, csv.Error) as error:
        raise UserError(f"cannot read {path} ({spec}): {error}") from None


def _files(
    rows: Sequence[_Row], bad: list[Bad], root: Path, captions: bool, key: str
) -> ImageFiles:
    """Return the files under `key` of the rows, in their order, with captions.

    All have to be below `root`, the folder of the set.
    """
    paths, texts = [], []
    for where, folder, row in rows:
        try:
            paths.append(_path(folder, row, where, key))
            if not is_below(root, paths[-1]):
                raise UserError(
                    f"{where}: {paths[-1]} is outside of {root}: expected a picture of the set;"
                    " name the folder that holds both, whose folders may have lists too"
                )
            texts.append(caption_of(row, where, captions))
        except UserError as error:
            bad.append(Bad(where, str(error)))
    refuse_bad(bad, "rows of metadata are bad")
    return ImageFiles(paths, texts)


def _path(folder: Path, row: dict[str, Any], where: str, key: str) -> Path:
    name = row.get(key)
    if not isinstance(name, str) or not name:
        found = ", ".join(map(repr, row)) or "nothing"
        raise UserError(f'{where}: "{key}" is missing: expected the image\'s path, found {found}')
    path = folder / name
    if not os.path.isfile(path) and "\\" in name:  # written on Windows
        path = folder / name.replace("\\", "/")
    if not os.path.isfile(path):  # Path.is_file fails for a name that is too long
        raise UserError(f"{where}: {path} does not exist: expected an image file")
    return path


def _beside(paths: Sequence[Path], files: dict[Path, Path], captions: bool) -> ImageFiles:
    """Return the pictures with their captions.

    `files` are all files of the folder by name, with the ending in lower case.
    """
    texts, bad = [], []
    for path in paths:
        try:
            names = (path.with_suffix(ending) for ending in _CAPTION_ENDINGS)
            beside = next((files[name] for name in names if name in files), None)
            texts.append(_caption_beside(path, beside, captions))
        except UserError as error:
            bad.append(Bad(str(path), str(error)))
    refuse_bad(bad, f"of {len(paths)} images have no caption that can be read")
    return ImageFiles(paths, texts)


def _caption_beside(path: Path, beside: Path | None, captions: bool) -> str:
    if beside is None:
        if captions:
            raise UserError(
                f"{path} has no caption: expected {path.stem}.txt beside it, or metadata.jsonl "
                'with "file_name" and "text" in the folder'
            )
        return ""
    try:
        text = beside.read_bytes().decode().removeprefix("\ufeff").strip()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{beside}: invalid UTF-8 at byte {error.start}: save it as UTF-8"
        ) from None
    if captions and not text:
        raise UserError(f"{beside} is empty: expected the caption of {path.name}")
    return text
