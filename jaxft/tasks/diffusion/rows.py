"""Training rows of a diffusion model, and the frozen encoders that fill their caches."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind_some, describe, select
from jaxft.core.sharding import one_device_mesh
from jaxft.data.cache import ArrayCache
from jaxft.data.images.buckets import BucketBatches, Size, bucket_loader
from jaxft.data.images.dataset import ImageSet
from jaxft.data.images.masks import loss_mask
from jaxft.data.loader import subset
from jaxft.data.sources.images.records import Bad
from jaxft.data.sources.schemes import open_images
from jaxft.models.pipelines.stable_diffusion import NOTHING, SOURCE, PipelineConfig, Text
from jaxft.nn.pixels import to_float
from jaxft.tasks import Planned
from jaxft.tasks.common.encoded import (
    Row,
    collate,
    fingerprint,
    ids_key,
    keep_pixels,
    store_masks,
    store_pictures,
    store_texts,
    tell,
)
from jaxft.tasks.diffusion import inversion
from jaxft.tasks.diffusion.opened import OpenedPipeline
from jaxft.weights.transfer import to_host

ENCODED_TOGETHER = 16  # pictures or captions in one call of an encoder
# Beginnings of the paths of what caches replace in a step, and of what only pictures need.
PICTURE_ENCODER = ("vae.encoder.", "vae.quant_conv.")
PICTURE_DECODER = ("vae.decoder.", "vae.post_quant_conv.")
TEXT_ENCODER = ("text_encoder",)


class Share(NamedTuple):
    """A set of pictures in a mixture, its repeats, and the weight of its loss."""

    images: ImageSet
    repeats: int = 1
    weight: float = 1.0


class Stores(NamedTuple):
    """Caches of moments by picture, embeddings by ids, the null's and masks, None if not cached."""

    moments: ArrayCache | None = None
    texts: ArrayCache | None = None
    nulls: ArrayCache | None = None
    masks: ArrayCache | None = None


