"""Pretrained models of every family for a notebook, as `jaxft.load` returns them."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxft.core.errors import UserError
from jaxft.core.params import Params, bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.data.text.dataset import prompt_tokens
from jaxft.data.text.vocabulary import check_ids
from jaxft.demo import demo_path
from jaxft.models import registry
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vqgan import VQModel
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.generation.generate import generate
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.models.pipelines import families, stable_diffusion
from jaxft.models.pipelines.families import AnyConfig, AnyPipeline
from jaxft.models.pipelines.image_decode import generate_codes
from jaxft.models.pipelines.ldm import SINGLE, open_model
from jaxft.models.pipelines.stable_diffusion import NOTHING, Conditions, Guidance, zeroed
from jaxft.nn.pixels import to_pixels
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.tasks.diffusion.captions import Captions, load_captions
from jaxft.tasks.diffusion.opened import check_sampler
from jaxft.tasks.image_tokens.layout import (
    LAYOUT_JSON,
    encode_prompt,
    left_padded,
    null_prompt,
)
from jaxft.tasks.image_tokens.opened import ImageModel, open_folder
from jaxft.weights import transfer
from jaxft.weights.folders.diffusers import Pipeline, open_component, open_pipeline
from jaxft.weights.folders.transformers import TOKENIZER_FILES, Source, open_source
from jaxft.weights.locate import INDEX
from jaxft.weights.transfer import Part


@dataclass(frozen=True)
class LoadedDecoder:
    """A causal language model. `model.hidden`, `model.head` and the cache are for custom loops."""

    params: Params
    config: DecoderConfig
    model: Decoder
    source: Source

    @cached_property
    def tokenizer(self) -> Any | None:
        """Return the folder's tokenizer, or None. It is read at the first access."""
        there = TOKENIZER_FILES & self.source.side_files.keys()
        return load_tokenizer(self.source.tokenizer_dir()) if there else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Return fp32 logits. A token attends to its own segment. Segment 0 is padding."""
        return self.model(tokens, positions, segment_ids)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        max_new: int = 64,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> list[str]:
        """Return the continuation of each prompt, up to an end token or `max_new` tokens.

        temperature 0 is greedy, top_k 0 and top_p 1 are off. The samples of a row depend on `seed`
        and on its index. Raises UserError for a model without a tokenizer, and for a token without
        a row in the embedding table.
        """
        if self.tokenizer is None:
            self.source.tokenizer_dir()  # raises an error that names the missing files
        tokenizer: Any = self.tokenizer
        texts = _texts(prompts)
        rows = [prompt_tokens(tokenizer, text) for text in texts]
        size, images = self.config.vocab_size, self.config.image_ids
        for text, row in zip(texts, rows, strict=True):
            check_ids(row, size, tokenizer, f"prompt {text[:60]!r}", images)
        tokens, segments = _left_padded(rows)
        stops, keys = self._stop_ids(), jax.random.split(jax.random.key(seed), len(rows))
        how = _sampling(temperature, top_k, top_p)
        dtype = self.params["embed_tokens.embedding"].dtype
        made, lengths = _generate(
            self.model, tokens, segments, keys,
            max_new=max_new, stop_ids=stops, how=how, dtype=dtype,
        )  # fmt: skip
        kept = [row[:n] for row, n in zip(np.asarray(made), np.asarray(lengths), strict=True)]
        kept = [row[:-1] if len(row) and row[-1] in stops else row for row in kept]
        return [tokenizer.decode(row, skip_special_tokens=True) for row in kept]

    def _stop_ids(self) -> tuple[int, ...]:
        """Return the end tokens of the generation config, the config and the tokenizer."""
        stated = self.source.generation_config.get("eos_token_id") or ()
        own = self.tokenizer.eos_token_id if self.tokenizer else None
        ids = {*self.config.eos_ids, *(stated if isinstance(stated, list | tuple) else (stated,))}
        return tuple(sorted(ids | (set() if own is None else {own})))


_generate = jax.jit(generate, static_argnames=("max_new", "stop_ids", "how", "dtype"))


def _texts(prompts: str | Sequence[str]) -> list[str]:
    """Return prompts as a list. Raises UserError for none, and for what is no text."""
    texts = (
        [prompts]
        if isinstance(prompts, str) or not isinstance(prompts, Iterable)
        else list(prompts)
    )
    wrong = [type(text).__name__ for text in texts if not isinstance(text, str)]
    if wrong or not texts:
        found = f"hold a {wrong[0]}" if wrong else "are empty"
        raise UserError(f"the prompts {found}; give a text, or a list of texts")
    return texts


def _sampling(temperature: float, top_k: int, top_p: float) -> Sampling:
    """Return settings of sampling. Raises UserError for numbers that give no probabilities."""
    if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
        raise UserError(
            f"temperature={temperature}, top_k={top_k} and top_p={top_p} are refused; give"
            " temperature and top_k of at least 0, and top_p above 0 and at most 1"
        )
    return Sampling(temperature, top_k, top_p)


def _left_padded(rows: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return prompts [B, T] padded on the left, and their segments [B, T], 0 on the padding."""
    width = max(len(row) for row in rows)
    tokens = np.zeros((len(rows), width), np.int32)
    segments = np.zeros_like(tokens)
    for i, row in enumerate(rows):
        tokens[i, width - len(row) :], segments[i, width - len(row) :] = row, 1
    return tokens, segments


