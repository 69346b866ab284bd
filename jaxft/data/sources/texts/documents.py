"""Text files, each of which is one record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.sources.files import ending, find_files, find_texts, refuse_mixed_folders
from jaxft.data.sources.texts.contents import decoded, open_contents, text_start

_TABLES = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow")


class TextFiles:
    """Records of text files: {"text": whole file} for each file, with newlines unchanged."""

    def __init__(self, spec: str, paths: Sequence[Path]):
        self._spec, self._paths = spec, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        data = open_contents(self._spec, self._paths[index])
        return {"text": decoded(data, (text_start(data), len(data)), self.where(index))}

    def __repr__(self) -> str:
        return f"TextFiles({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return str(self._paths[index])


def open_text_files(spec: str, pattern: str) -> TextFiles:
    """Open one text file, every visible .txt file below a folder, or the files of a glob.

    Raises UserError for a missing or empty set, and for one file with the ending of a table, whose
    raw characters would be trained.
    """
    path = Path(pattern).expanduser()
    paths = find_texts(pattern, (".txt",))
    if not paths and path.is_dir():
        raise UserError(f"{path} ({spec}) holds no .txt file: expected at least one")
    if not paths:
        raise UserError(f"no file matches {path} ({spec}): expected a file, folder or glob")
    if path.is_file() and ending(path) in _TABLES:
        raise UserError(
            f"{spec!r} would train on the raw characters of a table: give {path} without a scheme,"
            " or rename it to .txt"
        )
    refuse_mixed_folders(spec, find_files(pattern, ())[0], paths)
    if not any(p.stat().st_size for p in paths):
        raise UserError(f"{spec} is empty: every file it names has 0 bytes")
    return TextFiles(spec, paths)
