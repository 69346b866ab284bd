"""Lock of a run folder: one training at a time, on this host or on another."""

import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError

LOCK = ".run.lock"  # holds its owner: host, process, start and a counter that moves
BEAT = 5.0  # seconds between two changes of the counter
OWNER_PATIENCE = 20.0  # seconds after which an owner on another host counts as gone
# Errors of file systems that have no locks. There only the counter tells.
_WITHOUT = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. A process that is killed gives it back by that.

    The kernel's lock tells on one host. Network disks may not pass it on, so that the owner also
    counts in the file: a counter of another host that stands still belongs to a process that ended.
    Raises: UserError that names the owner.
    """
    path = folder / LOCK
    descriptor = _take(path)
    try:
        _wait_for_others(path)
        done = threading.Event()
        about = {"host": socket.gethostname(), "process": os.getpid(), "since": _now()}
        _write(descriptor, {**about, "beat": 0})
        beats = threading.Thread(target=_beat, args=(descriptor, about, done), daemon=True)
        beats.start()
        try:
            yield
        finally:
            done.set()
            beats.join()
            with suppress(FileNotFoundError):  # the folder may be gone
                path.unlink()
    finally:
        os.close(descriptor)


def _take(path: Path) -> int:
    """Return the open file, with the kernel's lock on it. The file is not one of a former owner."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in _WITHOUT:
                os.close(descriptor)
                raise _in_use(path, _read(path)) from None
        with suppress(FileNotFoundError):
            if os.fstat(descriptor).st_ino == path.stat().st_ino:
                return descriptor
        os.close(descriptor)  # the owner deleted it between the two calls


def _wait_for_others(path: Path) -> None:
    """Return when the owner that a file names has ended. Raises UserError if its counter moves."""
    owner = _read(path)
    if owner.get("host") in (None, socket.gethostname()):
        return  # the kernel's lock of this host is free
    until = time.monotonic() + OWNER_PATIENCE
    print(
        f"waiting {OWNER_PATIENCE:g} s for {_name(owner)}, which may hold {path.parent}", flush=True
    )
    while time.monotonic() < until:
        time.sleep(BEAT / 10)
        if _read(path) != owner:
            raise _in_use(path, owner)


def _beat(descriptor: int, about: dict[str, Any], done: threading.Event) -> None:
    beat = 0
    while not done.wait(BEAT):
        beat += 1
        with suppress(OSError):  # a full disk ends no run here
            _write(descriptor, {**about, "beat": beat})


def _write(descriptor: int, owner: dict[str, Any]) -> None:
    text = (json.dumps(owner) + "\n").encode()
    os.pwrite(descriptor, text, 0)
    os.ftruncate(descriptor, len(text))


def _read(path: Path) -> dict[str, Any]:
    try:
        owner = json.loads(path.read_text())
    except (OSError, ValueError):  # new, or read while it was written
        return {}
    return owner if isinstance(owner, dict) else {}


def _now() -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S")


def _name(owner: dict[str, Any]) -> str:
    process, host = owner.get("process", "another process"), owner.get("host", "this host")
    return f"process {process} on {host}, started {owner.get('since', 'at an unknown time')}"


def _in_use(path: Path, owner: dict[str, Any]) -> UserError:
    return UserError(
        f"workdir {path.parent} is in use by {_name(owner)}; wait until it ends, or choose another"
        " --workdir"
    )