@dataclass(frozen=True)
class LoadedImageTokens:
    """A model that continues a caption with an image's codes. `config` is that of its decoder."""

    params: Params
    config: DecoderConfig
    tokenizer: Any
    model: nnx.Module
    opened: ImageModel

    def __call__(
        self, tokens: Int[Array, "B T"], images: Bool[Array, "B T"]
    ) -> Float[Array, "B T K"]:
        """Return fp32 logits of the next code after each token. `images` marks the codes."""
        code_model = self.opened.code_model(self.model)
        dtype = jax.tree.leaves(self.params)[0].dtype
        hidden, _ = code_model.decoder.hidden(embeds=code_model.embed(tokens, images, dtype))
        flat = code_model.scorer()(hidden.reshape(-1, hidden.shape[-1]))  # [B * T, K]
        return flat.reshape(*hidden.shape[:2], -1)  # [B, T, K]

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        guidance: float = 3.0,
        seed: int = 0,
    ) -> UInt8[np.ndarray, "N Y X 3"]:
        """Return a picture of each prompt. `guidance` is the classifier-free scale, off at 1."""
        layout, texts = self.opened.layout, _texts(prompts)
        rows = [encode_prompt(layout, self.tokenizer, text).ids for text in texts]
        nulls = [null_prompt(layout, row) for row in rows]
        tokens, mask = map(jnp.asarray, left_padded(layout, rows + nulls))
        keys = jax.random.split(jax.random.key(seed), len(rows))
        how, dtype = _sampling(temperature, top_k, top_p), jax.tree.leaves(self.params)[0].dtype

        @jax.jit
        def draw(model: nnx.Module) -> Int[Array, "N S"]:
            return generate_codes(
                self.opened.code_model(model), tokens, mask, keys,
                count=layout.count, guidance=guidance, how=how, dtype=dtype,
            )  # fmt: skip

        codes = np.asarray(draw(self.model)).reshape(-1, *layout.grid)  # [N, Y, X]
        return self.opened.vq.decode(codes)


@dataclass(frozen=True)
class LoadedAutoencoder:
    """A VAE or a VQ tokenizer of images, with `model.encode` and `model.decode`."""

    params: Params
    config: Any
    model: VAE | VQModel
    tokenizer: None = None

    def __call__(self, images: Float[Array, "B Y X 3"]) -> Float[Array, "B Y X 3"]:
        """Encode images in [-1, 1] to the mean of their latents, or to codes, and decode them."""
        if isinstance(self.model, VAE):
            return self.model.decode(self.model.encode(images).mean.astype(images.dtype))
        return self.model.decode(self.model.encode(images).quantized.astype(images.dtype))


@dataclass(frozen=True)
class LoadedPipeline:
    """A Stable Diffusion pipeline. `tokenizer` maps a caption to ids for each text encoder."""

    params: Params
    config: AnyConfig
    tokenizer: Captions
    model: AnyPipeline

    def __call__(
        self,
        latents: Float[Array, "B Y X C"],
        timesteps: Float[Array, " B"],
        captions: Sequence[str],
    ) -> Float[Array, "B Y X C"]:
        """Return the denoiser's prediction for noisy, scaled latents of uncropped pictures.

        timesteps: those of DDPM's noise, or the sigmas in [0, 1] of models that are
        trained by flow matching.
        """
        text = self.model.encode_text(self._ids(captions), dtype=latents.dtype)
        y, x = (side * self.config.vae.factor for side in latents.shape[1:3])
        size = jnp.broadcast_to(jnp.array([y, x, 0, 0, y, x], jnp.float32), (len(latents), 6))
        given = Conditions(text, size)
        return self.model.predict(latents, timesteps, given, dtype=latents.dtype)

    def sample(
        self,
        prompts: str | Sequence[str],
        *,
        size: int | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        sampler: str = "dpm++",
        seed: int = 0,
    ) -> UInt8[np.ndarray, "N Y X 3"]:
        """Return a picture of each prompt. The noise of a row depends on `seed` and on its index.

        size: pixels a side, by default the size in the denoiser's config.json. steps, guidance: 30
        and 7.5 by default, those of its publisher for FLUX.1. sampler: ddim (for DDPM's noise),
        euler or dpm++. Raises UserError for an unknown sampler, for no size at all,
        and for a UNet with a picture as input (the command `sample` has the option --image).
        """
        cfg, texts = self.config, _texts(prompts)
        if cfg.conditioning != NOTHING:
            raise UserError(
                "this pipeline needs a picture as input; use python -m jaxft.sample --workdir DIR"
                " --image FILE of a run"
            )
        check_sampler("sampler", sampler, cfg)
        if size is None and cfg.sample_size is None:
            raise UserError("unet/config.json has no sample_size; give size=512, in pixels a side")
        side = (cfg.sample_size or 0) if size is None else size // cfg.vae.factor
        steps = cfg.drawing.steps if steps is None else steps
        how = Guidance(cfg.drawing.guidance if guidance is None else guidance)
        keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(seed)))(np.arange(len(texts)))
        shape, dtype = (side, side, cfg.vae.latent_channels), jax.tree.leaves(self.params)[0].dtype

        @jax.jit
        def draw(model: AnyPipeline, ids: Array) -> UInt8[Array, "N Y X 3"]:
            text = model.encode_text(ids[1:], dtype=dtype)
            null = model.encode_text(ids[:1], dtype=dtype)
            null = zeroed(null) if cfg.zero_null else null
            null = jax.tree.map(lambda x: jnp.repeat(x, len(texts), axis=0), null)
            noise = jax.vmap(lambda key: jax.random.normal(key, shape))(keys)
            images = stable_diffusion.generate(
                model, cfg, text, null, noise, cfg.process().sampler(sampler, steps, (side, side)),
                how, dtype,
            )  # fmt: skip
            return to_pixels(images)

        return np.asarray(draw(self.model, self._ids(["", *texts])))

    def _ids(self, captions: Sequence[str]) -> Int[Array, "B E T"]:
        return jnp.asarray([self.tokenizer(caption) for caption in captions])


