"""Rows to train a diffusion model on: pictures or their cached moments, captions or embeddings."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.data.cache import ArrayCache
from jaxft.data.images.buckets import BucketBatches, Size, bucket_loader
from jaxft.data.images.dataset import ImageSet
from jaxft.data.loader import subset
from jaxft.data.sources.image_records import Bad
from jaxft.data.sources.images import open_images
from jaxft.models.pipelines.stable_diffusion import SOURCE
from jaxft.tasks.common.encoded import Row, collate
from jaxft.tasks.diffusion import inversion
from jaxft.tasks.diffusion.opened import OpenedPipeline


class Share(NamedTuple):
    """A set of pictures in a mixture, its repeats, and the weight of its loss."""

    images: ImageSet
    repeats: int = 1
    weight: float = 1.0


class Stores(NamedTuple):
    """Caches of moments by picture and of embeddings by ids; None is not cached."""

    moments: ArrayCache | None = None
    texts: ArrayCache | None = None


class PictureRows:
    """A mixture of picture sets as rows of arrays; `jaxft.tasks.Rows`.

    Indexing is safe in threads. bucket_of int32 [rows] is each row's index into `sizes`, and `cut`
    counts the captions that are cut. shown: the rows whose pictures an evaluation shows.
    """

    def __init__(
        self, opened: OpenedPipeline, shares: Sequence[Share], name: str, shown: Sequence[int] = ()
    ):
        self.opened, self.shares, self.name = opened, tuple(shares), name
        self.shown = tuple(shown)
        self.stores, self._keys = Stores(), ()
        self.sizes: tuple[Size, ...] = tuple(
            sorted({size for share in self.shares for size in share.images.sizes})
        )
        places, buckets = [], []
        for number, (images, repeats, _) in enumerate(self.shares):
            own = np.array([self.sizes.index(size) for size in images.sizes], np.int32)
            one = np.stack([np.full(len(images), number), np.arange(len(images))], axis=1)
            places += [one] * repeats
            buckets += [own[images.bucket_of]] * repeats
        self.places, self.bucket_of = np.concatenate(places), np.concatenate(buckets)
        self.cut = sum(opened.captions.too_long(texts_of(share)) for share in self.shares)

    def __len__(self) -> int:
        return len(self.places)

    def __repr__(self) -> str:
        return " + ".join(repr(share.images) for share in self.shares)

    @property
    def bad(self) -> tuple[Bad, ...]:
        return tuple(bad for share in self.shares for bad in share.images.bad)

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        cfg = self.opened.cfg
        plan = BucketBatches(self.bucket_of, cfg.batch_size, cfg.seed)
        return bucket_loader(self, plan, start_step=start_step, collate_fn=collate, rows=rows)

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        count = rows.stop - rows.start
        for size in self.sizes:
            one = {**self._shapes(size), "sample_ids": ((), np.int32)}
            yield {k: jax.ShapeDtypeStruct((count, *shape), d) for k, (shape, d) in one.items()}

    def _shapes(self, size: Size) -> dict[str, tuple[tuple[int, ...], Any]]:
        """Return shape and dtype of each array of a row, of pictures of `size`."""
        cfg, ids = self.opened.model_cfg, self.opened.captions("")
        made: dict[str, tuple[tuple[int, ...], Any]] = {
            "weights": ((), np.float32),
            "time_ids": ((6,), np.float32),
        }
        if self.stores.moments is None:
            names = ("pixels", "source") if cfg.sees == SOURCE else ("pixels",)
            made |= dict.fromkeys(names, ((*size, 3), np.uint8))
        else:
            latent = (*(side // cfg.vae.factor for side in size), cfg.vae.latent_channels)
            made |= dict.fromkeys(("mean", "logvar"), (latent, np.float32))
        if self.stores.texts is None:
            return {**made, "ids": (ids.shape, np.int32)}
        text = self.opened.text_shapes()
        pairs = {"context": text.context, "pooled": text.pooled}
        return made | {k: (x.shape[1:], x.dtype) for k, x in pairs.items() if x is not None}

    def report(self) -> dict[str, Any]:
        total: dict[str, int] = {}
        for share in self.shares:
            for name, count in share.images.report.items():
                total[name] = total.get(name, 0) + count
        return {**total, "truncated_captions": self.cut}

    def describe(self) -> str:
        captions, batch = self.opened.captions, self.opened.cfg.batch_size
        report, counts = self.report(), np.bincount(self.bucket_of)
        sizes, small = ", ".join(f"{h}x{w}" for h, w in self.sizes), report["smaller_than_target"]
        notes = [
            f"; bucket {h}x{w} has {n} images, fewer than batch_size={batch}: repeated"
            for (h, w), n in zip(self.sizes, counts, strict=True)
            if n < batch <= len(self)
        ]
        if self.cut:
            notes.append(f"; {self.cut} captions longer than {captions.length} tokens, cut")
        if captions.new:
            notes.append(f"; learning {', '.join(captions.new)}")
        enlarged = f", {small} enlarged" if small else ""
        return (
            f"{self.name}: {report['images']} images at {sizes}"
            f" ({report['cropped']} cropped{enlarged})" + "".join(notes)
        )

    def use(self, stores: Stores) -> None:
        """Serve rows from caches, which have to hold all of them."""
        keys = [share.images.keys if stores.moments else () for share in self.shares]
        self.stores, self._keys = stores, tuple(keys)

    def caption(self, index: int) -> str:
        share, place = self.places[index]
        return self.shares[share].images.caption(int(place))

    def __getitem__(self, index: int) -> Row:
        share, place = map(int, self.places[index])
        images = self.shares[share].images
        row: Row = {"weights": np.float32(self.shares[share].weight)}  # type: ignore[dict-item]
        if self.stores.moments is None:
            example = images[place]
            row |= {"pixels": example.pixels, "time_ids": example.time_ids}
            row |= {} if example.source is None else {"source": example.source}
        else:
            row |= self.stores.moments.get(self._keys[share][images.place(place)])
        caption = images.caption(place)  # after the picture, which may be another one's
        if self.stores.texts is None:
            return row | {"ids": self.opened.captions(caption)}
        return row | self.stores.texts.get(ids_key(self.opened.captions(caption)))


def ids_key(ids: np.ndarray) -> str:
    """Return the cache key of an embedding: a hash of its token ids."""
    return hashlib.sha256(ids.tobytes()).hexdigest()


def read_rows(opened: OpenedPipeline, spec: str, training: bool) -> PictureRows:
    """Open the pictures of a set; training ones with mirrored ones, buckets and prior pictures."""
    if not training:
        images, count = _read(opened, spec), opened.options.eval_generated
        shown = subset(images, count, opened.cfg.seed).ids.tolist() if count else ()
        return PictureRows(opened, [Share(images)], spec, shown)
    rows = PictureRows(opened, _shares(opened, spec), spec)
    if opened.captions.new:
        inversion.check_captions(opened.captions, texts_of(rows.shares[0]), spec)
    return rows


def texts_of(share: Share) -> list[str]:
    """Return the caption of every picture, once."""
    return [share.images.records.caption(i) for i in range(len(share.images.records))]


def _shares(opened: OpenedPipeline, spec: str) -> list[Share]:
    """Return the training pictures, repeated where the prior has more, and the prior's."""
    options = opened.options
    own = _read(opened, spec, options.buckets, options.flip)
    if not options.prior.data:
        return [Share(own)]
    prior = _read(opened, options.prior.data, options.buckets, options.flip)
    repeats = max(1, round(len(prior) / len(own)))
    return [Share(own, repeats), Share(prior, 1, options.prior.weight)]


def _read(opened: OpenedPipeline, spec: str, buckets: bool = False, flip: bool = False) -> ImageSet:
    cfg = opened.model_cfg
    records = open_images(spec, edited=cfg.sees == SOURCE)
    return ImageSet(records, opened.options.resolution, cfg.multiple, buckets, flip)
