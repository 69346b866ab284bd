"""Rows to train a diffusion model on: pictures or their cached moments, captions or embeddings."""

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind, describe
from jaxft.core.sharding import one_device_mesh
from jaxft.core.step import cast
from jaxft.data.cache import ArrayCache, example_keys, fill, missing
from jaxft.data.images.buckets import Size
from jaxft.data.images.dataset import ImageSet, to_float
from jaxft.weights.transfer import to_host

PATIENCE = 600.0  # seconds without an entry of another host, after which none will come
TOLD = 1024  # pictures or captions between two lines about a cache that grows
Row = dict[str, np.ndarray]


class Share(NamedTuple):
    """A set of pictures in a mixture: how often it is repeated, and the weight of its loss."""

    images: ImageSet
    repeats: int = 1
    weight: float = 1.0


class Stores(NamedTuple):
    """What was computed once: moments by picture, embeddings by ids; None is not cached."""

    moments: ArrayCache | None = None
    texts: ArrayCache | None = None


class Rows:
    """A mixture of picture sets as rows of arrays; indexing is safe in threads.

    `tokenize` turns a caption into ids (E, T), for where its embedding is not stored. bucket_of
    int32 [rows] is each row's index into `sizes`.
    """

    def __init__(self, shares: Sequence[Share], tokenize: Callable[[str], np.ndarray]):
        self.shares, self.tokenize = tuple(shares), tokenize
        self.stores, self._keys = Stores(), ()
        self.sizes: tuple[Size, ...] = tuple(
            sorted({size for share in shares for size in share.images.sizes})
        )
        places, buckets = [], []
        for number, (images, repeats, _) in enumerate(shares):
            own = np.array([self.sizes.index(size) for size in images.sizes], np.int32)
            one = np.stack([np.full(len(images), number), np.arange(len(images))], axis=1)
            places += [one] * repeats
            buckets += [own[images.bucket_of]] * repeats
        self.places, self.bucket_of = np.concatenate(places), np.concatenate(buckets)

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return " + ".join(repr(share.images) for share in self.shares)

    def use(self, stores: Stores) -> None:
        """Serve rows from what was stored; all of it has to be there."""
        keys = [example_keys(share.images) if stores.moments else () for share in self.shares]
        self.stores, self._keys = stores, tuple(keys)

    def caption(self, index: int) -> str:
        share, place = self.places[index]
        return self.shares[share].images.captions[int(place)]

    def __getitem__(self, index: int) -> Row:
        share, place = map(int, self.places[index])
        row: Row = {"weights": np.float32(self.shares[share].weight)}  # type: ignore[dict-item]
        if self.stores.moments is None:
            example = self.shares[share].images[place]
            row |= {"pixels": example.pixels, "time_ids": example.time_ids}
            row |= {} if example.source is None else {"source": example.source}
        else:
            row |= self.stores.moments.get(self._keys[share][place])
        caption = self.shares[share].images.captions[place]
        if self.stores.texts is None:
            return row | {"ids": self.tokenize(caption)}
        return row | self.stores.texts.get(ids_key(self.tokenize(caption)))


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


