"""Caches of encoded pictures: a name for the encoder, filling, waiting for other hosts."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxft.core.cli.live import progress, status
from jaxft.core.errors import UserError
from jaxft.core.params import Params
from jaxft.data.cache import ArrayCache, fill, missing
from jaxft.data.images.dataset import UNDECODABLE, ImageExample, ImageSet, bad_arrays, read_bad
from jaxft.data.images.masks import loss_mask, mask_key
from jaxft.data.sources.images.records import Bad
from jaxft.weights.transfer import to_host

PATIENCE = 600.0  # seconds without a new entry of another host, after which the wait fails
TOLD = 1024  # entries between two lines of progress
Row = dict[str, np.ndarray]


def collate(
    examples: Sequence[Row], *, batch_rows: int, filler: Row | None = None
) -> dict[str, np.ndarray]:
    """Stack rows into a batch of `batch_rows` rows.

    Missing rows at the end are copies of `filler` (the first row by default) with weight 0. A host
    without examples in the last batch passes no examples and a filler.
    """
    filler = examples[0] if filler is None else filler
    rows = [*examples, *[filler] * (batch_rows - len(examples))]
    batch = {name: np.stack([row[name] for row in rows]) for name in filler}
    batch["weights"][len(examples) :] = 0
    return batch


def fingerprint(params: Params, prefixes: Sequence[str], *more: Any) -> str:
    """Return a name for the function that some weights compute.

    The name is a hash of the bits of the parameters under `prefixes`, and of `more`.
    """
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
    """Encode every picture without a cache entry, and store the arrays with its time ids.

    `encode` maps pixels uint8 [batch, Y, X, 3] to arrays by name. The pixels of a picture go to
    `images.kept` if `keep` is true of its arrays. A picture that does not decode gets an entry that
    records this for other processes and runs, and another picture takes its place. Yields (done,
    total). Raises UserError if a picture changed after the run had opened it.
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


def ids_key(ids: np.ndarray) -> str:
    """Return the cache key of an embedding: a hash of its token ids."""
    return hashlib.sha256(ids.tobytes()).hexdigest()


def store_texts(
    cache: ArrayCache,
    captions: Sequence[str],
    tokenize: Callable[[str], np.ndarray],
    encode: Callable[[np.ndarray], Mapping],
    batch: int,
) -> Iterator[tuple[int, int]]:
    """Embed every caption without a cache entry, and store it. Yields (done, total)."""

    def compute(chosen: list[np.ndarray]) -> list[Row]:
        made = encode(fill_up(np.stack(chosen), batch))
        return [{name: made[name][i] for name in made} for i in range(len(chosen))]

    def read(places: list[int]) -> list[np.ndarray]:
        return [ids[place] for place in places]

    ids = [tokenize(caption) for caption in sorted(set(captions))]
    keys = [ids_key(one) for one in ids]
    host, hosts = jax.process_index(), jax.process_count()
    yield from fill(cache, read, keys, compute, batch, host=host, hosts=hosts)
    wait_for_others(cache, keys)


def store_masks(cache: ArrayCache, images: ImageSet, factor: int) -> tuple[str, ...]:
    """Store the weights of the latents of every example. Returns the keys of all examples.

    Pictures that do not decode are passed over. factor: the side of a latent in pixels.
    """
    keys = tuple(mask_key(images, i, factor) for i in range(len(images)))
    good = [i for i in range(len(images)) if images.place(i) == i]

    def read(places: list[int]) -> list[np.ndarray]:
        return [loss_mask(images, good[place], factor) for place in places]

    def compute(found: list[np.ndarray]) -> list[Row]:
        return [{"loss_mask": one} for one in found]

    host, hosts, wanted = jax.process_index(), jax.process_count(), [keys[i] for i in good]
    for _ in fill(cache, read, wanted, compute, batch_size=16, host=host, hosts=hosts):
        pass
    wait_for_others(cache, wanted)
    return keys


def keep_pixels(store: ArrayCache, images: ImageSet, ids: Sequence[int] | np.ndarray) -> None:
    """Serve the pixels of some examples from a cache, after the missing ones are added to it."""
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
    """Wait until the cache holds the shares of all hosts.

    Raises UserError after PATIENCE seconds without a new entry. The wait polls, because a
    collective would time out.
    """
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
    """Return `rows` filled up to `count` rows with copies of the first one.

    A fixed number of rows needs only one compilation.
    """
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def tell(what: str, made: Iterator[tuple[int, int]]) -> None:
    """Run `made` to its end. Prints a line after each TOLD entries, and one if the cache grew."""
    done = total = 0
    for done, total in made:
        if done % TOLD == 0:
            progress(f"caching {what}: {done} of {total}")
    status("")
    if total:
        print(f"cached {what} of {done}", flush=True)
