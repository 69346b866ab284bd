"""Text files, each of which is one record."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.data.sources.files import find_files, refuse_mixed_folders


class TextFiles:
    """Records of text files: {"text": whole file} for each file, with newlines unchanged."""

    def __init__(self, spec: str, paths: Sequence[Path]):
        self._spec, self._paths = spec, paths

    def __len__(self) -> int:
        return len(self._paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        path = self._paths[index]
        try:
            return {"text": path.read_bytes().decode().removeprefix("\ufeff")}
        except OSError as error:
            raise UserError(
                f"cannot read {path} ({self._spec}): {error.strerror or error}"
            ) from None
        except UnicodeDecodeError as error:
            raise UserError(
                f"{path}: invalid UTF-8 at byte {error.start}: save the file as UTF-8"
            ) from None

    def __repr__(self) -> str:
        return f"TextFiles({self._spec!r}, {len(self)} records)"

    def where(self, index: int) -> str:
        return str(self._paths[index])


def open_text_files(spec: str, pattern: str) -> TextFiles:
    """Open one text file, every visible .txt file below a folder, or the files of a glob."""
    path = Path(pattern).expanduser()
    base, paths = find_files(pattern, (".txt",))
    if not paths and path.is_dir():
        raise UserError(f"{path} ({spec}) holds no .txt file: expected at least one")
    if not paths:
        raise UserError(f"no file matches {path} ({spec}): expected a file, folder or glob")
    refuse_mixed_folders(spec, base, paths)
    if not any(p.stat().st_size for p in paths):
        raise UserError(f"{spec} is empty: every file it names has 0 bytes")
    return TextFiles(spec, paths)