class Encoders:
    """VAE and text encoders on this process's first device, to fill caches without collectives.

    `template` is a `StableDiffusion`; `params` may lie anywhere.
    """

    def __init__(self, template: Any, dtype: Any, params: Params):
        self.template, self.dtype, self.mesh = template, dtype, one_device_mesh()
        device = self.mesh.devices.flat[0]
        self.params = {
            path: jax.device_put(to_host(x), device)
            for path, x in params.items()
            if path.startswith(("vae.", "text_encoder"))
        }
        leaves = describe(template)
        self.rest = {path: leaf.shape for path, leaf in leaves.items() if path not in self.params}

    def moments(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 pictures to fp32 mean and logvar."""
        with jax.set_mesh(self.mesh):
            made = self._moments(self.params, pixels)
        return {"mean": np.asarray(made.mean), "logvar": np.asarray(made.logvar)}

    def texts(self, ids: np.ndarray) -> dict[str, np.ndarray]:
        """Ids (B, E, T) to embeddings."""
        with jax.set_mesh(self.mesh):
            made = self._texts(self.params, ids)
        pairs = {"context": made.context, "pooled": made.pooled}
        return {name: np.asarray(x) for name, x in pairs.items() if x is not None}

    def _bound(self, params: Params) -> Any:
        """The whole model; what is not used of it costs nothing."""
        unused = {path: jnp.zeros(shape, self.dtype) for path, shape in self.rest.items()}
        return bind(self.template, {**unused, **cast(params, self.dtype)})

    @partial(jax.jit, static_argnums=0)
    def _moments(self, params: Params, pixels: Any) -> Any:
        return self._bound(params).vae.encode(to_float(pixels).astype(self.dtype))

    @partial(jax.jit, static_argnums=0)
    def _texts(self, params: Params, ids: Any) -> Any:
        return self._bound(params).encode_text(ids, dtype=self.dtype)


def ids_key(ids: np.ndarray) -> str:
    """What determines an embedding beside the weights, whichever tokenizer made the ids."""
    return hashlib.sha256(ids.tobytes()).hexdigest()


def fingerprint(params: Params, prefixes: Sequence[str], *more: Any) -> str:
    """A name for what some weights compute: a hash of their bits, and of what else matters."""
    digest = hashlib.sha256(repr(more).encode())
    for path in sorted(path for path in params if path.startswith(tuple(prefixes))):
        host = to_host(params[path])
        digest.update(f"{path}{host.dtype}{host.shape}".encode())
        digest.update(np.ascontiguousarray(host).view(np.uint8).data)
    return digest.hexdigest()[:32]


def store_moments(
    cache: ArrayCache, images: ImageSet, encode: Callable[[np.ndarray], Mapping], batch: int
) -> Iterator[tuple[int, int]]:
    """Moments of every picture that has none yet: fp32 mean and logvar, and its time ids."""

    def compute(examples: list[Any]) -> list[Row]:
        pixels = np.stack([example.pixels for example in examples])
        made = encode(_filled(pixels, batch))
        return [
            {name: made[name][i] for name in made} | {"time_ids": example.time_ids}
            for i, example in enumerate(examples)
        ]

    keys, buckets = example_keys(images), images.bucket_of
    host, hosts = jax.process_index(), jax.process_count()
    yield from fill(cache, images, keys, compute, batch, bucket_of=buckets, host=host, hosts=hosts)
    _wait_for_others(cache, keys)


def store_texts(
    cache: ArrayCache,
    captions: Sequence[str],
    tokenize: Callable[[str], np.ndarray],
    encode: Callable[[np.ndarray], Mapping],
    batch: int,
) -> Iterator[tuple[int, int]]:
    """Embeddings of every caption that has none yet."""

    def compute(chosen: list[np.ndarray]) -> list[Row]:
        made = encode(_filled(np.stack(chosen), batch))
        return [{name: made[name][i] for name in made} for i in range(len(chosen))]

    ids = [tokenize(caption) for caption in sorted(set(captions))]
    keys = [ids_key(one) for one in ids]
    host, hosts = jax.process_index(), jax.process_count()
    yield from fill(cache, ids, keys, compute, batch, host=host, hosts=hosts)
    _wait_for_others(cache, keys)


def _wait_for_others(cache: ArrayCache, keys: Sequence[str]) -> None:
    """Until the shares of all hosts are there: by looking, as a collective would time out."""
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


def _filled(rows: np.ndarray, count: int) -> np.ndarray:
    """As many rows as one compiled function takes."""
    return np.concatenate([rows, np.repeat(rows[:1], count - len(rows), axis=0)])


def tell(what: str, made: Iterator[tuple[int, int]]) -> None:
    """One line when a cache grew."""
    done = total = 0
    for done, total in made:
        if done % TOLD == 0:
            print(f"caching {what}: {done} of {total}", flush=True)
    if total:
        print(f"cached {what} of {done}", flush=True)
