"""Evaluation and samples of a diffusion model: errors at fixed timesteps, pictures, kid-lite0."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.core.params import Params, bind_some
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch, stream
from jaxft.data.images.buckets import make_buckets
from jaxft.data.loader import eval_batches, subset
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.conditioning import condition
from jaxft.models.pipelines.stable_diffusion import NOTHING, Guidance
from jaxft.nn.pixels import to_pixels
from jaxft.objectives.denoising import Denoising, counted, normal
from jaxft.tasks import NOW, Data, Look, Report, Request, Sheet, Unread
from jaxft.tasks.common.encoded import Row, collate
from jaxft.tasks.common.kid_lite0 import KidLite0
from jaxft.tasks.common.sheets import SHOWN, portions, shown_sheet
from jaxft.tasks.diffusion import conditioning
from jaxft.tasks.diffusion.opened import OpenedPipeline, check_sampler, check_size
from jaxft.tasks.diffusion.rows import PICTURE_DECODER

BINS = 8  # timesteps of the validation loss, equally far apart


class DiffusionPreview:
    """Evaluation and samples of a pipeline. Implements `jaxft.tasks.Preview`."""

    def __init__(self, opened: OpenedPipeline, data: Data):
        self.opened, self.data, self.rows = opened, data, data.held_out
        self.dtype = opened.dtype
        # Rows with the caches of the run. Training and held-out ones have the same.
        self.cached = data.held_out if data.train is None else data.train
        null = None if self.cached is None else self.cached.empty_text
        self.objective = Denoising(
            opened.model_cfg, opened.process, self.dtype, opened.captions(""), null
        )
        self.kid = KidLite0() if opened.options.eval_generated and self.rows else None

    @property
    def unread(self) -> Unread:
        """Encoders whose results are cached, and the decoder where no pictures are made."""
        every = () if self.cached is None else self.cached.unread
        drawn = tuple(path for path in every if path not in PICTURE_DECODER)
        shown = self.rows is not None and self.rows.shown
        return Unread(drawn if shown else every, drawn if self._prompts() else every)

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Return errors at fixed timesteps and noise, and pictures of held-out captions."""
        if self.rows is None:
            return Report({})
        data = subset(self.rows, self.opened.options.eval_examples, self.opened.cfg.seed)
        size = self.opened.cfg.batch_size // self.opened.cfg.micro_batches
        sums, padded, count = np.zeros(BINS), partial(collate, filler=data[0]), 0.0
        for batch in eval_batches(data, size, padded, local_rows(mesh, size)):
            more, own = self._bins(params, place_batch(batch, mesh))
            sums, count = sums + np.asarray(more), count + float(own)
        errors = sums / count
        metrics = {"loss": float(np.mean(errors))}
        times = self.opened.process.evaluation_times(BINS)
        metrics |= {f"loss_t{t}": float(e) for t, e in zip(times, errors, strict=True)}
        chosen, images = self.rows.shown, self.rows.shares[0].images
        if not chosen:
            return Report(metrics)
        wanted = np.stack([images[i].pixels for i in chosen])
        given = conditioning.held_out(self.opened.model_cfg, self.rows, chosen)
        captions = [self.rows.caption(i) for i in chosen]
        texts = [self.rows.text(caption) for caption in captions]
        made = self._sample(params, texts, Request(), given)
        if self.kid:
            metrics["kid-lite0"] = self.kid(wanted, made)
        columns = {"given": conditioning.shown(given), "target": wanted, NOW: made}
        return Report(metrics, sheets={"held-out": shown_sheet(captions, columns)})

    @partial(jax.jit, static_argnums=0)
    def _bins(self, params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Return the summed errors at each of BINS timesteps, and the number of rows that count.

        A row has the same noise in every run.
        """
        model = bind_some(self.opened.template, params, self.dtype)
        latents = self.objective.latents(model, batch, None)
        text, rows = self.objective.text(model, batch, None), batch["weights"]
        concat = condition(model, self.opened.model_cfg, batch, None, self.dtype)
        base = jax.vmap(partial(jax.random.fold_in, jax.random.key(0)))(batch["sample_ids"])

        def at(number_and_time: tuple[jax.Array, jax.Array]) -> jax.Array:
            number, time = number_and_time
            noise = normal(stream(base, number), latents.shape[1:])
            t = jnp.broadcast_to(time, rows.shape)
            errors = self.objective.errors(model, batch, latents, noise, t, text, concat, None)
            return jnp.sum(errors * (rows > 0))

        times = jnp.asarray(self.opened.process.evaluation_times(BINS))
        count = jnp.sum(counted(batch) * (rows > 0))
        return jax.lax.map(at, (jnp.arange(BINS), times)), count

    def _prompts(self) -> list[str]:
        """Return the prompts of samples: those of the config, or captions if nothing is held out.

        An evaluation shows held-out captions and has their pictures.
        """
        prompts = list(self.opened.options.sample.prompts)
        if self.rows is None and self.opened.model_cfg.conditioning != NOTHING:
            return []
        if not prompts and self.rows is None:
            prompts = sorted({self.data.train.caption(i) for i in range(len(self.data.train))})
        return prompts[: 2 * SHOWN]

    def sample(self, params: Params) -> Look:
        if not (prompts := self._prompts()):
            return Look()
        given = conditioning.held_out(self.opened.model_cfg, self.rows, range(len(prompts)))
        texts = [self.cached.text(prompt) for prompt in prompts]
        made = self._sample(params, texts, Request(), given)
        columns = {"given": conditioning.shown(given), NOW: made}
        kept = {name: pictures for name, pictures in columns.items() if pictures is not None}
        return Look(sheets={"prompts": Sheet(tuple(prompts), kept)})

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        cfg, side = self.opened.model_cfg, self.opened.options.resolution
        sizes = make_buckets(side, cfg.multiple) if self.opened.options.buckets else ((side, side),)
        given = conditioning.asked(cfg, request, sizes, len(prompts))
        if request.size:
            check_size(cfg, request.size)
        request = request._replace(image=None, mask=None)  # now in `given`
        texts: list[Row] = [{"ids": self.opened.captions(prompt)} for prompt in prompts]
        made = self._sample(params, texts, request, given)
        return [Look(pictures={"made": one}) for one in made]

    def _sample(
        self, params: Params, texts: list[Row], request: Request, given: Mapping[str, np.ndarray]
    ) -> np.ndarray:
        """Return pictures uint8 [N, Y, X, 3].

        `texts` holds the ids of each prompt, or its embedding. `given` holds the conditioning of
        the UNet for each prompt. The noise of a picture depends only on the seed and its place.
        Raises UserError for an unknown sampler in `request`. A portion always has as many rows as a
        micro-batch, because other batch sizes would round differently.
        """
        if request.sampler is not None:
            check_sampler("--sampler", request.sampler, self.opened.model_cfg)
        size = self.opened.cfg.batch_size // self.opened.cfg.micro_batches
        stacked = {name: np.stack([text[name] for text in texts]) for name in texts[0]}
        avoided = None if request.negative is None else self.opened.captions(request.negative)
        key = jax.random.key(request.seed)
        request = request._replace(negative=None, seed=0)  # one program for all of these
        made = [
            np.asarray(self._generate(params, rows, (key, places), request, inputs, avoided))
            for places, (rows, inputs) in portions((stacked, given), len(texts), size)
        ]
        return np.concatenate(made)[: len(texts)]

    @partial(jax.jit, static_argnums=(0, 4))
    def _generate(
        self,
        params: Params,
        texts: Batch,
        draws: tuple,
        request: Request,
        given: Batch,
        avoided: Any,
    ) -> jax.Array:
        """Return pictures [B, Y, X, 3].

        `texts` holds ids of prompts, or their embeddings. `draws` holds the key of the seed, and
        the place of each row. `avoided` holds the ids of the negative prompt, or None.
        """
        cfg, options = self.opened.model_cfg, self.opened.options.sample
        model = bind_some(self.opened.template, params, self.dtype)
        text = self.objective.text(model, texts, None)
        if avoided is None:
            null = self.objective.null(model)
        else:
            null = model.encode_text(jnp.asarray(avoided)[None], dtype=self.dtype)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(*draws)
        null = jax.tree.map(lambda x: jnp.repeat(x, len(keys), axis=0), null)
        concat = condition(model, cfg, given, None, self.dtype)
        y, x = request.size or (self.opened.options.resolution,) * 2
        size = (y // cfg.vae.factor, x // cfg.vae.factor) if concat is None else concat.shape[1:3]
        noise = normal(keys, (*size, cfg.vae.latent_channels))
        name, steps = request.sampler or options.sampler, request.steps or options.steps
        scale = options.guidance if request.guidance is None else request.guidance
        image = options.image_guidance if request.image_guidance is None else request.image_guidance
        images = stable_diffusion.generate(
            model, cfg, text, null, noise, self.opened.process.sampler(name, steps, size),
            Guidance(scale, options.rescale, image), self.dtype, concat,
        )  # fmt: skip
        return constrain(to_pixels(images), None, None, None, None)
