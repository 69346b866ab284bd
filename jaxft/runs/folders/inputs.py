"""Inputs of a run: fingerprints of the files that it reads, compared before it goes on."""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxft.core.config import flatten_config
from jaxft.core.errors import UserError
from jaxft.data.sources.files import find_files, visible_files
from jaxft.runs.folders.outputs import PATH_KEYS

INPUTS = "inputs.json"  # in a run folder
MODEL_KEYS = ("model", "tokenizer")  # those that a finished run reads too
_RUN_KEYS = tuple(key for key in PATH_KEYS if key != "cache")
_PACKAGED = ("pip", "demo", "tfds")  # schemes whose files belong to a package or a version
READ_WHOLE = 2**20  # bytes of a file that is read whole
PIECES, PIECE = 16, 2**16  # pieces that are read of a longer one, and their bytes
MOST_FILES = 1000  # files of one key that are read. Of more, names and sizes are compared


def record_inputs(workdir: Path, config: Mapping[str, Any]) -> None:
    """Write the fingerprints of a run's inputs into its folder."""
    record = {}
    for key, files in _files(workdir, config, _RUN_KEYS):
        step = -(-len(files) // MOST_FILES)
        record[key] = {
            "listing": _listing(files),
            "suffixes": sorted({path.suffix for path in files.values()}),
            "files": {name: _digest(path) for name, path in list(files.items())[::step]},
        }
    (workdir / INPUTS).write_text(json.dumps(record, indent=1) + "\n")


def check_inputs(workdir: Path, config: Mapping[str, Any], keys: Iterable[str] = _RUN_KEYS) -> None:
    """Raise UserError for an input that is not as `record_inputs` found it.

    Runs of earlier versions have no record, and hub ids and packages have no files in it. New files
    beside the recorded ones count if they have a suffix of these.
    """
    file = workdir / INPUTS
    if not file.is_file():
        return
    record = json.loads(file.read_text())
    for key, files in _files(workdir, config, keys):
        if key not in record:
            continue
        former = record[key]
        changed = [
            name
            for name, digest in former["files"].items()
            if name not in files or _digest(files[name]) != digest
        ]
        alike = {name: p for name, p in files.items() if p.suffix in former["suffixes"]}
        if changed or _listing(alike) != former["listing"]:
            what = f"{changed[0]} is" if changed else "other files are there, or other sizes,"
            raise UserError(
                f"{key}: {what} not as when the run in {workdir} began; put the former files back,"
                f" start in another --workdir, or delete {file} to go on with the new ones"
            )


def _files(
    workdir: Path, config: Mapping[str, Any], keys: Iterable[str]
) -> Iterator[tuple[str, dict[str, Path]]]:
    """Yield each key with the files of its value, by name, without hidden ones and the run's."""
    leaves, run = flatten_config(config), workdir.resolve()
    for key in keys:
        found: dict[str, Path] = {}
        for piece in re.split(r"\s\+\s", str(leaves.get(key) or "")):
            piece = re.sub(r"^\s*[\d.]+\*", "", piece.strip())  # without its weight
            scheme, colon, place = piece.partition(":")
            place = place if colon else piece
            if not place or scheme in _PACKAGED:
                continue
            path = Path(place).expanduser()
            files = visible_files(path) if path.is_dir() else find_files(str(path), ())[1]
            found |= {str(one): one for one in files if not one.resolve().is_relative_to(run)}
        if found:
            yield key, found


def _listing(files: Mapping[str, Path]) -> str:
    sizes = [f"{name} {path.stat().st_size}" for name, path in sorted(files.items())]
    return hashlib.sha256("\n".join(sizes).encode()).hexdigest()


def _digest(path: Path) -> str:
    """Return a SHA-256 of a file's size and contents, of a long file of some pieces alone."""
    size = path.stat().st_size
    made = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        if size <= READ_WHOLE:
            made.update(file.read())
        else:
            for number in range(PIECES):
                file.seek((size - PIECE) * number // (PIECES - 1))
                made.update(file.read(PIECE))
    return made.hexdigest()
