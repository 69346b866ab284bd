"""Bytes of text files, mapped into memory. A compressed file is expanded to a temporary one."""

import gzip
import mmap
import shutil
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from jaxft.core.errors import UserError

Contents = mmap.mmap | bytes

_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
_BOM = b"\xef\xbb\xbf"
# First bytes of files that hold no UTF-8 text, and what to do with them.
_FOREIGN = {
    b"PAR1": "is a Parquet file: give {path} without a scheme, or hf:{path}",
    b"ARROW1": "is an Arrow file: give {path} without a scheme, or hf:{path}",
    b"\xff\xfe": "is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"\xfe\xff": "is UTF-16: save it as UTF-8 (iconv -f UTF-16 -t UTF-8)",
    b"PK\x03\x04": "is a zip archive or an Excel workbook: unpack it, or export it as .csv",
}


def open_contents(spec: str, path: Path) -> Contents:
    """Map the bytes of a file. Files that start as gzip or zstd do are expanded first.

    An expanded file lies in the folder of temporary files, without a name, until it is closed.
    Raises UserError for a file that cannot be read or expanded, or holds no UTF-8 text.
    """
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
            file.seek(0)
            if magic[:2] != _GZIP and magic != _ZSTD:
                data = _mapped(file)
            else:
                with tempfile.TemporaryFile() as expanded:
                    shutil.copyfileobj(_expand(spec, file, magic), expanded, 1 << 20)
                    expanded.flush()
                    data = _mapped(expanded)
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot read {path} ({spec}): {reason}") from None
    for start, advice in _FOREIGN.items():
        if data[: len(start)] == start:
            raise UserError(f"{path} ({spec}) {advice.format(path=path)}")
    return data


def _expand(spec: str, file: IO[bytes], magic: bytes) -> Any:
    if magic != _ZSTD:
        return gzip.open(file)
    try:
        import pyarrow
    except ImportError:
        raise UserError(
            f'{spec!r} is compressed with zstd, which needs pyarrow: pip install "jaxft[data]"'
        ) from None
    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file), "zstd")


def _mapped(file: IO[bytes]) -> Contents:
    empty = file.seek(0, 2) == 0  # an empty file cannot be mapped
    return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def text_start(data: Contents) -> int:
    """Return the place of the first byte after a byte order mark, which is not content."""
    return len(_BOM) if data[: len(_BOM)] == _BOM else 0


def decoded(data: Contents, span: Sequence[int] | np.ndarray, where: str) -> str:
    """Return the bytes [start, stop) as text. Raises UserError with `where` for invalid UTF-8."""
    start, stop = map(int, span)
    try:
        return data[start:stop].decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: invalid UTF-8 at byte {start + error.start} of the file: save it as UTF-8"
        ) from None
