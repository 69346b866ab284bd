"""Image-token models (DALL-E): a language model that continues a caption with an image's codes."""

import itertools
import math
import time
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
from jaxft.core.params import Params, bind
from jaxft.core.sharding import constrain, local_rows, place_batch
from jaxft.core.step import Batch, Metrics, cast, stream
from jaxft.data.cache import ArrayCache
from jaxft.data.images.dataset import CORNERS, Bad, ImageSet
from jaxft.data.loader import eval_batches, subset, train_loader
from jaxft.data.sources.images import open_images
from jaxft.models.autoencoders.vqgan import codebook_usage
from jaxft.models.decoders.sampling import Sampling
from jaxft.models.pipelines.image_decode import generate_codes
from jaxft.nn import lora
from jaxft.tasks import Look, Report, Request
from jaxft.tasks.common.kid_lite0 import KidLite0
from jaxft.tasks.common.pictures import grid
from jaxft.tasks.diffusion.latents import collate
from jaxft.tasks.image_tokens.image_codes import CodeRows, ceiling, code_counts, entropy, nearest
from jaxft.tasks.image_tokens.image_layout import (
    encode_prompt,
    left_padded,
    null_prompt,
    train_rows,
)
from jaxft.tasks.image_tokens.image_model import open_model
from jaxft.tasks.options import ImageTokenOptions

SHOWN = 8  # rows of a picture grid
CELL = 96  # least pixels of a cell in it
SMALL = 2**24  # weights of a model whose products, a token a row, gain nothing from threads
DROP, ADAPTER = range(2)  # streams of a row's own key


