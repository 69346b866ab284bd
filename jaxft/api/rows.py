"""The examples of a Python program, written to files of a run folder once.

The run reads these files as any other data, so the same command or call resumes it, and its folder
tells what it was trained on.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from filecmp import cmp
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.runs.folders.workdir import ROWS

IMAGE_KEY = "image"  # the key of a row that holds its picture
LIST_FILE = "metadata.jsonl"


def write_rows(
    rows: Iterable[Mapping[str, Any]], workdir: Path, name: str, images: bool, begun: bool
) -> str:
    """Write rows to the folder of a run, and return their place as a value of `data.train`.

    begun: the run has started, so the rows must be equal to those in its folder. Raises UserError
    for others, for no rows, and for a row that cannot be written.
    """
    if isinstance(rows, str | Path | Mapping):
        raise UserError(
            f"the rows for {name} are a {type(rows).__name__}; give a list of dicts, or a file by"
            f' keys={{"data.{name}": PATH}}'
        )
    place = workdir / ROWS / (name if images else f"{name}.jsonl")
    aside = place.with_name(f".{place.name}.tmp")
    _remove(aside)
    aside.parent.mkdir(parents=True, exist_ok=True)
    if images:
        aside.mkdir()
        lines = _with_pictures(rows, aside, name)
    else:
        lines = (_line(row, f"{name} row {i}") for i, row in enumerate(rows))
    file = aside / LIST_FILE if images else aside
    with file.open("w", encoding="utf-8") as opened:
        opened.writelines(lines)
    if not file.stat().st_size:
        raise UserError(f"the rows for {name} are empty; give at least one dict")
    if begun and not _equal(aside, place):
        _remove(aside)
        raise UserError(
            f"the rows for {name} differ from those in {place}, with which the run began; give the"
            " same rows to resume it, or another workdir"
        )
    _remove(place)
    aside.rename(place)
    return f"{'folder' if images else 'jsonl'}:{place}"


def _with_pictures(rows: Iterable[Mapping[str, Any]], folder: Path, name: str) -> Iterator[str]:
    """Write each picture of the rows to the folder, and yield the lines of its list."""
    for index, row in enumerate(rows):
        where = f"{name} row {index}"
        if IMAGE_KEY not in row:
            found = ", ".join(map(repr, row)) or "nothing"
            raise UserError(
                f'{where}: "{IMAGE_KEY}" is missing: expected a picture (PIL, or uint8'
                f" [Y, X, 3]) or the path of one, found {found}"
            )
        cells = {key: _cell(value, folder / f"{index:07}-{key}", where, key == IMAGE_KEY)
                 for key, value in row.items()}  # fmt: skip
        yield _line({"file_name": cells.pop(IMAGE_KEY), **cells}, where)


def _cell(value: Any, place: Path, where: str, picture: bool) -> Any:
    """Return the value of a list's cell. A picture is written to a file, whose name it is."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint8 and value.shape[2:] in ((), (3,)):
        value = Image.fromarray(value)
    if isinstance(value, Image.Image):
        place = place.with_suffix(".png")
        value.save(place)
        return place.name
    if not picture:
        return value
    source = Path(value).expanduser() if isinstance(value, str | Path) else None
    if source is None or not source.is_file():
        raise UserError(
            f'{where}: "{IMAGE_KEY}" is {_short(value)}: expected a picture (PIL, or uint8'
            " [Y, X, 3]) or the path of one"
        )
    return shutil.copyfile(source, place.with_suffix(source.suffix)).name


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype} {list(value.shape)}"
    return repr(value)


def _line(row: Mapping[str, Any], where: str) -> str:
    try:
        return json.dumps(dict(row), ensure_ascii=False) + "\n"
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{where} is no dict of texts, numbers and lists ({error}); convert it first"
        ) from None


def _equal(a: Path, b: Path) -> bool:
    """Return True for equal files, or folders of equal files."""
    if not a.is_dir() or not b.is_dir():
        return a.is_file() and b.is_file() and cmp(a, b, shallow=False)
    names = sorted(path.name for path in a.iterdir())
    same = names == sorted(path.name for path in b.iterdir())
    return same and all(cmp(a / name, b / name, shallow=False) for name in names)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
