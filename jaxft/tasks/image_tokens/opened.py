"""An image-token model's folder of either family with its VQ tokenizer, opened for training."""

import dataclasses
import json
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from jaxft.core import runtime
from jaxft.core.configs.schema import Config
from jaxft.core.errors import UserError
from jaxft.core.guards.inside import refuse_outside
from jaxft.core.params import describe
from jaxft.data.images.dataset import CORNERS
from jaxft.models import registry
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.pipelines.image_decode import Unified
from jaxft.models.registry import Architecture
from jaxft.nn import lora
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.tasks.image_tokens.janus import JanusFolder, is_janus, open_janus
from jaxft.tasks.image_tokens.layout import (
    LAYOUT_JSON,
    ImageLayout,
    check_tokenizer,
    encode_prompt,
    extended,
    read_layout,
    row_length,
)
from jaxft.tasks.image_tokens.options import ImageTokenOptions, TokenSample
from jaxft.tasks.image_tokens.tokenizer import ImageTokenizer, open_tokenizer
from jaxft.weights.adapters import peft, peft_folder
from jaxft.weights.adapters.peft_folder import GIVE_BASE, MERGE, PeftAdapter, is_adapter
from jaxft.weights.folders.transformers import HEAD, TABLE, Source, export_config, open_source
from jaxft.weights.transfer import Part
from jaxft.weights.views import Grafted

TABLES = (TABLE, HEAD)  # one row for each id


class UnifiedModel(NamedTuple):
    """Family N: the language model at the root, vq/ and imagetoken.json beside it.

    The vocabulary is that of training, which is the larger one of a graft.
    """

    source: Source
    cfg: DecoderConfig
    layout: ImageLayout
    vq: ImageTokenizer
    tokenizer: Any

    @property
    def part(self) -> Part:
        return self.architecture.part(self.source, self.cfg)

    @property
    def architecture(self) -> Architecture:
        return registry.find(self.source.config, "decoder")

    @property
    def about(self) -> str:
        return f"in one vocabulary with {self.layout.text_vocab} of text; no caption is NULL"

    def build(self, key: jax.Array) -> nnx.Module:
        return self.architecture.module(self.cfg, key=key)

    def code_model(self, model: Any) -> Unified:
        return Unified(model, self.layout.image_offset, self.layout.codes)

    def flops_per_token(self, length: int) -> float:
        return self.architecture.flops(self.cfg, length)

    def side_files(self, dtype: str | None) -> dict[str, Path | bytes]:
        """Return every file of an export beside the language model's weights."""
        files = dict(self.source.side_files)
        config = export_config(self.source.config, dtype)
        files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        files[LAYOUT_JSON] = self.layout.to_json().encode()
        return {**files, **self.vq.files}

    def original_files(self, dtype: str | None) -> dict[str, Path | bytes]:
        raise UserError(
            f"export.kind='original' is the layout of Janus's authors, and {self.source.name} is of"
            " family N; use export.kind='folder'"
        )


ImageModel = UnifiedModel | JanusFolder  # a folder of either family, opened


def open_model(spec: str, options: ImageTokenOptions, weights: bool, seed: int) -> ImageModel:
    """Open the model of a folder, or graft the codes of `options.graft` onto a text model.

    A Janus is family J, and every other model is family N. Raises UserError for an adapter's
    folder, and if the language model, its imagetoken.json, the VQ tokenizer and the options do not
    fit each other.
    """
    if is_adapter(spec):
        raise UserError(f"model={spec} is an adapter; {GIVE_BASE}")
    source = open_source(spec, weights)
    if is_janus(source):
        return open_janus(spec, source, options)
    if "text_config" in source.config:
        raise UserError(
            f"{spec}/config.json: model_type={source.config.get('model_type')!r} has its own part"
            " for pictures, which image tokens do not replace; give a model of texts alone"
        )
    source = registry.find(source.config, "decoder").opened(source)
    found = source.side_files.get(LAYOUT_JSON)
    _check_keys(spec, options, found is not None)
    vq = open_tokenizer(options.graft or options.tokenizer or _own_vq(spec, source))
    tokenizer = load_tokenizer(source.tokenizer_dir())
    if found is None:
        source, layout = _grafted(source, options, vq, seed)
    else:
        content = found if isinstance(found, bytes) else found.read_bytes()
        layout = read_layout(content, f"{spec}/{LAYOUT_JSON}")
    asked = {"prompt": options.prompt, "max_caption_tokens": options.max_caption_tokens}
    layout = dataclasses.replace(layout, **{key: value for key, value in asked.items() if value})
    where = spec if options.graft else f"{spec}/{LAYOUT_JSON}"
    cfg = registry.read_decoder(source.config)
    _check_fit(layout, cfg, vq, options, where)
    check_tokenizer(layout, tokenizer, where)
    return UnifiedModel(source, cfg, layout, vq, tokenizer)


