"""An image-token model's folder: the language model at its root, vq/ and imagetoken.json beside."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError
from jaxft.models.llama_config import LlamaConfig
from jaxft.tasks.image_codes import ImageTokenizer
from jaxft.tasks.image_layout import FILE, ImageLayout, check_tokenizer, extended, read_layout
from jaxft.tasks.options import ImageTokenOptions
from jaxft.tasks.tokens import load_tokenizer
from jaxft.weights.graft import Grafted
from jaxft.weights.pipeline import demo_folder
from jaxft.weights.sources import Source, export_config, open_source

TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # a row an id
JANUS = "JanusForConditionalGeneration"


class ImageModel(NamedTuple):
    """What a folder holds, with the vocabulary that training sees (of a graft: the larger one)."""

    source: Source
    cfg: LlamaConfig
    layout: ImageLayout
    vq: ImageTokenizer
    tokenizer: Any

    def side_files(self, dtype: str | None) -> dict[str, Path | bytes]:
        """All that an export holds beside the language model's weights."""
        files = dict(self.source.side_files)
        config = export_config(self.source.config, dtype)
        files["config.json"] = (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
        files[FILE] = self.layout.to_json().encode()
        return {**files, **self.vq.files}


def open_model(spec: str, options: ImageTokenOptions, weights: bool, seed: int) -> ImageModel:
    """The model of a folder, or with `options.graft` a text model made to speak that VQ's codes.

    Raises UserError where the language model, its imagetoken.json, the VQ tokenizer and the
    options do not fit each other.
    """
    source = open_source(str(demo_folder(spec)) if spec.startswith("demo:") else spec, weights)
    _check_kind(spec, source)
    found = source.side_files.get(FILE)
    _check_keys(spec, options, found is not None)
    vq = ImageTokenizer(options.graft or options.tokenizer or _own_vq(spec, source))
    tokenizer = load_tokenizer(source.tokenizer_dir())
    if found is None:
        source, layout = _grafted(source, options, vq, seed)
    else:
        content = found if isinstance(found, bytes) else found.read_bytes()
        layout = read_layout(content, f"{spec}/{FILE}")
    layout = _changed(layout, options)
    where = spec if options.graft else f"{spec}/{FILE}"
    cfg = LlamaConfig.from_hf(source.config)
    _check_fit(layout, cfg, vq, options, where)
    check_tokenizer(layout, tokenizer, where)
    return ImageModel(source, cfg, layout, vq, tokenizer)


def _own_vq(spec: str, source: Source) -> str:
    if source.folder is None or not (source.folder / "vq" / "config.json").is_file():
        raise UserError(f"{spec} has no vq/config.json beside {FILE}; give tokenizer=VQ_FOLDER")
    return str(source.folder / "vq")


def _grafted(
    source: Source, options: ImageTokenOptions, vq: ImageTokenizer, seed: int
) -> tuple[Source, ImageLayout]:
    """The text model with four more rows and one for each code, in both of its tables."""
    vocab = LlamaConfig.from_hf(source.config).vocab_size
    side = options.resolution // vq.cfg.factor
    layout = extended(vocab, vq.cfg.codes, (side, side), vq.fingerprint)
    config, tensors = {**source.config, "vocab_size": layout.vocab_size}, source.tensors
    if tensors is not None:
        tables = tuple(key for key in TABLES if key in set(tensors.keys()))
        tensors = Grafted(tensors, tables, layout.vocab_size - vocab, seed)
    return dataclasses.replace(source, config=config, tensors=tensors), layout


def _changed(layout: ImageLayout, options: ImageTokenOptions) -> ImageLayout:
    asked = {"prompt": options.prompt, "max_caption_tokens": options.max_caption_tokens}
    return dataclasses.replace(layout, **{key: value for key, value in asked.items() if value})


def _check_kind(spec: str, source: Source) -> None:
    if source.config.get("model_type") == "janus" or JANUS in (
        source.config.get("architectures") or ()
    ):
        raise UserError(
            f"{spec} is a {JANUS}, whose embeddings and head of images are not supported yet;"
            f" give a causal language model with {FILE}, or a text model and graft=VQ_FOLDER"
        )


def _check_keys(spec: str, options: ImageTokenOptions, has_layout: bool) -> None:
    if has_layout and options.graft:
        raise UserError(
            f"graft={options.graft!r}, but {spec} speaks codes already (it has {FILE}); leave"
            " graft empty, or give tokenizer=VQ_FOLDER of the same codes"
        )
    if not has_layout and not options.graft:
        raise UserError(
            f"{spec} has no {FILE}, so it is a text model; give graft=VQ_FOLDER to teach it images"
        )
    if options.graft and options.tokenizer:
        raise UserError(
            f"graft={options.graft!r} and tokenizer={options.tokenizer!r} are two VQ tokenizers;"
            " give graft alone"
        )


def _check_fit(
    layout: ImageLayout,
    cfg: LlamaConfig,
    vq: ImageTokenizer,
    options: ImageTokenOptions,
    where: str,
) -> None:
    """Refuse what would index another table, or draw pictures of another size."""
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
    if (rows * factor, columns * factor) != (options.resolution,) * 2:
        raise UserError(
            f"resolution={options.resolution} is not the {rows}x{columns} codes of {factor} pixels"
            f" each of {where}; set resolution={rows * factor}"
        )
    if layout.length + 1 > cfg.max_positions:
        raise UserError(
            f"{where}: max_caption_tokens={layout.max_caption_tokens} and {layout.count} codes"
            f" exceed max_position_embeddings={cfg.max_positions} of config.json; lower one"
        )
