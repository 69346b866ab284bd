"""Cache of a frozen encoder's outputs: computed once an example, kept on disk by content."""

import fcntl
import hashlib
import json
import mmap
import os
import re
import threading
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from jaxft.core.errors import UserError
from jaxft.data.loader import read_ahead

Arrays = dict[str, np.ndarray]
ArrayLayout = tuple[tuple[str, str, tuple[int, ...]], ...]  # name, dtype and shape of each array

CACHE_SHARD_BYTES = 256 << 20


class _Entry(NamedTuple):
    shard: int
    offset: int
    checksum: int
    layout: ArrayLayout


@dataclass
class _Shard:
    """One data file and its index, of which `end` and `indexed` bytes are known."""

    data: Path
    indexed: int = 0
    end: int = 0
    view: mmap.mmap | None = None

    @property
    def index(self) -> Path:
        return self.data.with_suffix(".jsonl")


@dataclass
class _Writer:
    """The shard to which this process appends, locked against every other process."""

    shard: int
    data: BinaryIO
    index: BinaryIO
    pending: list[bytes] = field(default_factory=list)


class ArrayCache:
    """An append-only store of small arrays by key, below FOLDER/<namespace>-<hash>/.

    namespace: everything besides the key on which the arrays depend (weights' hash, dtype, …).
    Caches of different namespaces share no entries, so that no entry is ever stale. Each process
    appends to its own shards, named after its `host`, and reads the shards of all processes.
    An entry counts once its index line is complete, which is written after its data. Half-written
    data of a killed process are ignored, and the next writer removes them. Reads are
    memory-mapped, and only the index is in memory. Safe in threads.
    """

    def __init__(self, folder: str | Path, namespace: str, host: int = 0):
        digest = hashlib.sha256(namespace.encode()).hexdigest()[:16]
        slug = re.sub(r"[^A-Za-z0-9.-]+", "_", namespace)[:40].strip("._-")
        self.folder = Path(folder).expanduser() / f"{slug or 'cache'}-{digest}"
        self._host, self._lock = host, threading.RLock()
        self._entries: dict[str, _Entry] = {}
        self._layouts: dict[ArrayLayout, ArrayLayout] = {}
        self._shards: list[_Shard] = []
        self._writer: _Writer | None = None
        with self._disk_errors():
            self.folder.mkdir(parents=True, exist_ok=True)
        self.refresh()

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: str) -> bool:
        return key in self._entries

    def __repr__(self) -> str:
        return f"ArrayCache({str(self.folder)!r}, {len(self)} entries)"

    def get(self, key: str) -> Arrays:
        """Return copies of the arrays of `key`, bit for bit.

        Raises KeyError for an absent key, and UserError if the data on disk no longer match their
        checksum.
        """
        entry = self._entries[key]
        shard = self._shards[entry.shard]
        size = sum(_n_bytes(dtype, shape) for _, dtype, shape in entry.layout)
        stop = entry.offset + size
        data = self._mapped(shard, stop)[entry.offset : stop] if size else b""
        if zlib.crc32(data) != entry.checksum:
            raise UserError(f"{shard.data} is damaged at byte {entry.offset}: delete the file")
        arrays, start = {}, 0
        for name, dtype, shape in entry.layout:
            stop = start + _n_bytes(dtype, shape)
            values = np.frombuffer(bytearray(data[start:stop]), _dtype(dtype))
            arrays[name], start = values.reshape(shape), stop
        return arrays

    def names(self, key: str) -> tuple[str, ...]:
        """Return the names of a key's arrays without reading them. Raises KeyError if absent."""
        return tuple(name for name, _, _ in self._entries[key].layout)

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Append the arrays of a new key. An existing key is not changed.

        This process can read them at once. After `flush` other processes can, also after a crash.
        Raises UserError for NaN and inf, which would otherwise spoil every later run.
        """
        for name, values in arrays.items():
            if values.dtype.kind not in "biu" and not np.isfinite(values).all():
                raise UserError(
                    f"{name!r} of {key} is not finite and is not cached: compute it in float32, "
                    "or look at the example"
                )
        layout = tuple((name, a.dtype.name, a.shape) for name, a in arrays.items())
        data = b"".join(a.tobytes() for a in arrays.values())
        with self._lock, self._disk_errors():
            if key not in self._entries:
                self._append(key, layout, data)

    def flush(self) -> None:
        """Make new entries durable: first the data, then the index lines that make them count."""
        with self._lock, self._disk_errors():
            writer = self._writer
            if writer is None or not writer.pending:
                return
            writer.data.flush()
            os.fsync(writer.data.fileno())
            lines = b"".join(writer.pending)
            writer.index.write(lines)
            writer.index.flush()
            os.fsync(writer.index.fileno())
            self._shards[writer.shard].indexed += len(lines)
            writer.pending.clear()

    def refresh(self) -> None:
        """Read the entries that other processes have added since."""
        with self._lock, self._disk_errors():
            known = {shard.index: shard for shard in self._shards}
            for path in sorted(self.folder.glob("host-*.jsonl")):
                if path not in known:
                    self._shards.append(_Shard(path.with_suffix(".bin")))
            for number, shard in enumerate(self._shards):
                if self._writer is None or self._writer.shard != number:
                    self._read_index(number, shard)

    def _read_index(self, number: int, shard: _Shard) -> None:
        """Add the entries of complete lines with complete data. Stop at the first other line."""
        try:
            size = shard.data.stat().st_size
            with open(shard.index, "rb") as file:
                file.seek(shard.indexed)
                lines = file.read().splitlines(keepends=True)
        except FileNotFoundError:  # another process is about to create it
            return
        for line in lines:
            parsed = _parse(line)
            if parsed is None or parsed[1] + parsed[2] > size:
                return
            key, offset, n_bytes, checksum, layout = parsed
            layout = self._layouts.setdefault(layout, layout)
            self._entries.setdefault(key, _Entry(number, offset, checksum, layout))
            shard.indexed += len(line)
            shard.end = max(shard.end, offset + n_bytes)

    def _append(self, key: str, layout: ArrayLayout, data: bytes) -> None:
        writer = self._writer
        if writer is None or self._shards[writer.shard].end + len(data) > CACHE_SHARD_BYTES:
            self.close()
            writer = self._writer = self._open_writer(len(data))
        shard = self._shards[writer.shard]
        entry = _Entry(writer.shard, shard.end, zlib.crc32(data), layout)
        writer.data.write(data)
        line = {"key": key, "offset": shard.end, "crc32": entry.checksum, "arrays": layout}
        writer.pending.append(json.dumps(line).encode() + b"\n")
        shard.end += len(data)
        self._entries[key] = entry._replace(layout=self._layouts.setdefault(layout, layout))

    def _open_writer(self, n_bytes: int) -> _Writer:
        """Lock this host's first shard with room, and cut off half-written data in it."""
        known = {shard.data: number for number, shard in enumerate(self._shards)}
        count = 0
        while True:
            path = self.folder / f"host-{self._host:05d}-{count:05d}.bin"
            count += 1
            end = self._shards[known[path]].end if path in known else 0
            if end and end + n_bytes > CACHE_SHARD_BYTES:
                continue
            data = open(path, "ab")  # noqa: SIM115 - the writer keeps it
            if not _locked(data):
                data.close()
                continue
            if path not in known:
                known[path] = len(self._shards)
                self._shards.append(_Shard(path))
            shard = self._shards[known[path]]
            self._read_index(known[path], shard)
            index = open(shard.index, "ab")  # noqa: SIM115 - the writer keeps it
            data.truncate(shard.end)
            index.truncate(shard.indexed)
            return _Writer(known[path], data, index)

    def close(self) -> None:
        """Flush, and release the shard, so that another process can append to it."""
        with self._lock:
            self.flush()
            if self._writer is not None:
                self._writer.data.close()
                self._writer.index.close()
                self._writer = None

    @contextmanager
    def _disk_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"cannot use the cache {self.folder}: {error.strerror or error}: free some space, "
                "or choose another folder"
            ) from error

    def _mapped(self, shard: _Shard, stop: int) -> mmap.mmap:
        with self._lock:
            if shard.view is None or len(shard.view) < stop:
                if self._writer is not None:
                    self._writer.data.flush()
                with open(shard.data, "rb") as file:
                    shard.view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            return shard.view