def open_folder(spec: str) -> ImageModel:
    """Open a folder without changes, at its own resolution."""
    sample = TokenSample(prompts=(), guidance=1.0)
    keys = ImageTokenOptions(resolution=0, cache="", caption_dropout=0.0, sample=sample)
    return open_model(spec, keys, True, 0)


class OpenedImageModel:
    """An image-token model of either family. Implements `jaxft.tasks.Opened`."""

    def __init__(self, cfg: Config):
        self.options = ImageTokenOptions(**cfg.own)
        _check_options(self.options)
        pretrained = cfg.init == "pretrained"
        self.model = open_model(cfg.model, self.options, pretrained, cfg.seed)
        self.layout = self.model.layout
        if cfg.export.kind == "original":
            self.model.original_files(None)  # raises now rather than after training
        self.dtype = runtime.resolve_dtype(cfg.compute_dtype)
        self.parts = (self.model.part,)
        self.adapter: PeftAdapter | None = None
        self.saved: dict[str, np.ndarray] = {}
        self.cfg = self._with_adapter(cfg) if cfg.lora.from_ else cfg
        rows = self.cfg.lora.tokens or (self.adapter and self.adapter.token_ids)
        for key, value in (
            ("dora", self.cfg.lora.dora),
            ("lokr", cfg.lora.lokr),
            ("tokens", rows),
        ):
            if value:
                fix = MERGE if cfg.lora.from_ else "leave it out"
                raise UserError(f"lora.{key}={value!r} is not for task=image_tokens; {fix}")
        self.template = jax.eval_shape(self.build, jax.random.key(0))
        for prompt in self.options.sample.prompts:  # raises now too
            encode_prompt(self.layout, self.model.tokenizer, prompt)

    def build(self, key: jax.Array) -> nnx.Module:
        model = self.model.build(key)
        lora.add(model, self.cfg.lora, jax.random.fold_in(key, 1))
        return model

    def initial(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        if self.adapter is None:
            return {}
        return self.saved | peft.load(self.adapter, self.parts[0], describe(self.template))

    def _with_adapter(self, cfg: Config) -> Config:
        """Read the PEFT folder of `lora.from`. Returns the config with the settings that it fixes.

        The modules that it stores whole train again, unless `trainable` is set.
        """
        part, plain = self.parts[0], jax.eval_shape(self.model.build, jax.random.key(0))
        found = peft_folder.read(Path(cfg.lora.from_).expanduser(), cfg.model, part.whole)
        self.saved = peft.load_whole(found, part, describe(plain))
        self.adapter = peft_folder.fit(found, part.entries(describe(plain)))
        own = lora.continued(cfg.lora, self.adapter.lora, lora.projections(plain))
        trainable = cfg.trainable or "|".join((lora.PATHS, *map(re.escape, self.saved)))
        return dataclasses.replace(cfg, lora=own, trainable=trainable)

    def describe(self) -> str:
        layout, loss = self.layout, self.options.loss
        rows, columns = layout.grid
        text = f" + {loss.text_weight:g} text" if loss.text_weight else ""
        return (
            f"{rows}x{columns} of {layout.codes} codes {self.model.about};"
            f" loss {loss.image_weight:g} image{text}; a caption is {layout.prompt!r}"
        )


def _own_vq(spec: str, source: Source) -> str:
    if source.folder is None or not (source.folder / "vq" / "config.json").is_file():
        raise UserError(
            f"{spec} has no vq/config.json beside {LAYOUT_JSON}; give tokenizer=VQ_FOLDER"
        )
    refuse_outside(source.folder, [source.folder / "vq"])  # its files are copied too
    return str(source.folder / "vq")


def _grafted(
    source: Source, options: ImageTokenOptions, vq: ImageTokenizer, seed: int
) -> tuple[Source, ImageLayout]:
    """Return the text model with four special rows and a row for each code, and its layout.

    The rows extend the input table, and the output table if there is one.
    """
    vocab = registry.read_decoder(source.config).vocab_size
    side = options.resolution // vq.cfg.factor
    layout = extended(vocab, vq.cfg.codes, (side, side), vq.fingerprint)
    config, tensors = {**source.config, "vocab_size": layout.vocab_size}, source.tensors
    if tensors is not None:
        tables = tuple(key for key in TABLES if key in set(tensors.keys()))
        tensors = Grafted(tensors, tables, layout.vocab_size - vocab, seed)
    return dataclasses.replace(source, config=config, tensors=tensors), layout


def _check_keys(spec: str, options: ImageTokenOptions, has_layout: bool) -> None:
    if has_layout and options.graft:
        raise UserError(
            f"graft={options.graft!r}, but {spec} generates images already (it has {LAYOUT_JSON});"
            " leave graft empty, or give tokenizer=VQ_FOLDER of the same codes"
        )
    if not has_layout and not options.graft:
        raise UserError(
            f"{spec} has no {LAYOUT_JSON}, so it is a text model; give graft=VQ_FOLDER to teach it"
            " images"
        )
    if options.graft and not options.resolution:
        raise UserError(
            f"resolution=0 takes the folder's own, but {spec} has none before its graft; set it to"
            " the pixels a side of an image"
        )
    if options.graft and options.tokenizer:
        raise UserError(
            f"graft={options.graft!r} and tokenizer={options.tokenizer!r} are two VQ tokenizers;"
            " give graft alone"
        )


def _check_fit(
    layout: ImageLayout,
    cfg: DecoderConfig,
    vq: ImageTokenizer,
    options: ImageTokenOptions,
    where: str,
) -> None:
    """Raise UserError if ids would index another table, or pictures have another size."""
    if layout.vocab_size != cfg.vocab_size:
        raise UserError(
            f"{where}: image_offset={layout.image_offset} + codes={layout.codes} is not the"
            f" vocab_size={cfg.vocab_size} of config.json; they come from two models"
        )
    if layout.codes != vq.cfg.codes:
        raise UserError(
            f"{where}: codes={layout.codes}, but the tokenizer {vq.spec} has a codebook of"
            f" {vq.cfg.codes}; give the tokenizer that the model was trained with"
        )
    if layout.vq != vq.fingerprint:
        raise UserError(
            f"{where}: vq={layout.vq}, but the encoder of {vq.spec} is {vq.fingerprint}: its codes"
            " mean something else; give the tokenizer that the model was trained with"
        )
    factor, (rows, columns) = vq.cfg.factor, layout.grid
    if (rows * factor, columns * factor) != (options.resolution or rows * factor,) * 2:
        raise UserError(
            f"resolution={options.resolution} is not the {rows}x{columns} codes of {factor} pixels"
            f" each of {where}; set resolution={rows * factor}"
        )
    if row_length(layout) + 1 > cfg.max_positions:
        raise UserError(
            f"{where}: max_caption_tokens={layout.max_caption_tokens} and {layout.count} codes"
            f" exceed max_position_embeddings={cfg.max_positions} of config.json; lower one"
        )


def _check_options(options: ImageTokenOptions) -> None:
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
