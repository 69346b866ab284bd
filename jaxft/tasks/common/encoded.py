"""Caches of encoded pictures: a name for the encoder, filling, waiting for other hosts."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Params
from jaxft.data.cache import ArrayCache, example_keys, fill, missing
from jaxft.data.images.dataset import ImageSet
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
    cache: ArrayCache, images: ImageSet, encode: Callable[[np.ndarray], Mapping], batch: int
) -> Iterator[tuple[int, int]]:
    """Encode every picture that has no entry yet, and store its time ids too.

    `encode` maps pixels uint8 [batch, Y, X, 3] to arrays by name. Yields (done, total).
    """

    def compute(examples: list[Any]) -> list[Row]:
        pixels = np.stack([example.pixels for example in examples])
        made = encode(fill_up(pixels, batch))
        return [
            {name: made[name][i] for name in made} | {"time_ids": example.time_ids}
            for i, example in enumerate(examples)
        ]

    keys, buckets = example_keys(images), images.bucket_of
    host, hosts = jax.process_index(), jax.process_count()
    yield from fill(cache, images, keys, compute, batch, bucket_of=buckets, host=host, hosts=hosts)
    wait_for_others(cache, keys)


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
