"""Figures of a run, read from its files, and how they differ from stored ones."""

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  gives NumPy bfloat16
import numpy as np
from PIL import Image
from safetensors import safe_open

from jaxft.runs.folders.outputs import MARK
from jaxft.runs.pages.card import CARD
from jaxft.tasks import NOW
from jaxft.tasks.common.pictures import CELL, grid

ROOT = Path(__file__).resolve().parent.parent
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-6, 1e-4  # relative, on another kind of machine


def losses(file: Path) -> list[str]:
    """Return the loss of each step in a metrics.jsonl, every bit of it."""
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return [float(record["loss"]).hex() for record in records if "loss" in record]


def folder_figures(out: Path, folder: Path) -> dict[str, Any]:
    """Return figures of each file below `out`; paths of this machine do not count in texts.

    The card of an export is left out, as it names versions and measures.
    """
    figures: dict[str, Any] = {}
    files = (path for path in out.rglob("*") if path.is_file())
    for file in sorted(path for path in files if path.name not in (MARK, CARD)):
        name = file.relative_to(out).as_posix()
        if file.suffix == ".safetensors":
            figures[name] = tensor_figures(file)
        else:
            content = file.read_bytes()
            for place, word in ((folder, b"FOLDER"), (_demo(), b"DEMO")):
                content = content.replace(str(place).encode(), word)
            figures[name] = {"sha256": hashlib.sha256(content).hexdigest()}
    return figures


def _demo() -> Path:
    """Return the folder of the demo models, wherever it lies in the package."""
    (file,) = ROOT.rglob("emoji-sd/model_index.json")
    return file.parent.parent


def tensor_figures(file: Path) -> dict[str, Any]:
    """Return count, norm, and a checksum of names, dtypes, shapes and bytes, of all tensors."""
    digest, squares = hashlib.sha256(), []
    with safe_open(file, "np") as tensors:
        names = sorted(tensors.keys())
        for name in names:
            stored, array = tensors.get_slice(name), tensors.get_tensor(name)
            about = json.dumps([name, stored.get_dtype(), stored.get_shape()])
            digest.update(about.encode() + array.tobytes())
            squares.append(float(np.square(array.astype(np.float64)).sum()))
    norm = math.sqrt(math.fsum(squares))
    return {"tensors": len(names), "norm": norm.hex(), "sha256": digest.hexdigest()}


def sample_figures(folder: Path) -> dict[str, Any]:
    """Return figures of the pictures that `sample` wrote, and of those on the sheets of a run.

    A sheet is laid out as sheets were when the figures were stored, with the column of the model
    alone, so that its layout may change. The pictures come from the record of the sheet.
    """
    drawn = (file for file in folder.glob("*.png") if not file.with_suffix(".json").exists())
    figures = {file.name: _picture_figures(_pixels(file)) for file in drawn}
    for file in folder.glob("*.json"):
        record = json.loads(file.read_text())
        columns, captions = record.get("columns", {}), record.get("captions", ())
        if NOW in columns:
            columns = {"": columns[NOW]}
        elif "reconstruction" in columns:
            pairs = (re.fullmatch(r"(.*) \((.*)\)", caption, re.DOTALL) for caption in captions)
            captions = [f"{pair[2]} {pair[1]}" for pair in pairs if pair]
        else:
            continue  # a sheet of before
        pictures = [[_pixels(_decoded(x)) for x in column] for column in columns.values()]
        sheet = grid(list(zip(*pictures, strict=True)), captions, list(filter(None, columns)), CELL)
        figures[file.with_suffix(".png").name] = _picture_figures(sheet)
    return dict(sorted(figures.items()))


def _decoded(uri: str) -> io.BytesIO:
    head, _, data = uri.partition(",")
    assert head == "data:image/png;base64", "a record of small pictures is lossless"
    return io.BytesIO(base64.b64decode(data))


def _pixels(file: Any) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"))


def _picture_figures(pixels: np.ndarray) -> dict[str, Any]:
    """Return the shape and a checksum of pixels."""
    checksum = hashlib.sha256(pixels.tobytes()).hexdigest()
    return {"shape": list(pixels.shape), "sha256": checksum}


def differences(stored: Any, made: Any, exact: bool, where: str = "") -> list[str]:
    """Return a line for each figure that differs; a missing or new one always does.

    exact: compare every bit. Otherwise losses and norms have their tolerance, and checksums and
    texts are not compared.
    """
    if isinstance(stored, Mapping) and isinstance(made, Mapping):
        lines = [f"{where}: missing {key}" for key in sorted(stored.keys() - made.keys())]
        lines += [f"{where}: new {key}" for key in sorted(made.keys() - stored.keys())]
        pairs = [(f"{where}/{key}", stored[key], made[key]) for key in stored if key in made]
    elif isinstance(stored, list) and isinstance(made, list) and len(stored) == len(made):
        lines = []
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(stored, made, strict=True))]
    else:
        return [] if stored == made else _leaf_difference(stored, made, exact, where)
    return lines + [line for at, a, b in pairs for line in differences(a, b, exact, at)]


def _leaf_difference(stored: Any, made: Any, exact: bool, where: str) -> list[str]:
    name = where.rpartition("/")[2].partition("[")[0]
    tolerance = {"losses": LOSS_TOLERANCE, "norm": NORM_TOLERANCE}.get(name)
    if tolerance and isinstance(stored, str) and isinstance(made, str):
        old, new = float.fromhex(stored), float.fromhex(made)
        relative = abs(new - old) / abs(old) if old else math.inf
        if not exact and relative <= tolerance:
            return []
        return [f"{where}: stored {old:.9g}, made {new:.9g}, relative {relative:.1e}"]
    if name in ("sha256", "printed") and not exact:
        return []
    return [f"{where}: stored {stored!r}, made {made!r}"]
