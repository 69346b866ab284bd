"""Samples of a run on disk: sheets as PNG, and each sheet or table as a record for the report."""

import base64
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from jaxft.tasks import NOW, Sheet
from jaxft.tasks.common.pictures import CELL, grid

BEFORE_COLUMN = "before"
THUMB = 256  # largest side of a picture in a record, in pixels
LOSSLESS = 128  # up to this side a picture in a record is a PNG, else a JPEG
_FILE = re.compile(r"(?P<name>.+)-(?P<step>\d{6,})\.json")


class Samples:
    """Writer of `samples/` of a run. It adds what the model made before step 0 to every sheet."""

    def __init__(self, workdir: Path):
        self.folder = workdir / "samples"
        self._before: dict[str, np.ndarray] = {}

    def write_sheet(self, step: int, name: str, sheet: Sheet) -> UInt8[np.ndarray, "H W 3"]:
        """Write NAME-STEP.png and its record. Return the picture: the columns under one caption.

        The pictures of step 0 are kept in a file, so that a resumed run has them too.
        """
        columns = dict(sheet.columns)
        if NOW in columns:
            kept = self._first(step, name, columns[NOW])
            made = columns.items()
            if step == 0:
                columns = {BEFORE_COLUMN if one == NOW else one: x for one, x in made}
            elif kept is not None:
                at = list(columns).index(NOW)
                pairs = list(made)
                columns = dict([*pairs[:at], (BEFORE_COLUMN, kept), *pairs[at:]])
        rows = [[x[i] for x in columns.values()] for i in range(len(sheet.captions))]
        picture = grid(rows, sheet.captions, list(columns), CELL)
        self.write_picture(step, name, picture)
        shown = {one: [thumbnail(x) for x in pictures] for one, pictures in columns.items()}
        self._write(step, name, {"captions": list(sheet.captions), "columns": shown})
        return picture

    def write_picture(self, step: int, name: str, picture: UInt8[np.ndarray, "H W 3"]) -> None:
        self.folder.mkdir(exist_ok=True)
        Image.fromarray(picture).save(self.path(step, name))

    def write_rows(
        self, step: int, name: str, headers: Sequence[str], rows: Sequence[Sequence[str]]
    ) -> None:
        """Write a table of texts as NAME-STEP.json."""
        self._write(step, name, {"headers": list(headers), "rows": [list(row) for row in rows]})

    def path(self, step: int, name: str) -> Path:
        return self.folder / f"{name}-{step:06}.png"

    def _first(self, step: int, name: str, made: np.ndarray) -> np.ndarray | None:
        """Return the pictures of step 0, or None where they are lost or were of other prompts."""
        file = self.folder / f"before-{name}.npz"
        if step == 0:
            self._before[name] = made
            self.folder.mkdir(exist_ok=True)
            temporary = file.with_name(f".{file.name}")
            np.savez_compressed(temporary, made=made)
            os.replace(temporary, file)
        elif name not in self._before and file.exists():
            try:
                self._before[name] = np.load(file)["made"]
            except (OSError, ValueError, KeyError):
                return None
        kept = self._before.get(name)
        return kept if kept is not None and kept.shape == made.shape else None

    def _write(self, step: int, name: str, record: dict[str, Any]) -> None:
        self.folder.mkdir(exist_ok=True)
        file = self.path(step, name).with_suffix(".json")
        replace_text(file, json.dumps({"step": step, **record}, ensure_ascii=False) + "\n")


class SampleFile(NamedTuple):
    """A sheet or a table on disk: its name, its step and its file."""

    name: str
    step: int
    file: Path


def kept_samples(workdir: Path) -> Iterator[SampleFile]:
    """Yield the records in `samples/` of a run in the order of their steps."""
    found = ((_FILE.fullmatch(file.name), file) for file in (workdir / "samples").glob("*.json"))
    kept = [SampleFile(match["name"], int(match["step"]), file) for match, file in found if match]
    yield from sorted(kept, key=lambda one: (one.step, one.name))


def thumbnail(picture: UInt8[np.ndarray, "Y X 3"]) -> str:
    """Return a picture as a data URI, at most THUMB pixels a side."""
    image = Image.fromarray(np.asarray(picture))
    image.thumbnail((THUMB, THUMB))
    kind = "PNG" if max(image.size) <= LOSSLESS else "JPEG"
    file = io.BytesIO()
    image.save(file, kind, quality=88)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def replace_text(file: Path, text: str) -> None:
    """Write a text file under a temporary name, and rename it."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, file)
