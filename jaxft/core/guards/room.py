"""Room on the disk of a run: refused before a run, and before a save, where it does not suffice."""

import errno
import shutil
from pathlib import Path
from typing import Any

_FULL = (errno.ENOSPC, errno.EDQUOT)
_WORDS = ("No space left on device", "Disk quota exceeded")  # in the errors of C++ libraries


def is_full(error: BaseException) -> bool:
    """Return True for an error of a full disk, also for that of a library in C++."""
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(word in str(error) for word in _WORDS)


def nbytes(tree: Any) -> int:
    """Return the bytes of all arrays, or shapes, of a tree."""
    import jax  # not needed by the commands that import this module

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def lack_of_room(folder: Path, needed: int) -> str:
    """Return "needs … GB, … GB are free in FOLDER" if `needed` bytes have no room, else ""."""
    free = shutil.disk_usage(folder).free
    if free >= needed:
        return ""
    return f"needs {needed / 1e9:.3g} GB, {free / 1e9:.3g} GB are free in {folder}"
