"""Stable Diffusion: fine-tuning UNet and text encoders on captioned pictures, whole or by LoRA."""

import re
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxft.core import runtime
from jaxft.core.config import Config
from jaxft.core.errors import UserError
from jaxft.core.params import ADDED, Params, bind, describe
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch, Metrics, cast, stream
from jaxft.data.cache import ArrayCache
from jaxft.data.images.buckets import BucketBatches, bucket_loader, make_buckets
from jaxft.data.images.dataset import Bad, ImageSet, to_float
from jaxft.data.loader import eval_batches, subset
from jaxft.data.sources.images import open_images
from jaxft.models import flops
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae import Moments
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.ldm import open_model
from jaxft.models.pipelines.stable_diffusion import (
    NOTHING,
    SOURCE,
    Guidance,
    PipelineConfig,
    StableDiffusion,
    Text,
    drop_captions,
    zeroed,
)
from jaxft.nn import lora
from jaxft.noise.ddpm import DDPM
from jaxft.noise.process import NoiseProcess, offset_noise, squared_error
from jaxft.noise.samplers import SAMPLERS
from jaxft.tasks import Look, Report, Request
from jaxft.tasks.common.kid_lite0 import KidLite0
from jaxft.tasks.common.pictures import grid
from jaxft.tasks.common.sheets import CELL, SHOWN, Compared, portions
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.tasks.diffusion import conditioning as picture_inputs
from jaxft.tasks.diffusion import inversion
from jaxft.tasks.diffusion.captions import Captions
from jaxft.tasks.diffusion.latents import (
    Encoders,
    Rows,
    Share,
    Stores,
    collate,
    fingerprint,
    store_moments,
    store_texts,
    tell,
)
from jaxft.tasks.options import DiffusionOptions
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.folders.diffusers import Changes, pipeline_files

BINS = 8  # timesteps at which validation measures, equally far apart
CACHED_AT_ONCE = 16  # pictures or captions that are encoded together
# Streams of a row's own key.
LATENT, NOISE, TIME, DROP, OFFSET, ADAPTER, SEEN = range(7)


