"""Caches of encoded pictures: a name for the encoder, filling, waiting for other hosts."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Params
from jaxft.data.cache import ArrayCache, fill, missing
from jaxft.data.images.dataset import UNDECODABLE, ImageExample, ImageSet, bad_arrays, read_bad
from jaxft.data.sources.image_records import Bad
from jaxft.weights.transfer import to_host

PATIENCE = 600.0  # seconds without an entry of another host, after which none will come
TOLD = 1024  # entries between two lines about a cache that grows
Row = dict[str, np.ndarray]


def collate(
    examples: Sequence[Row], *, batch_rows: int, filler: Row | None = None
) -> dict[str, np.ndarray]:
    """Rows stacked; those missing at the end are the `filler` (the first row) with weight 0.

    A host whose share of a last batch is empty has a filler alone.
    """
    filler = examples[0] if filler is None else filler
    rows = [*examples, *[filler] * (batch_rows - len(examples))]
    batch = {name: np.stack([row[name] for row in rows]) for name in filler}
    batch["weights"][len(examples) :] = 0
    return batch


def fingerprint(params: Params, prefixes: Sequence[str], *more: Any) -> str:
    """A name for what some weights compute: a hash of their bits, and of what else matters."""
    digest = hashlib.sha256(repr(more).encode())
    for path in sorted(path for path in params if path.startswith(tuple(prefixes))):
        host = to_host(params[path])
        digest.update(f"{path}{host.dtype}{host.shape}".encode())
        digest.update(np.ascontiguousarray(host).view(np.uint8).data)
    return digest.hexdigest()[:32]


def store_pictures(
    cache: ArrayCache,
    images: ImageSet,
    encode: Callable[[np.ndarray], Mapping],
    batch: int,
    keep: Callable[[Row], bool] = lambda row: False,
) -> Iterator[tuple[int, int]]:
    """Encode every picture that has no entry yet, and store its time ids too.

    `encode` maps pixels uint8 [batch, Y, X, 3] to arrays by name. The pixels of a picture go to
    `images.kept` where `keep` is true of its arrays. A picture that does not decode gets an entry
    that says so, for other processes and runs, and others are in its place. Yields (done, total).
    """

    def compute(found: list[ImageExample | Bad]) -> list[Row]:
        examples = [one for one in found if isinstance(one, ImageExample)]
        if changed := [one.caption for one in examples if one.key not in known]:
            raise UserError(
                f"a picture of {images.records.spec} changed after the run had opened it (caption"
                f" {changed[0]!r}); start the run again"
            )
        rows = []
        for first in range(0, len(examples), batch):
            some = examples[first : first + batch]
            made = encode(fill_up(np.stack([example.pixels for example in some]), batch))
            rows += [{name: made[name][i] for name in made} for i in range(len(some))]
        if images.kept is not None:
            for row, example in zip(rows, examples, strict=True):
                if keep(row):
                    images.kept.put(example.key, _pixels(example))
            images.kept.flush()
        rows = [
            row | {"time_ids": example.time_ids}
            for row, example in zip(rows, examples, strict=True)
        ]
        left = iter(rows)
        return [bad_arrays(one) if isinstance(one, Bad) else next(left) for one in found]

    host, hosts = jax.process_index(), jax.process_count()
    keys, copies = images.keys, len(images) // len(images.records)
    known = set(keys)
    yield from fill(
        cache, images.attempts, keys, compute, batch,
        bucket_of=images.bucket_of, copies=copies, host=host, hosts=hosts,
    )  # fmt: skip
    wait_for_others(cache, keys)
    bad = [
        i for i, key in enumerate(keys[: len(images.records)]) if UNDECODABLE in cache.names(key)
    ]
    images.leave_out({i: read_bad(images.records.name(i), cache.get(keys[i])) for i in bad})


def keep_pixels(store: ArrayCache, images: ImageSet, ids: Sequence[int] | np.ndarray) -> None:
    """Serve the pixels of some examples from a cache, which is filled with those that it lacks."""
    keys = [images.key(int(i)) for i in ids]

    def read(places: list[int]) -> list[ImageExample | Bad]:
        return images.attempts(int(ids[place]) for place in places)

    def compute(found: list[ImageExample | Bad]) -> list[Row]:
        return [bad_arrays(one) if isinstance(one, Bad) else _pixels(one) for one in found]

    host, hosts = jax.process_index(), jax.process_count()
    for _ in fill(store, read, keys, compute, batch_size=16, host=host, hosts=hosts):
        pass
    wait_for_others(store, keys)
    images.kept = store


def _pixels(example: ImageExample) -> Row:
    return {"pixels": example.pixels, "time_ids": example.time_ids}


def wait_for_others(cache: ArrayCache, keys: Sequence[str]) -> None:
    """Wait until the shares of all hosts are there, by polling: a collective would time out."""
    left, since = len(keys) + 1, time.monotonic()
    while jax.process_count() > 1 and (lacking := len(missing(cache, keys))):
        if lacking < left:
            left, since = lacking, time.monotonic()
        elif time.monotonic() - since > PATIENCE:
            raise UserError(
                f"{cache.folder} got nothing from the other hosts for {PATIENCE / 60:.0f} minutes:"
                f" {lacking} entries are missing; choose a cache on a disk that all hosts share"
            )
        time.sleep(1.0)
        cache.refresh()


def fill_up(rows: np.ndarray, count: int) -> np.ndarray:
    """Return `count` rows, which one compiled function takes; the first is repeated."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def tell(what: str, made: Iterator[tuple[int, int]]) -> None:
    """Print one line when a cache grew, and one after each TOLD entries."""
    done = total = 0
    for done, total in made:
        if done % TOLD == 0:
            print(f"caching {what}: {done} of {total}", flush=True)
    if total:
        print(f"cached {what} of {done}", flush=True)
