"""Sets of the Hugging Face hub: one split of them as table files, whole or its first rows."""

import os
import re
import tempfile
from pathlib import Path
from typing import Any

from huggingface_hub import cached_assets_path

from jaxft.core.errors import UserError

FORM = "hf:OWNER/NAME, hf:OWNER/NAME:SPLIT, hf:OWNER/NAME:SUBSET/SPLIT[:ROWS]@REVISION"
_NAME = re.compile(
    r"(?P<name>[\w.-]+/[\w.-]+)"
    r"(:((?P<subset>[^/\[\]@:]+)/)?(?P<split>[\w.-]+)(\[:(?P<rows>[1-9]\d*)\])?)?"
    r"(@(?P<revision>[\w./-]+))?"
)


def download(spec: str, name: str) -> list[Path]:
    """Return the table files of a split of a set on the hub, "train" if none is named.

    `train[:1000]` reads the first 1000 rows as a stream, and nothing after them is downloaded. They
    are kept beside the hub's own cache, and every later run reads the same rows from there. Raises
    UserError for another form of `name`, without the package datasets, and for a set that the hub
    does not give.
    """
    found = _NAME.fullmatch(name)
    if found is None:
        raise UserError(
            f"no table at {name} ({spec}): expected .parquet or .arrow files, or a set of the"
            f" Hugging Face hub in one of the forms {FORM}"
        )
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"no table at {name} ({spec}), and a set of the Hugging Face hub needs the package"
            ' datasets: pip install "jaxft[data]"'
        ) from None
    split, rows = found["split"] or "train", int(found["rows"] or 0)
    wanted: dict[str, Any] = {
        "path": found["name"],
        "name": found["subset"],
        "split": split,
        "revision": found["revision"],
    }
    try:
        if found["rows"]:
            return [_first_rows(datasets, wanted, rows)]
        files = datasets.load_dataset(**wanted).cache_files
    except Exception as error:  # the errors of datasets and of the hub share no base class
        reason = next(iter(str(error).strip().splitlines()), "no reason given")
        raise UserError(
            f"no table at {name} ({spec}), and the Hugging Face hub did not give it:"
            f" {type(error).__name__}: {reason}; give a folder, or one of the forms {FORM}"
        ) from error
    return [Path(file["filename"]) for file in files]


def _first_rows(datasets: Any, wanted: dict[str, Any], rows: int) -> Path:
    """Return a Parquet file with the first rows of a split, which is streamed if it is missing."""
    parts = (wanted["name"] or "default", wanted["split"], wanted["revision"] or "main", str(rows))
    folder = cached_assets_path("jaxft", wanted["path"], "first-rows")
    file = folder / f"{re.sub(r'[^A-Za-z0-9._-]+', '-', '--'.join(map(str, parts)))}.parquet"
    if not file.exists():
        stream = datasets.load_dataset(**wanted, streaming=True).take(rows)
        number, made = tempfile.mkstemp(suffix=".partial", dir=folder)
        os.close(number)
        stream.to_parquet(made)
        os.replace(made, file)
    return file