class ImageTokens:
    """Fine-tuning an image-token model; see `jaxft.tasks.Task`."""

    Options = ImageTokenOptions
    EXPORT_KINDS = ("folder", "adapter", "original", "none")
    unit = "images"

    def __init__(self, cfg: Config):
        self.cfg, self.options = cfg, ImageTokenOptions(**cfg.own)
        _check(self.options)
        pretrained = cfg.init == "pretrained"
        self.model = open_model(cfg.model, self.options, pretrained, cfg.seed)
        self.layout = self.model.layout
        if cfg.export.kind == "original":
            self.original_files(None)  # better now than after training
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.remat = runtime.resolve_remat(cfg.remat)
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        self.parts = (self.model.part,)
        self.train_set = self._read(cfg.data.train, self.options.flip, self.options.crops)
        self.eval_set = self._read(cfg.data.eval, False, 1) if cfg.data.eval else None
        for prompt in self.options.sample.prompts:
            encode_prompt(
                self.layout, self.model.tokenizer, prompt
            )  # better now than after training
        self.kid = KidLite0() if self.options.eval_generated and self.eval_set else None
        size = sum(x.size for x in jax.tree.leaves(self.template))
        options = runtime.compiler_options(loop=True) if size < SMALL else None
        self._generate = jax.jit(self._codes, static_argnums=5, compiler_options=options)
        self._counts: np.ndarray | None = None
        self._pictures: dict[str, np.ndarray] = {}  # for the next report

    def build(self, key: jax.Array) -> nnx.Module:
        model = self.model.build(key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        return model

    def initial(self) -> dict[str, np.ndarray]:
        return {}

    def describe(self) -> str:
        layout, report, loss = self.layout, self.data_report(), self.options.loss
        rows, columns = layout.grid
        kept = {k: report[k] for k in ("cropped", "smaller_than_target", "truncated_captions")}
        counted = ", ".join(f"{n} {name.replace('_', ' ')}" for name, n in kept.items() if n)
        text = f" + {loss.text_weight:g} text" if loss.text_weight else ""
        return (
            f"{rows}x{columns} of {layout.codes} codes {self.model.about}; {self.cfg.data.train}:"
            f" {report['images']} images{', mirrored too' * self.options.flip}"
            f"{f', {self.options.crops} crops each' if self.options.crops > 1 else ''}"
            f"{f' ({counted})' if counted else ''}; loss {loss.image_weight:g} image{text};"
            f" a caption is {layout.prompt!r}"
        )

    def data_report(self) -> dict[str, int]:
        return {**self.train_set.images.report, "truncated_captions": self.train_set.cut}

    def bad_samples(self) -> tuple[Bad, ...]:
        sets = [rows.images for rows in (self.train_set, self.eval_set) if rows]
        return tuple(bad for images in sets for bad in images.bad)

    def n_examples(self) -> int:
        return len(self.train_set)

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["weights"])

    def flops_per_unit(self, chosen: set[str]) -> float:
        """Forward and both halves of the backward pass; a frozen base has only one of them."""
        passes = 2 if all(".lora_" in path for path in chosen) else 3
        length = self.train_set.width + self.layout.count
        return passes * length * self.model.flops_per_token(length)

    def exported(self, params: Params) -> Params:
        return params

    def side_files(self, dtype: str | None, rewritten: set[str]) -> dict[str, Path | bytes]:
        return self.model.side_files(dtype)

    def original_files(self, dtype: str | None) -> dict[str, Path | bytes]:
        """`side_files` for the layout of the model's authors."""
        return self.model.original_files(dtype)

    # ---- batches --------------------------------------------------------------------------

    def prepare(self, params: Params, trained: set[str]) -> None:
        """Encode all pictures that the cache lacks, and say what the tokenizer makes of them."""
        if self._counts is not None:
            return
        vq, layout, store = self.model.vq, self.layout, self._store()
        self.train_set.cache(store, vq)
        counts = self._counts = code_counts(self.train_set, vq)
        if self.eval_set:
            self.eval_set.cache(store, vq)
            code_counts(self.eval_set, vq)  # raises where the codebook has no such code
        seen = ceiling(self.train_set, vq, CELL)
        self._pictures["tokenizer"] = seen.worst
        used = np.mean(counts > 0)
        print(
            f"{seen.text}; {used:.0%} of {layout.codes} codes in use, unigram entropy"
            f" {entropy(counts):.3f} of ln K {math.log(layout.codes):.3f}",
            flush=True,
        )

    def _store(self) -> ArrayCache:
        """The codes of this tokenizer and size alone; it says where all there is are others'."""
        folder = Path(self.options.cache).expanduser()
        name = f"codes {self.model.vq.fingerprint} {self.layout.grid}"
        store = ArrayCache(folder, name, jax.process_index())
        others = [path for path in folder.glob("codes_*") if path != store.folder]
        if others and not len(store):
            print(
                f"cache={self.options.cache} holds codes of {len(others)} other tokenizers or"
                " sizes, which are not used: pictures are encoded anew",
                flush=True,
            )
        return store

    def train_batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return train_loader(
            self.train_set,
            batch_size=self.cfg.batch_size,
            seed=self.cfg.seed,
            start_step=start_step,
            collate_fn=collate,
            rows=rows,
        )

    def shapes(self, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        return itertools.islice(self.train_batches(0, rows), 1)

    # ---- the loss -------------------------------------------------------------------------

    def loss(
        self, model: nnx.Module, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Cross-entropy of codes and prompt, each a mean over its own tokens of a row.

        Rows are the unit: sums over them, and their count, do not depend on how a batch is cut.
        """
        dropped = jax.vmap(jax.random.uniform)(stream(keys, DROP)) < self.options.caption_dropout
        adapter = stream(keys, ADAPTER) if self.cfg.lora.dropout else None
        total, metrics = self._cross_entropy(model, batch, dropped, adapter)
        return (total, jnp.sum(batch["weights"])), metrics

    def _cross_entropy(
        self, model: nnx.Module, batch: Batch, dropped: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """The weighted sum over rows, and its parts."""
        layout, options, weights = self.layout, self.options.loss, batch["weights"][:, None]
        rows = train_rows(layout, batch["prompt"], batch["length"], batch["codes"], dropped)
        speaker = self.model.speaker(model)
        embeds = speaker.embed(rows.tokens, rows.images, self.dtype, keys)
        hidden = speaker.llama.hidden(embeds=embeds, keys=keys, remat=self.remat, dtype=self.dtype)[
            0
        ]
        before_codes = jnp.take_along_axis(hidden, rows.places[..., None], axis=1)
        even = jnp.broadcast_to(weights / layout.count, rows.image_targets.shape)
        targets = rows.image_targets
        image, sums = speaker.cross_entropy(before_codes, targets, even, options.z, keys)
        total = options.image_weight * image
        metrics = {"image_ce": image - sums.get("z", 0.0), "accuracy": sums["correct"]}
        if options.text_weight:
            before_text = hidden[:, : rows.text_targets.shape[1]]
            spoken = rows.text_weights * weights
            text, text_sums = speaker.cross_entropy(
                before_text, rows.text_targets, spoken, options.z, keys
            )
            total = total + options.text_weight * text
            metrics["text_ce"] = text - text_sums.get("z", 0.0)
        return total, metrics

    # ---- looking --------------------------------------------------------------------------

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """How well held-out pictures are foretold, with their caption and without, and drawn."""
        self.prepare(params, set())
        pictures, self._pictures = self._pictures, {}
        if self.eval_set is None:
            return Report({}, pictures=pictures)
        data = subset(self.eval_set, self.options.eval_examples, self.cfg.seed)
        size = self.cfg.batch_size // self.cfg.micro_batches
        padded, sums = partial(collate, filler=data[0]), {}
        for batch in eval_batches(data, size, padded, local_rows(mesh, size)):
            for name, value in self._score(params, place_batch(batch, mesh)).items():
                sums[name] = sums.get(name, 0.0) + float(value)
        metrics = {name: value / len(data) for name, value in sums.items()}
        metrics["caption_use"] = metrics["ce_null"] - metrics["ce"]
        metrics |= self._baselines(data)
        if not self.options.eval_generated:
            return Report(metrics, pictures=pictures)
        measured, shown = self._generated(params)
        return Report(metrics | measured, pictures={**pictures, "held-out": shown})

    def _baselines(self, data: Any) -> dict[str, float]:
        """What to hold the cross-entropy against, and how well the tokenizer alone does."""
        assert self._counts is not None and self.eval_set is not None
        stored = [self.eval_set.stored(int(i)) for i in data.ids]
        return {
            "ln_k": math.log(self.layout.codes),
            "unigram_entropy": entropy(self._counts),
            "tokenizer_psnr": float(np.mean([one["psnr"] for one in stored])),
            "tokenizer_ssim": float(np.mean([one["ssim"] for one in stored])),
        }

    @partial(jax.jit, static_argnums=0)
    def _score(self, params: Params, batch: Batch) -> Metrics:
        """Sums over rows of their mean cross-entropy, with caption and without."""
        model = bind(self.template, cast(params, self.dtype))
        never = jnp.zeros(len(batch["weights"]), bool)
        _, with_caption = self._cross_entropy(model, batch, never, None)
        _, without = self._cross_entropy(model, batch, ~never, None)
        found = {"ce": with_caption["image_ce"], "ce_null": without["image_ce"]}
        rest = {
            name: with_caption[name] for name in ("accuracy", "text_ce") if name in with_caption
        }
        return {**found, **rest}

    def _generated(self, params: Params) -> tuple[dict[str, float], np.ndarray]:
        """Pictures drawn for held-out captions: numbers, and a grid beside what was wanted."""
        rows = self.eval_set
        assert rows is not None and self.kid is not None
        chosen = subset(rows, self.options.eval_generated, self.cfg.seed).ids
        captions = [rows.caption(int(i)) for i in chosen]
        codes, rate = self._drawn(params, captions, Request())
        made = self.model.vq.decode(codes)
        wanted = np.stack([rows.images[int(i)].pixels for i in chosen])
        back = self.model.vq.decode(np.stack([rows.stored(int(i))["codes"] for i in chosen]))
        usage = codebook_usage(jnp.bincount(codes.ravel(), length=self.layout.codes))
        far = nearest(self.train_set, codes.reshape(len(codes), -1))
        with jax.set_mesh(self.model.vq.mesh):
            distance = self.kid(wanted, made)
        metrics = {
            "kid-lite0": distance,
            "codebook_used": float(usage.used),
            "codebook_perplexity": float(usage.perplexity),
            "train_distance_least": float(far.min()),
            "train_distance_mean": float(far.mean()),
            "sampled_images_per_s": rate,
        }
        shown = np.linspace(0, len(chosen) - 1, min(SHOWN, len(chosen))).astype(int)
        cells = [(wanted[i], back[i], made[i]) for i in shown]
        headers = ("target", "tokenizer", "generated")
        return metrics, grid(cells, [captions[i] for i in shown], headers, CELL)

    def sample(self, params: Params) -> Look:
        prompts = list(self.options.sample.prompts)
        if not prompts and self.eval_set is None:
            images = self.train_set.images
            prompts = sorted({images.captions[i] for i in range(len(images.records))})[: 2 * SHOWN]
        if not prompts:
            return Look()  # an evaluation shows held-out captions
        made = self.model.vq.decode(self._draw(params, prompts, Request()))
        return Look(pictures={"prompts": grid([[one] for one in made], prompts, (), CELL)})

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        made = self.model.vq.decode(self._draw(params, prompts, request))
        return [Look(pictures={"made": one}) for one in made]

    def _draw(self, params: Params, prompts: list[str], request: Request) -> np.ndarray:
        """Codes (N, Y, X); each row's draws depend on the seed and its place alone."""
        return self._drawn(params, prompts, request)[0]

    def _drawn(
        self, params: Params, prompts: list[str], request: Request
    ) -> tuple[np.ndarray, float]:
        """Codes, and images a second: of the fastest portion, as the first may have to compile.

        Always as many at a time as a micro-batch has: others beside it would round it otherwise.
        """
        options, layout = self.options.sample, self.layout
        size = self.cfg.batch_size // self.cfg.micro_batches
        how = Sampling(
            *(
                getattr(options if getattr(request, name) is None else request, name)
                for name in Sampling._fields
            )
        )
        guidance = options.guidance if request.guidance is None else request.guidance
        ids = [encode_prompt(layout, self.model.tokenizer, prompt).ids for prompt in prompts]
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
        layout, model = self.layout, bind(self.template, cast(params, self.dtype))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(*draws)
        codes = generate_codes(
            self.model.speaker(model), tokens, mask, keys,
            count=layout.count, guidance=guidance, how=how, dtype=self.dtype,
        )  # fmt: skip
        return constrain(codes, None, None)

    def _read(self, spec: str, flip: bool, crops: int) -> CodeRows:
        factor = self.model.vq.cfg.factor
        side = self.layout.grid[0] * factor
        images = ImageSet(open_images(spec), side, factor, False, flip, crops)
        return CodeRows(images, self.layout, self.model.tokenizer)


def _check(options: ImageTokenOptions) -> None:
    if not 0 <= options.caption_dropout < 1:
        raise UserError(f"caption_dropout={options.caption_dropout} must be at least 0 and below 1")
    if not 1 <= options.crops <= 1 + len(CORNERS):
        raise UserError(f"crops={options.crops} must be 1 to {1 + len(CORNERS)}")
    if not options.cache:
        raise UserError("cache='' has no place for the pictures' codes; name a folder")
    for name in ("image_weight", "text_weight", "z"):
        if getattr(options.loss, name) < 0:
            raise UserError(f"loss.{name}={getattr(options.loss, name)} must be at least 0")
    if not options.loss.image_weight:
        raise UserError("loss.image_weight=0.0 trains no image; use task=llm for text alone")