@dataclass(frozen=True)
class LoadedNetwork:
    """A single component of a pipeline: a UNet, or a CLIP text encoder."""

    params: Params
    config: Any
    model: Any
    tokenizer: None = None

    def __call__(self, *inputs: Array) -> Any:
        """Return the outputs of the model. The inputs are those of `model`."""
        return self.model(*inputs)


Loaded = LoadedDecoder | LoadedImageTokens | LoadedAutoencoder | LoadedPipeline | LoadedNetwork


def load(path_or_id: str | Path, dtype: str = "float32") -> Loaded:
    """Return the model that `path_or_id` names, whole on the first device, as in `jaxft.load`."""
    if not isinstance(path_or_id, str | Path):
        raise UserError(f"a {type(path_or_id).__name__} names no model; give a path or a hub id")
    try:
        jnp.dtype(dtype)
    except TypeError:
        raise UserError(f"dtype={dtype!r} is not known; give float32 or bfloat16") from None
    spec = str(path_or_id)
    kind = family_of(spec)
    if kind == "pipeline":
        return _load_pipeline(open_model(spec), dtype)
    if kind == "image_tokens":
        opened = open_folder(spec)
        model, params = _bound(opened.build, (opened.part,), dtype)
        return LoadedImageTokens(params, opened.cfg, opened.tokenizer, model, opened)
    if kind == "decoder":
        source = open_source(spec)
        architecture = registry.find(source.config, kind)
        source = architecture.opened(source)
    else:
        source = open_component(spec, kind)
        architecture = registry.find(source.config, kind)
    cfg = architecture.config(source.config, f"{spec}/config.json")
    build = lambda key: architecture.module(cfg, key=key)  # noqa: E731
    model, params = _bound(build, (architecture.part(source, cfg),), dtype)
    if kind == "decoder":
        return LoadedDecoder(params, cfg, model, source)
    return (LoadedAutoencoder if kind == "autoencoder" else LoadedNetwork)(params, cfg, model)


def _load_pipeline(pipeline: Pipeline, dtype: str) -> LoadedPipeline:
    cfg = families.read_config(pipeline)
    model, params = _bound(partial(families.build, cfg), families.parts(pipeline, cfg), dtype)
    return LoadedPipeline(params, cfg, load_captions(pipeline, cfg.texts), model)


def _bound(build: Any, parts: Sequence[Part], dtype: str) -> tuple[Any, Params]:
    """Return the module of `build(key)` with the parameters of its parts, and these by path."""
    template = jax.eval_shape(build, jax.random.key(0))
    leaves, params = describe(template), {}
    places = shardings(leaves, one_device_mesh())
    for part in parts:
        own = {path for path in leaves if path.startswith(part.prefix)}
        params |= transfer.load(part, leaves, places, dtype, own)
    return bind(template, params), params


def family_of(spec: str) -> str:
    """Return "pipeline", "image_tokens" or a family of the registry's table for a spec.

    The files model_index.json, imagetoken.json and config.json of a folder decide. Any other
    model counts as a decoder, whose loading raises an error that names what is not supported.
    """
    path = demo_path(spec, "model") or Path(spec).expanduser()
    if path.exists():
        alone = path.suffix in SINGLE and not (path.parent / "config.json").is_file()
        if alone or (path / INDEX).is_file():
            return "pipeline"
    elif spec.startswith("pip:") or re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec):
        try:
            open_pipeline(spec, weights=False)
            return "pipeline"
        except UserError:
            pass
    found = registry.find_family(config_in(path))
    return "image_tokens" if (path / LAYOUT_JSON).is_file() else found or "decoder"


def config_in(folder: Path) -> Mapping[str, Any]:
    """Return config.json of a folder, or {} without one that can be read."""
    try:
        content = json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