def _locked(file: BinaryIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: each host still has its own files
        return True
    return True


def _parse(line: bytes) -> tuple[str, int, int, int, ArrayLayout] | None:
    """Return key, offset, bytes, checksum and layout of an index line, or None if it is torn."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
        layout = tuple((name, dtype, tuple(shape)) for name, dtype, shape in row["arrays"])
        n_bytes = sum(_n_bytes(dtype, shape) for _, dtype, shape in layout)
        return row["key"], row["offset"], n_bytes, row["crc32"], layout
    except (ValueError, KeyError, TypeError):
        return None


def _dtype(name: str) -> np.dtype:
    return np.dtype(getattr(ml_dtypes, name, name))


def _n_bytes(dtype: str, shape: Sequence[int]) -> int:
    return int(np.prod(shape, dtype=np.int64)) * _dtype(dtype).itemsize


def missing(cache: ArrayCache, keys: Sequence[str], host: int = 0, hosts: int = 1) -> list[int]:
    """Return this host's share of the examples that the cache lacks, with equal keys once.

    A share depends on indices alone, so that hosts need not agree on the entries that exist.
    """
    first: dict[str, int] = {}
    for index in range(host, len(keys), hosts):
        if keys[index] not in cache:
            first.setdefault(keys[index], index)
    return list(first.values())


def fill(
    cache: ArrayCache,
    read: Callable[[list[int]], list[Any]],
    keys: Sequence[str],
    compute: Callable[[list[Any]], Sequence[Mapping[str, np.ndarray]]],
    batch_size: int,
    *,
    bucket_of: np.ndarray | None = None,
    copies: int = 1,
    host: int = 0,
    hosts: int = 1,
    threads: int = 2,
) -> Iterator[tuple[int, int]]:
    """Compute and store missing entries. Yields (examples done, examples to do) after each batch.

    read: returns the examples of some indices, in threads ahead of `compute`. compute: returns
    the arrays of each example. Both get up to `batch_size` examples of one bucket.
    copies: of n keys, indices that are equal modulo n / copies are copies of one sample. A batch
    then has all missing copies of up to `batch_size` samples.

    Every batch is durable before the next, so a stopped run continues from its last batch. No host
    waits here for others. Their entries are read by `refresh` once they are done.
    """
    todo = missing(cache, keys, host, hosts)
    if bucket_of is None:
        bucket_of = np.zeros(len(keys), np.int32)
    groups = _one_size(todo, bucket_of, batch_size, len(keys) // copies)
    done = 0
    if not groups:
        return
    for group, examples in zip(groups, read_ahead(_Groups(read, groups), threads), strict=True):
        for index, arrays in zip(group, compute(examples), strict=True):
            cache.put(keys[index], arrays)
        cache.flush()
        done += len(group)
        yield done, len(todo)


@dataclass(frozen=True)
class _Groups:
    """Random access to the examples of each group, for `read_ahead`."""

    read: Callable[[list[int]], list[Any]]
    groups: list[list[int]]

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> list[Any]:
        return self.read(self.groups[index])


def _one_size(
    indices: list[int], bucket_of: np.ndarray, batch_size: int, samples: int
) -> list[list[int]]:
    """Return groups of indices of one bucket: up to `batch_size` samples, copies side by side."""
    by_bucket: dict[int, dict[int, list[int]]] = {}
    for index in indices:
        of_bucket = by_bucket.setdefault(int(bucket_of[index]), {})
        of_bucket.setdefault(index % samples, []).append(index)
    groups = []
    for of_bucket in by_bucket.values():
        copies = list(of_bucket.values())
        for start in range(0, len(copies), batch_size):
            groups.append([index for one in copies[start : start + batch_size] for index in one])
    return groups
