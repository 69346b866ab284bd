"""Webdataset tars: files with the same name up to the first dot are one sample."""

import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from jaxft.core.errors import UserError
from jaxft.data.sources.files import find_files, refuse_mixed_files, visible_member
from jaxft.data.sources.images.records import (
    SUFFIXES,
    UNREADABLE,
    Bad,
    caption_of,
    refuse_bad,
    unreadable,
)

_Group = dict[str, tarfile.TarInfo]  # members of a sample by ending


class _Member(NamedTuple):
    """A picture in a tar: (first byte, size) of picture and caption. No caption has the name ""."""

    tar: Path
    name: str
    image: tuple[int, int]
    caption_name: str
    caption: tuple[int, int]


@dataclass(frozen=True)
class Tars:
    """Members of webdataset tars, read by offset without unpacking."""

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
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: the caption is unreadable ({error})") from None
        if not isinstance(record, dict):
            raise UserError(f'{where}: expected a JSON object such as {{"caption": "..."}}')
        return caption_of(record, where, self.captions)

    def content(self, index: int, /) -> bytes:
        member = self.members[index]
        return _read_span(member.tar, *member.image)


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


def open_tars(spec: str, pattern: str, captions: bool) -> tuple[Tars, list[Bad]]:
    """Return the pictures of a tar, of a folder of tars or of a glob, and those left out.

    Raises UserError that names all samples without a caption, with two pictures, or with two
    members of one name.
    """
    base, paths = find_files(pattern, (".tar",))
    if not paths:
        raise UserError(f"no file matches {pattern} ({spec}): expected tars such as shard-*.tar")
    refuse_mixed_files(spec, base, paths)
    members: list[_Member] = []
    left_out: list[Bad] = []
    bad: list[Bad] = []
    for path in paths:
        groups, twice = _index_tar(path)
        bad += twice
        for group in groups:
            try:
                found = _member(path, group, captions)
            except UserError as error:
                bad.append(Bad(str(path), str(error)))
                continue
            if isinstance(found, _Member):
                members.append(found)
            elif found:
                left_out.append(found)
    refuse_bad(bad, "samples are bad")
    return Tars(members, captions), left_out


def _index_tar(path: Path) -> tuple[list[_Group], list[Bad]]:
    """Return the samples of a tar, by path up to the file's first dot, and repeated members."""
    groups: dict[str, _Group] = {}
    twice = []
    try:
        with tarfile.open(path, "r:") as tar:
            for info in tar:
                folder, slash, file = info.name.rpartition("/")
                stem, _, suffix = file.partition(".")
                if not info.isreg() or not stem or not visible_member(info.name):
                    continue
                group = groups.setdefault(f"{folder}{slash}{stem}", {})
                if suffix.lower() in group:
                    error = "two members have this name: give every sample a name of its own"
                    twice.append(Bad(f"{path}:{info.name}", f"{path}:{info.name}: {error}"))
                group[suffix.lower()] = info
            end = tar.offset
        # A damaged header ends the loop like the end of the tar, but that is a block of zeros.
        if any(_read_span(path, end, min(tarfile.BLOCKSIZE, path.stat().st_size - end))):
            raise tarfile.ReadError(f"no member and no end at byte {end}")
    except (OSError, tarfile.TarError) as error:
        raise UserError(
            f"cannot read {path} as an uncompressed tar: {error}: expected whole files; make or "
            "fetch it again"
        ) from None
    return list(groups.values()), twice


def _member(path: Path, group: _Group, captions: bool) -> _Member | Bad | None:
    """Return the picture of a group with its caption, or the Bad of a format that is not read.

    Returns None for a group without a picture.
    """
    images = sorted((s.count("."), s) for s in group if f".{s}".endswith(SUFFIXES))
    if not images:
        foreign = [info.name for s, info in group.items() if f".{s}".endswith(UNREADABLE)]
        return unreadable(f"{path}:{foreign[0]}") if foreign else None
    image = group[images[0][1]]
    # The fewest dots decide: "a.png" is the picture beside "a.mask.png". Two equals are an error.
    if len(images) > 1 and images[0][0] == images[1][0]:
        raise UserError(
            f"{path}:{image.name} and {group[images[1][1]].name} are two pictures of one sample: "
            "expected one, or names that differ before the first dot"
        )
    text = next((group[s] for s in ("txt", "caption", "json") if s in group), None)
    if text is None and captions:
        raise UserError(
            f"{path}:{image.name} has no caption: expected a .txt or .json member of its name"
        )
    span = (text.offset_data, text.size) if text else (0, 0)
    name = text.name if text else ""
    return _Member(path, image.name, (image.offset_data, image.size), name, span)