class Diffusion:
    """Fine-tuning Stable Diffusion; see `jaxft.tasks.Task`."""

    Options = DiffusionOptions
    EXPORT_KINDS = ("folder", "single_file", "lora", "inversion", "all", "none")
    unit = "images"

    def __init__(self, cfg: Config):
        self.cfg, self.options = cfg, DiffusionOptions(**cfg.own)
        options = self.options
        prediction = options.prediction or None
        self.pipeline = open_model(cfg.model, cfg.init == "pretrained", prediction=prediction)
        self.model_cfg = PipelineConfig.of(self.pipeline, options.prediction, options.zero_snr)
        _check(options, self.model_cfg)
        new = inversion.names(options.inversion)
        self.model_cfg = inversion.extended(self.model_cfg, len(new))
        self.process: NoiseProcess = DDPM(self.model_cfg.schedule, options.min_snr_gamma)
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.remat = runtime.resolve_remat(cfg.remat)
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        self.parts = stable_diffusion.parts(self.pipeline, self.model_cfg)
        if cfg.export.kind == "lora" or (cfg.export.kind == "all" and cfg.lora.rank):
            pipeline_lora.check(self.parts, describe(self.template))
        names = ("tokenizer", "tokenizer_2")[: len(self.model_cfg.texts)]
        folders = [self.pipeline.tokenizer_dir(name) for name in names]
        tokenizers = [load_tokenizer(folder, "clip") for folder in folders]
        self.captions = Captions(tokenizers, self.model_cfg.texts, new)
        self.train_set = Rows(self._shares(), self._tokenize)
        self._cut = self._check_captions()
        held_out = [Share(self._read(cfg.data.eval, False, False))] if cfg.data.eval else []
        self.eval_set = Rows(held_out, self._tokenize) if held_out else None
        held = [share.images for share in held_out]
        texts = [images.captions[i] for images in held for i in range(len(images.records))]
        self.captions.too_long([*options.sample.prompts, *texts])  # checks their tokens
        self.kid = KidLite0() if options.eval_generated and self.eval_set else None
        self.compared = Compared()

    def build(self, key: jax.Array) -> nnx.Module:
        model = StableDiffusion(self.model_cfg, key=key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        return model

    def initial(self) -> dict[str, np.ndarray]:
        own, leaves = self.options.inversion, describe(self.template)
        return inversion.initial(own, self.captions, self.parts, leaves) if own.token else {}

    def describe(self) -> str:
        cfg, report = self.model_cfg, self.data_report()
        kind = "Stable Diffusion" + " XL" * cfg.sdxl + picture_inputs.KINDS[cfg.sees]
        sizes = ", ".join(f"{h}x{w}" for h, w in self.train_set.sizes)
        small, batch = report["smaller_than_target"], self.cfg.batch_size
        counts = np.bincount(self.train_set.bucket_of)
        notes = [
            f"; bucket {h}x{w} has {n} images, fewer than batch_size={batch}: repeated"
            for (h, w), n in zip(self.train_set.sizes, counts, strict=True)
            if n < batch <= len(self.train_set)
        ]
        if self._cut:
            notes.append(f"; {self._cut} captions longer than {self.captions.length} tokens, cut")
        if self.captions.new:
            notes.append(f"; learning {', '.join(self.captions.new)}")
        return (
            f"{kind}, {cfg.schedule.prediction}{', zero terminal SNR' * cfg.schedule.zero_snr};"
            f" {self.cfg.data.train}: {report['images']} images at {sizes}"
            f" ({report['cropped']} cropped{f', {small} enlarged' if small else ''})"
            + "".join(notes)
        )

    def data_report(self) -> dict[str, int]:
        total: dict[str, int] = {}
        for share in self.train_set.shares:
            for name, count in share.images.report.items():
                total[name] = total.get(name, 0) + count
        return {**total, "truncated_captions": self._cut}

    def bad_samples(self) -> tuple[Bad, ...]:
        sets = [rows for rows in (self.train_set, self.eval_set) if rows]
        return tuple(bad for rows in sets for share in rows.shares for bad in share.images.bad)

    def n_examples(self) -> int:
        return len(self.train_set)

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["weights"])

    def flops_per_unit(self, chosen: set[str]) -> float:
        """The UNet's, forward and both halves of backward; adapters have only one of these."""
        cfg, side = self.model_cfg, self.options.resolution // self.model_cfg.vae.factor
        latents = jax.ShapeDtypeStruct((1, side, side, cfg.unet.in_channels), self.dtype)
        ids = jax.ShapeDtypeStruct((1, *self._tokenize("").shape), np.int32)
        times = jax.ShapeDtypeStruct((1, 6), np.float32)

        def forward(model: StableDiffusion, latents: Any, text: Text, times: Any) -> jax.Array:
            return model.predict(latents, times[:, 0], text, times, dtype=self.dtype)

        encode = partial(StableDiffusion.encode_text, dtype=self.dtype)
        text = jax.eval_shape(encode, self.template, ids)
        passes = 2 if all(re.fullmatch(ADDED, path) for path in chosen) else 3
        return passes * flops.count(forward, self.template, latents, text, times)

    def exported(self, params: Params) -> Params:
        return params

    def side_files(self, dtype: str | None, rewritten: set[str]) -> dict[str, Path | bytes]:
        names = frozenset(prefix.removesuffix(".") for prefix in rewritten)
        return dict(pipeline_files(self.pipeline, Changes(names, dict(self.model_cfg.scheduler))))

    # ---- batches --------------------------------------------------------------------------

    def prepare(self, params: Params, trained: set[str]) -> None:
        """Store the moments of all pictures and, while no text encoder trains, all embeddings."""
        if any(path.startswith("vae.") for path in trained):
            raise UserError(
                f"trainable={self.cfg.trainable!r} trains the VAE, which the noise's error would"
                r" only spoil; take unet\..* or (unet|text_encoder.*)\..*, or task=autoencoder"
            )
        if not self.options.cache:
            return
        local = Encoders(self.template, self.dtype, params)
        folder = Path(self.options.cache).expanduser()
        what = (str(self.dtype), self.model_cfg.vae)
        name = fingerprint(local.params, ("vae.encoder.", "vae.quant_conv."), "moments", *what)
        moments, texts = ArrayCache(folder, name, jax.process_index()), None
        sets = [rows for rows in (self.train_set, self.eval_set) if rows]
        if self.model_cfg.sees == NOTHING:
            for images in (share.images for rows in sets for share in rows.shares):
                tell("moments", store_moments(moments, images, local.moments, CACHED_AT_ONCE))
        else:
            moments = None
            print(
                "moments are not cached: the UNet sees pictures, encoded in each step", flush=True
            )
        if not any(path.startswith("text_encoder") for path in trained):
            what = (str(self.dtype), self.model_cfg.texts)
            name = fingerprint(local.params, ("text_encoder",), "texts", *what)
            texts = ArrayCache(folder, name, jax.process_index())
            captions = [rows.caption(i) for rows in sets for i in range(len(rows))]
            made = store_texts(texts, captions, self._tokenize, local.texts, CACHED_AT_ONCE)
            tell("embeddings", made)
        for rows in sets:
            rows.use(Stores(moments, texts))

    def train_batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        plan = BucketBatches(self.train_set.bucket_of, self.cfg.batch_size, self.cfg.seed)
        return bucket_loader(
            self.train_set, plan, start_step=start_step, collate_fn=collate, rows=rows
        )

    def shapes(self, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        for bucket in range(len(self.train_set.sizes)):
            members = np.flatnonzero(self.train_set.bucket_of == bucket)
            ids = np.resize(members, self.cfg.batch_size)[rows]
            batch = collate([self.train_set[int(i)] for i in ids], batch_rows=len(ids))
            yield {**batch, "sample_ids": ids.astype(np.int32)}

    # ---- the loss -------------------------------------------------------------------------

    def loss(
        self, model: StableDiffusion, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """The squared error of the prediction, each row by its min-SNR and prior weight."""
        options = self.options
        latents = self._latents(model, batch, stream(keys, LATENT))
        noise = _normal(stream(keys, NOISE), latents.shape[1:])
        if options.noise_offset:
            noise = offset_noise(stream(keys, OFFSET), noise, options.noise_offset)
        t = self.process.draw_times(stream(keys, TIME), latents.shape[1:3])
        adapter = stream(keys, ADAPTER) if self.cfg.lora.dropout else None
        text = self._text(model, batch, adapter)
        cfg, share = self.model_cfg, options.caption_dropout
        seen = picture_inputs.see(model, cfg, batch, stream(keys, SEEN), self.dtype)
        if share:
            drawn = jax.vmap(jax.random.uniform)(stream(keys, DROP))
            dropped = picture_inputs.captions_dropped(cfg, drawn, share)
            text = drop_captions(text, self._null(model), dropped)
            seen = picture_inputs.drop_sources(cfg, seen, drawn, share)
        errors = self._errors(model, batch, latents, noise, t, text, seen, adapter)
        errors *= self.process.weights(t)
        return (jnp.sum(errors * batch["weights"]), jnp.sum(batch["weights"])), {}

    def _errors(
        self,
        model: StableDiffusion,
        batch: Batch,
        latents: jax.Array,
        noise: jax.Array,
        t: jax.Array,
        text: Text,
        seen: jax.Array | None,
        keys: jax.Array | None,
    ) -> jax.Array:
        """Each row's own mean squared error at timestep `t`."""
        noisy = self.process.add_noise(latents, noise, t)
        out = model.predict(
            noisy, t, text, batch["time_ids"],
            dtype=self.dtype, seen=seen, keys=keys, remat=self.remat,
        )  # fmt: skip
        return squared_error(out, self.process.target(latents, noise, t))

    def _latents(self, model: StableDiffusion, batch: Batch, keys: Any) -> jax.Array:
        """Scaled latents, fp32: drawn where there are `keys`, else the posterior's mode."""
        if "mean" in batch:
            moments = Moments(batch["mean"], batch["logvar"])
        else:
            moments = model.vae.encode(to_float(batch["pixels"]).astype(self.dtype))
        drawn = moments.mean if keys is None else vae.sample(moments, keys)
        return self.model_cfg.vae.scale(drawn.astype(jnp.float32))

    def _text(self, model: StableDiffusion, batch: Batch, keys: Any) -> Text:
        if "context" in batch:
            return Text(batch["context"], batch.get("pooled"))
        return model.encode_text(batch["ids"], dtype=self.dtype, keys=keys)

    def _null(self, model: StableDiffusion) -> Text:
        """The null caption of one row, by the text encoders as they are now."""
        empty = jnp.asarray(self._tokenize(""))[None]
        made = model.encode_text(empty, dtype=self.dtype)
        return zeroed(made) if self.model_cfg.zero_null else made

    # ---- looking --------------------------------------------------------------------------

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Errors at fixed timesteps and noise, and pictures of held-out captions."""
        if self.eval_set is None:
            return Report({})
        data = subset(self.eval_set, self.options.eval_examples, self.cfg.seed)
        size = self.cfg.batch_size // self.cfg.micro_batches
        sums, padded = np.zeros(BINS), partial(collate, filler=data[0])
        for batch in eval_batches(data, size, padded, local_rows(mesh, size)):
            sums += np.asarray(self._bins(params, place_batch(batch, mesh)))
        errors = sums / len(data)
        metrics = {"loss": float(np.mean(errors))}
        times = self.process.evaluation_times(BINS)
        metrics |= {f"loss_t{t}": float(e) for t, e in zip(times, errors, strict=True)}
        if not self.options.eval_generated:
            return Report(metrics)
        chosen = subset(self.eval_set, self.options.eval_generated, self.cfg.seed).ids
        given = picture_inputs.held_out(self.model_cfg, self.eval_set, chosen)
        captions = [self.eval_set.caption(int(i)) for i in chosen]
        made = self._draw(params, captions, Request(), given)
        images = self.eval_set.shares[0].images
        wanted = np.stack([images[int(i)].pixels for i in chosen])
        if self.kid:
            metrics["kid-lite0"] = self.kid(wanted, made)
        columns = {"given": picture_inputs.shown(given), "target": wanted}
        return Report(metrics, pictures={"held-out": self.compared.sheet(captions, columns, made)})

    @partial(jax.jit, static_argnums=0)
    def _bins(self, params: Params, batch: Batch) -> jax.Array:
        """Summed errors at each of BINS timesteps; a row's noise is its own on every run."""
        model = bind(self.template, cast(params, self.dtype))
        latents = self._latents(model, batch, None)
        text, rows = self._text(model, batch, None), batch["weights"]
        seen = picture_inputs.see(model, self.model_cfg, batch, None, self.dtype)
        base = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(batch["sample_ids"])

        def at(number_and_time: tuple[jax.Array, jax.Array]) -> jax.Array:
            number, time = number_and_time
            noise = _normal(stream(base, number), latents.shape[1:])
            t = jnp.broadcast_to(time, rows.shape)
            errors = self._errors(model, batch, latents, noise, t, text, seen, None)
            return jnp.sum(errors * (rows > 0))

        times = jnp.asarray(self.process.evaluation_times(BINS))
        return jax.lax.map(at, (jnp.arange(BINS), times))

    def sample(self, params: Params) -> Look:
        prompts = list(self.options.sample.prompts)
        if not prompts and self.eval_set is None:
            prompts = sorted({self.train_set.caption(i) for i in range(len(self.train_set))})
        if not prompts or (self.model_cfg.sees != NOTHING and self.eval_set is None):
            return Look()  # an evaluation shows held-out captions; only it has pictures to draw on
        prompts = prompts[: 2 * SHOWN]
        given = picture_inputs.held_out(self.model_cfg, self.eval_set, range(len(prompts)))
        made = self._draw(params, prompts, Request(), given)
        seen = picture_inputs.shown(given)
        rows = made[:, None] if seen is None else np.stack([seen, made], axis=1)
        return Look(pictures={"prompts": grid(list(rows), prompts, (), CELL)})

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        cfg, side = self.model_cfg, self.options.resolution
        sizes = make_buckets(side, cfg.multiple) if self.options.buckets else ((side, side),)
        given = picture_inputs.asked(cfg, request, sizes, len(prompts))
        request = request._replace(image=None, mask=None)  # now in `given`
        made = self._draw(params, prompts, request, given)
        return [Look(pictures={"made": one}) for one in made]

    def _draw(
        self, params: Params, prompts: list[str], request: Request, given: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Pictures uint8 (N, Y, X, 3); each one's noise depends on the seed and its place alone.

        `given` is what the UNet sees of each. Always as many at a time as a micro-batch has:
        others beside it would round it otherwise.
        """
        if request.sampler is not None:
            _check_sampler("--sampler", request.sampler)
        size = self.cfg.batch_size // self.cfg.micro_batches
        ids = np.stack([self._tokenize(prompt) for prompt in prompts])
        made = [
            np.asarray(self._generate(params, rows, places, request, seen))
            for places, (rows, seen) in portions((ids, given), len(ids), size)
        ]
        return np.concatenate(made)[: len(ids)]

    @partial(jax.jit, static_argnums=(0, 4))
    def _generate(
        self, params: Params, ids: Any, places: Any, request: Request, given: Batch
    ) -> jax.Array:
        cfg, options = self.model_cfg, self.options.sample
        model = bind(self.template, cast(params, self.dtype))
        text = model.encode_text(ids, dtype=self.dtype)
        null = jax.tree.map(lambda x: jnp.repeat(x, len(ids), axis=0), self._null(model))
        seen = picture_inputs.see(model, cfg, given, None, self.dtype)
        side = self.options.resolution // cfg.vae.factor
        size = (side, side) if seen is None else seen.shape[1:3]
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(request.seed)))(places)
        noise = _normal(keys, (*size, cfg.unet.out_channels))
        name, steps = request.sampler or options.sampler, request.steps or options.steps
        scale = options.guidance if request.guidance is None else request.guidance
        image = options.image_guidance if request.image_guidance is None else request.image_guidance
        images = stable_diffusion.generate(
            model, cfg, text, null, noise, self.process.sampler(name, steps, size),
            Guidance(scale, options.rescale, image), self.dtype, seen,
        )  # fmt: skip
        pixels = jnp.round((images + 1.0) * 127.5).astype(jnp.uint8)
        return constrain(pixels, None, None, None, None)

    # ---- shared pieces --------------------------------------------------------------------

    def _shares(self) -> list[Share]:
        """The training pictures, and as often as they are fewer than the prior's, repeated."""
        options = self.options
        own = self._read(self.cfg.data.train, options.buckets, options.flip)
        if not options.prior.data:
            return [Share(own)]
        prior = self._read(options.prior.data, options.buckets, options.flip)
        repeats = max(1, round(len(prior) / len(own)))
        return [Share(own, repeats), Share(prior, 1, options.prior.weight)]

    def _read(self, spec: str, buckets: bool, flip: bool) -> ImageSet:
        multiple = self.model_cfg.multiple
        records = open_images(spec, edited=self.model_cfg.sees == SOURCE)
        return ImageSet(records, self.options.resolution, multiple, buckets, flip)

    def _tokenize(self, caption: str) -> np.ndarray:
        """(E, T) ids for each text encoder."""
        return self.captions(caption)

    def _check_captions(self) -> int:
        """How many captions of the training pictures are cut; the new word has to be in each."""
        sets = [share.images for share in self.train_set.shares]
        texts = [[images.captions[i] for i in range(len(images.records))] for images in sets]
        if self.captions.new:
            inversion.check(self.cfg, self.captions, describe(self.template))
            inversion.check_captions(self.captions, texts[0], self.cfg.data.train)
        return sum(map(self.captions.too_long, texts))


def _normal(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def _check(options: DiffusionOptions, cfg: PipelineConfig) -> None:
    _check_sampler("sample.sampler", options.sample.sampler)
    if not 0 <= options.caption_dropout < 1:
        raise UserError(f"caption_dropout={options.caption_dropout} must be at least 0 and below 1")
    picture_inputs.check(cfg, options.caption_dropout)


def _check_sampler(key: str, name: str) -> None:
    if name not in SAMPLERS:
        raise UserError(f"{key}={name!r} is not one of {', '.join(SAMPLERS)}")