class PictureRows:
    """A mixture of picture sets as rows of arrays. Implements `jaxft.tasks.Rows`.

    Indexing is safe in threads. bucket_of: int32 [rows], indices of rows into `sizes`. cut: the
    number of captions that are cut. shown: the rows whose pictures an evaluation shows.
    """

    def __init__(
        self, opened: OpenedPipeline, shares: Sequence[Share], name: str, shown: Sequence[int] = ()
    ):
        self.opened, self.shares, self.name = opened, tuple(shares), name
        self.shown = tuple(shown)
        self.stores, self._keys, self._masks = Stores(), (), []
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

    @property
    def empty_ids(self) -> np.ndarray:
        """Token ids of the empty caption, int32 [E, T]."""
        return self.opened.captions("")

    @property
    def empty_text(self) -> Text | None:
        """The embedding [1, T, D] of the empty caption, None where it is not cached."""
        if self.stores.nulls is None:
            return None
        made = self.stores.nulls.get(ids_key(self.empty_ids))
        return Text(**{"pooled": None, **{name: x[None] for name, x in made.items()}})

    def text(self, caption: str) -> Row:
        """Return the cached embedding of a caption or of a prompt of the config, or its ids."""
        ids = self.opened.captions(caption)
        return {"ids": ids} if self.stores.texts is None else self.stores.texts.get(ids_key(ids))

    @property
    def unread(self) -> tuple[str, ...]:
        """Beginnings of the paths of parameters that no step reads, as in `tasks.Objective`."""
        return unread(self.stores.moments is not None, self.stores.texts is not None)

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
        moments, texts = self.stores.moments is not None, self.stores.texts is not None
        for size in self.sizes:
            yield batch_shapes(self.opened, count, size, moments, texts)

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
        """Serve rows from caches. The caches must hold all rows."""
        keys = [share.images.keys if stores.moments else () for share in self.shares]
        self.stores, self._keys = stores, tuple(keys)
        if stores.masks is not None:
            factor = self.opened.model_cfg.vae.factor
            self._masks = [
                store_masks(stores.masks, images, factor)
                if images.records.masks is not None
                else ()
                for images, _, _ in self.shares
            ]

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
        if self.opened.options.mask:
            row["loss_mask"] = self._mask(share, place)
        return row | self.text(images.caption(place))  # last, as the picture may be replaced

    def _mask(self, share: int, place: int) -> np.ndarray:
        """Return the weights of an example's latents, 1 for pictures of a prior."""
        images, factor = self.shares[share].images, self.opened.model_cfg.vae.factor
        if images.records.masks is None:
            h, w = images.how(place)[0]
            return np.ones((h // factor, w // factor, 1), np.float32)
        if self.stores.masks is None:
            return loss_mask(images, place, factor)
        return self.stores.masks.get(self._masks[share][images.place(place)])["loss_mask"]


def batch_shapes(
    opened: OpenedPipeline, count: int, size: Size, moments: bool, texts: bool
) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of each array of a batch of `count` pictures of `size`.

    moments, texts: whether they come from a cache.
    """
    cfg = opened.model_cfg
    made: dict[str, tuple[tuple[int, ...], Any]] = {
        "weights": ((), np.float32),
        "time_ids": ((6,), np.float32),
        "sample_ids": ((), np.int32),
    }
    grid = tuple(side // cfg.vae.factor for side in size)
    if opened.options.mask:
        made["loss_mask"] = ((*grid, 1), np.float32)
    if moments:
        latent = (*grid, cfg.vae.latent_channels)
        made |= dict.fromkeys(("mean", "logvar"), (latent, np.float32))
    else:
        names = ("pixels", "source") if cfg.conditioning == SOURCE else ("pixels",)
        made |= dict.fromkeys(names, ((*size, 3), np.uint8))
    if texts:
        text = opened.text_shapes()
        pairs = text._asdict().items()
        made |= {k: (x.shape[1:], x.dtype) for k, x in pairs if x is not None}
    else:
        made |= {"ids": (opened.ids_shape, np.int32)}
    return {k: jax.ShapeDtypeStruct((count, *shape), d) for k, (shape, d) in made.items()}


def planned(opened: OpenedPipeline) -> Planned:
    """Return square pictures of `resolution`, cached as `encode` would."""
    cfg, options, leaves = opened.cfg, opened.options, describe(opened.template)
    added = {path for path, leaf in leaves.items() if leaf.added}
    trained = select(cfg.trainable, leaves) if cfg.trainable else added
    cached, text_trains = bool(options.cache), any(p.startswith("text_encoder") for p in trained)
    moments = cached and opened.model_cfg.conditioning == NOTHING
    size = (options.resolution, options.resolution)
    texts = cached and not text_trains
    shapes = batch_shapes(opened, cfg.batch_size, size, moments, texts)
    null = None
    if texts and options.caption_dropout:
        null = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), opened.text_shapes())
    empty = np.zeros(opened.ids_shape, np.int32)
    return Planned(shapes, empty_ids=empty, empty_text=null, unread=unread(moments, texts))


def unread(moments: bool, texts: bool) -> tuple[str, ...]:
    """Return the beginnings of the paths of parameters that no step reads.

    moments, texts: whether they come from a cache. The statistics of FLUX.2's VAE are read in every
    step.
    """
    cached = (PICTURE_ENCODER if moments else ()) + (TEXT_ENCODER if texts else ())
    return PICTURE_DECODER + cached


def read_rows(opened: OpenedPipeline, spec: str, training: bool) -> PictureRows:
    """Open the pictures of a set.

    A training set may add mirrored pictures, buckets and prior pictures. Raises UserError for a
    training caption without the new word.
    """
    if not training:
        images = _read(opened, spec, mask=opened.options.mask)
        count = opened.options.eval_generated
        shown = subset(images, count, opened.cfg.seed).ids.tolist() if count else ()
        return PictureRows(opened, [Share(images)], spec, shown)
    options = opened.options
    own = _read(opened, spec, options.buckets, options.flip, options.mask)
    shares = [Share(own)]
    if options.prior.data:
        prior = _read(opened, options.prior.data, options.buckets, options.flip, mask="")
        repeats = max(1, round(len(prior) / len(own)))  # as many rows as the prior has
        shares = [Share(own, repeats), Share(prior, 1, options.prior.weight)]
    rows = PictureRows(opened, shares, spec)
    if opened.captions.new:
        inversion.check_captions(opened.captions, texts_of(rows.shares[0]), spec)
    return rows


def texts_of(share: Share) -> list[str]:
    """Return the caption of every picture, without those of mirrored copies."""
    return [share.images.records.caption(i) for i in range(len(share.images.records))]


def _read(
    opened: OpenedPipeline, spec: str, buckets: bool = False, flip: bool = False, mask: str = ""
) -> ImageSet:
    cfg = opened.model_cfg
    records = open_images(spec, edited=cfg.conditioning == SOURCE, mask=mask)
    return ImageSet(records, opened.options.resolution, cfg.multiple, buckets, flip)


def encode(
    opened: OpenedPipeline,
    chosen: set[str],
    sets: Sequence[PictureRows],
    load: Callable[[set[str]], Params],
) -> Params:
    """Store the moments of all pictures and, unless a text encoder trains, all embeddings.

    Those of the prompts are for pictures between the steps. The VAE and the text encoders are in
    memory one after the other. Does nothing without `cache`. Raises UserError if the VAE trains.
    """
    if any(path.startswith("vae.") for path in chosen):
        raise UserError(
            f"trainable={opened.cfg.trainable!r} trains the VAE, which the noise's error would"
            r" only spoil; take (unet|transformer)\..*, with text_encoder.* if you like, or"
            " task=autoencoder"
        )
    if not opened.options.cache or not sets:
        return {}
    cfg, dtype, paths = opened.model_cfg, str(opened.dtype), describe(opened.template)

    def encoders(begins: tuple[str, ...]) -> Encoders:
        some = load({path for path in paths if path.startswith(begins)})
        return Encoders(opened.template, opened.dtype, some)

    folder = Path(opened.options.cache).expanduser()
    moments = texts = nulls = masks = None
    if cfg.conditioning != SOURCE:
        pixels = ArrayCache(folder, "pixels", jax.process_index())
        for rows in sets:
            keep_pixels(pixels, rows.shares[0].images, rows.shown)
    if cfg.conditioning == NOTHING:
        local = encoders(PICTURE_ENCODER)
        name = fingerprint(local.params, PICTURE_ENCODER, "moments", dtype, cfg.vae)
        moments = ArrayCache(folder, name, jax.process_index())
        for images in (share.images for rows in sets for share in rows.shares):
            tell("moments", store_pictures(moments, images, local.moments, ENCODED_TOGETHER))
        del local
        masks = ArrayCache(folder, "masks", jax.process_index()) if opened.options.mask else None
    else:
        print("moments are not cached: each step encodes the UNet's input pictures", flush=True)
    if not any(path.startswith(TEXT_ENCODER) for path in chosen):
        texts, nulls = _store_captions(opened, sets, encoders(TEXT_ENCODER))
    for rows in sets:
        rows.use(Stores(moments, texts, nulls, masks))
    return {}


def _store_captions(
    opened: OpenedPipeline, sets: Sequence[PictureRows], local: "Encoders"
) -> tuple[ArrayCache, ArrayCache]:
    """Return filled caches of all captions, and of the null caption, which skips no layer."""
    cfg, store = opened.model_cfg, partial(store_texts, tokenize=opened.captions)
    layout = () if isinstance(cfg, PipelineConfig) else (cfg.transformer.context_dim,)
    more = (TEXT_ENCODER, "texts", str(opened.dtype), cfg.texts, *layout)

    def cache(*skip: int) -> ArrayCache:
        name = fingerprint(local.params, *more, *skip)
        return ArrayCache(opened.options.cache, name, jax.process_index())

    nulls = cache()
    skip, texts = cfg.clip_skip, cache(cfg.clip_skip) if cfg.clip_skip else nulls
    # The null caption comes alone, and is thus rounded as in a step without a cache.
    list(store(nulls, [""], encode=local.texts, batch=1))
    captions = {rows.caption(i) for rows in sets for i in range(len(rows))}
    every, encode = captions | {*opened.options.sample.prompts}, partial(local.texts, skip=skip)
    tell("embeddings", store(texts, [*every], encode=encode, batch=ENCODED_TOGETHER))
    return texts, nulls


class Encoders:
    """The VAE or text encoders on this process's first device, to fill caches without collectives.

    `template` is a pipeline of any family. `params` may lie on any device.
    """

    def __init__(self, template: Any, dtype: Any, params: Params):
        self.mesh = one_device_mesh()
        device = self.mesh.devices.flat[0]
        self.params = {
            path: jax.device_put(x if x.devices() == {device} else to_host(x), device)
            for path, x in params.items()
            if path.startswith(PICTURE_ENCODER + TEXT_ENCODER)
        }

        def encode_pictures(params: Params, pixels: Any) -> Any:
            return bind_some(template, params, dtype).vae.encode(to_float(pixels).astype(dtype))

        def encode_texts(params: Params, ids: Any, skip: int) -> Any:
            return bind_some(template, params, dtype).encode_text(ids, dtype=dtype, skip=skip)

        # Functions without `self`, which the cache of jax.jit would hold with its parameters.
        self._moments = jax.jit(encode_pictures)
        self._texts = jax.jit(encode_texts, static_argnums=2)

    def moments(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """Return fp32 mean and logvar of pictures uint8 [B, Y, X, 3]."""
        with jax.set_mesh(self.mesh):
            made = self._moments(self.params, pixels)
        return {"mean": np.asarray(made.mean), "logvar": np.asarray(made.logvar)}

    def texts(self, ids: np.ndarray, skip: int = 0) -> dict[str, np.ndarray]:
        """Return the embeddings of ids [B, E, T]. skip: as in `encode_text`."""
        with jax.set_mesh(self.mesh):
            made = self._texts(self.params, ids, skip)
        return {name: np.asarray(x) for name, x in made._asdict().items() if x is not None}
