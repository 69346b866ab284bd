"""Evaluation and samples of an image-token model: cross-entropy, pictures, kid-lite0."""

import math
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxft.core import runtime
from jaxft.core.params import Params, bind
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch, Metrics
from jaxft.data.loader import eval_batches, subset
from jaxft.models.autoencoders.vqgan import codebook_usage
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.models.pipelines.image_decode import generate_codes
from jaxft.objectives.codes import CodePrediction
from jaxft.tasks import NOW, Data, Look, Report, Request, Sheet, Unread
from jaxft.tasks.common.encoded import collate
from jaxft.tasks.common.kid_lite0 import KidLite0
from jaxft.tasks.common.sheets import SHOWN, shown_sheet
from jaxft.tasks.image_tokens.layout import encode_prompt, left_padded, null_prompt
from jaxft.tasks.image_tokens.opened import OpenedImageModel
from jaxft.tasks.image_tokens.rows import nearest, worst_pictures

FEW_WEIGHTS = 2**24  # below this size, products of one token a row gain nothing from threads


class ImageTokenPreview:
    """Evaluation and samples of an image-token model. Implements `jaxft.tasks.Preview`."""

    unread = Unread()

    def __init__(self, opened: OpenedImageModel, data: Data):
        self.opened, self.data, self.rows = opened, data, data.held_out
        self.dtype, options = opened.dtype, opened.options
        self.objective = CodePrediction(
            opened.layout, opened.model.code_model, self.dtype, options.loss
        )
        self.kid = KidLite0() if options.eval_generated and self.rows else None
        size = sum(x.size for x in jax.tree.leaves(opened.template))
        compiled = runtime.compiler_options(loop=True) if size < FEW_WEIGHTS else None
        self._generate = jax.jit(self._codes, static_argnums=5, compiler_options=compiled)
        self._shown = False  # the tokenizer's sheet is for the first report

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Return losses on held-out pictures with and without captions, and generated pictures."""
        rows = self.rows
        sheets: dict[str, Sheet] = {}
        if not self._shown and self.data.train is not None:
            sheets["tokenizer"] = worst_pictures(self.data.train, self.opened.model.vq)
        self._shown = True
        if rows is None:
            return Report({}, sheets=sheets)
        data = subset(rows, self.opened.options.eval_examples, self.opened.cfg.seed)
        size = self.opened.cfg.batch_size // self.opened.cfg.micro_batches
        padded, sums = partial(collate, filler=data[0]), {}
        for batch in eval_batches(data, size, padded, local_rows(mesh, size)):
            for name, value in self._score(params, place_batch(batch, mesh)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        metrics = {name: value / len(data) for name, value in sums.items()}
        metrics["caption_use"] = metrics["ce_null"] - metrics["ce"]
        metrics |= self._baselines(data)
        if not rows.shown:
            return Report(metrics, sheets=sheets)
        measured, shown = self._generated(params)
        return Report(metrics | measured, sheets={**sheets, "held-out": shown})

    def _baselines(self, data: Any) -> dict[str, float]:
        """Return bounds of the cross-entropy, and the quality of the tokenizer alone."""
        stored = [self.rows.stored(int(i)) for i in data.ids]
        unigram = self.data.facts.get("unigram_entropy")
        known = {} if unigram is None else {"unigram_entropy": unigram}
        return {
            "ln_k": math.log(self.opened.layout.codes),
            **known,
            "tokenizer_psnr": float(np.mean([one["psnr"] for one in stored])),
            "tokenizer_ssim": float(np.mean([one["ssim"] for one in stored])),
        }

    @partial(jax.jit, static_argnums=0)
    def _score(self, params: Params, batch: Batch) -> Metrics:
        """Return sums over rows of their mean cross-entropy, with caption and without."""
        model = bind(self.opened.template, params, self.dtype)
        never = jnp.zeros(len(batch["weights"]), bool)
        _, with_caption = self.objective.cross_entropy(model, batch, never, None)
        _, without = self.objective.cross_entropy(model, batch, ~never, None)
        found = {"ce": with_caption["image_ce"], "ce_null": without["image_ce"]}
        rest = {
            name: with_caption[name] for name in ("accuracy", "text_ce") if name in with_caption
        }
        return {**found, **rest}

    def _generated(self, params: Params) -> tuple[dict[str, float], Sheet]:
        """Return metrics and a sheet of pictures generated for held-out captions."""
        rows, vq = self.rows, self.opened.model.vq
        assert rows is not None and self.kid is not None
        chosen = rows.shown
        captions = [rows.caption(i) for i in chosen]
        codes, rate = self._sample(params, captions, Request())
        made = vq.decode(codes)
        wanted = np.stack([rows.images[i].pixels for i in chosen])
        back = vq.decode(np.stack([rows.stored(i)["codes"] for i in chosen]))
        usage = codebook_usage(jnp.bincount(codes.ravel(), length=self.opened.layout.codes))
        with jax.set_mesh(vq.mesh):
            distance = self.kid(wanted, made)
        metrics = {
            "kid-lite0": distance,
            "codebook_used": float(usage.used),
            "codebook_perplexity": float(usage.perplexity),
        }
        if self.data.train is not None:
            far = nearest(self.data.train, codes.reshape(len(codes), -1))
            metrics["train_distance_least"] = float(far.min())
            metrics["train_distance_mean"] = float(far.mean())
        metrics["sampled_images_per_s"] = rate
        return metrics, shown_sheet(captions, {"target": wanted, "tokenizer": back, NOW: made})

    def sample(self, params: Params) -> Look:
        prompts = list(self.opened.options.sample.prompts)
        if not prompts and self.rows is None:
            images = self.data.train.images
            prompts = sorted({images.caption(i) for i in range(len(images.records))})[: 2 * SHOWN]
        if not prompts:
            return Look()  # an evaluation shows held-out captions
        made = self.opened.model.vq.decode(self._sample(params, prompts, Request())[0])
        return Look(sheets={"prompts": Sheet(tuple(prompts), {NOW: made})})

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        made = self.opened.model.vq.decode(self._sample(params, prompts, request)[0])
        return [Look(pictures={"made": one}) for one in made]

    def _sample(
        self, params: Params, prompts: list[str], request: Request
    ) -> tuple[np.ndarray, float]:
        """Return codes [N, Y, X], and the images per second.

        The rate is that of the fastest portion, because the first may include a compilation. A
        portion always has as many rows as a micro-batch, because other batch sizes would round
        differently.
        """
        options, layout = self.opened.options.sample, self.opened.layout
        size = self.opened.cfg.batch_size // self.opened.cfg.micro_batches
        how = Sampling(
            temperature=_first(request.temperature, options.temperature),
            top_k=_first(request.top_k, options.top_k),
            top_p=_first(request.top_p, options.top_p),
        )
        guidance = _first(request.guidance, options.guidance)
        ids = [encode_prompt(layout, self.opened.model.tokenizer, prompt).ids for prompt in prompts]
        made, seconds = [], []
        for first in range(0, len(ids), size):
            began = time.perf_counter()
            rows = [ids[(first + i) % len(ids)] for i in range(size)]
            nulls = [null_prompt(layout, one) for one in rows]
            tokens, mask = left_padded(layout, rows + nulls)
            draws = jax.random.key(request.seed), np.arange(first, first + size)
            made.append(np.asarray(self._generate(params, tokens, mask, draws, guidance, how)))
            seconds.append(time.perf_counter() - began)
        codes = np.concatenate(made)[: len(ids)].reshape(-1, *layout.grid)
        return codes, size / min(seconds)

    def _codes(
        self, params: Params, tokens: Any, mask: Any, draws: tuple, guidance: Any, how: Sampling
    ) -> jax.Array:
        layout, model = self.opened.layout, bind(self.opened.template, params, self.dtype)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(*draws)
        codes = generate_codes(
            self.opened.model.code_model(model), tokens, mask, keys,
            count=layout.count, guidance=guidance, how=how, dtype=self.dtype,
        )  # fmt: skip
        return constrain(codes, None, None)


def _first(asked: Any, default: Any) -> Any:
    """Return a setting of the request, or the config's own where the request has none."""
    return default if asked is None else asked
