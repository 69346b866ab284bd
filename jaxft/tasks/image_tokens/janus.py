"""Family J: a Janus folder, opened for the image-token task and exported again."""

import dataclasses
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.autoencoders.vq_config import JANUS as VQ_KIND
from jaxft.models.autoencoders.vq_config import VQConfig
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.decoders.files import with_prefix
from jaxft.models.pipelines import janus
from jaxft.models.pipelines.janus import Janus, JanusConfig
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.tasks.image_tokens.layout import CAPTION, JanusLayout, check_tokenizer, row_length
from jaxft.tasks.image_tokens.options import ImageTokenOptions
from jaxft.tasks.image_tokens.tokenizer import ImageTokenizer, unit_rows
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.folders import janus_original as janus_layout
from jaxft.weights.folders.diffusers import open_component
from jaxft.weights.folders.transformers import HEAD, Source, export_config
from jaxft.weights.transfer import Part
from jaxft.weights.views import Overlaid, Renamed

# Templates of the releases: of Janus-Pro, whose tokenizer has the roles, and of Janus 1.3B.
PRO, OLD = f"<|User|>: {CAPTION}\n\n<|Assistant|>:", f"User: {CAPTION}\n\nAssistant:"
BOI, PAD = "<begin_of_image>", "<｜▁pad▁｜>"
JANUS_PROMPT_TOKENS = 128  # default limit of a prompt, in tokens
GUIDANCE = 5  # the authors' value
JANUS_CODEBOOK = f"{janus.VQ}quantize.embedding.weight"
JANUS_TABLE = "model.language_model.embed_tokens.weight"
JANUS_PROCESSOR = "JanusImageProcessor"
COLOURS = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
GENERATION_MODULES = ("generation_embeddings", "generation_aligner", "generation_head")


class JanusFolder(NamedTuple):
    """An opened Janus folder.

    The codebook rows in `source` have unit length, as in an export.
    """

    source: Source
    whole: JanusConfig
    layout: JanusLayout
    vq: ImageTokenizer
    tokenizer: Any

    @property
    def cfg(self) -> DecoderConfig:
        return self.whole.text

    @property
    def part(self) -> Part:
        return janus.ARCHITECTURE.part(self.source, self.whole)._replace(whole=GENERATION_MODULES)

    @property
    def about(self) -> str:
        return "in a table of their own; no caption is pad in its place"

    def build(self, key: jax.Array) -> nnx.Module:
        return Janus(self.whole, key=key)

    def code_model(self, model: Any) -> Janus:
        return model

    def flops_per_token(self, length: int) -> float:
        return janus.flops_per_token(self.whole, length)

    def side_files(self, dtype: str | None) -> dict[str, Path | bytes]:
        """Return the folder's files, with changed configs.

        With them stock transformers samples like jaxft.
        """
        files = dict(self.source.side_files)
        files["config.json"] = _dump(self._config(dtype))
        files["generation_config.json"] = _dump(self._generation())
        names = ("processor_config.json", "preprocessor_config.json")
        for name in [name for name in names if name in files] or names[1:]:
            processor = _json(files.get(name, b"{}"), name)
            inner = processor.get("image_processor")
            # All releases trained on pixels within [-1, 1]. transformers assumes CLIP's colours.
            if isinstance(inner, dict):
                processor = {**processor, "image_processor": {**inner, **COLOURS}}
            else:
                processor = {"image_processor_type": JANUS_PROCESSOR, **processor, **COLOURS}
            files[name] = _dump(processor)
        return files

    def original_files(self, dtype: str | None) -> dict[str, Path | bytes]:
        """Return the files beside the weights in the authors' layout."""
        conversation = "deepseek_old" if self.layout.prompt == OLD else "deepseek"
        files, config = self.side_files(dtype), self._config(dtype)
        return janus_layout.original_files(files, config, conversation)

    def _config(self, dtype: str | None) -> dict[str, Any]:
        """Return config.json with untied embeddings.

        Transformers ties them if the key is absent, and would lose the head of text.
        """
        config = export_config(self.source.config, dtype)
        config["text_config"] = export_config(config.get("text_config") or {}, dtype)
        return {**config, "tie_word_embeddings": False}

    def _generation(self) -> dict[str, Any]:
        """Return generation_config.json with BOI under generation_kwargs.

        `generate` reads BOI there, and not at the top level.
        """
        found = dict(self.source.generation_config)
        kept = {**(found.get("generation_kwargs") or {}), "boi_token_id": self.layout.boi}
        for key in ("boi_token_id", "_from_model_config"):  # the latter would rebuild the file
            found.pop(key, None)
        ids = {"bos_token_id": self.layout.bos, "pad_token_id": self.layout.pad}
        start = {"guidance_scale": GUIDANCE, "eos_token_id": self.tokenizer.eos_token_id}
        return {**start, **found, **ids, "generation_kwargs": kept}


# ---- opening ----------------------------------------------------------------------------------


def is_janus(source: Source) -> bool:
    """Return whether a folder is a Janus, in the layout of transformers or the original one."""
    names = source.config.get("architectures") or ()
    return registry.find_family(source.config) == "image_tokens" or janus.CLASS_NAME in names


def open_janus(spec: str, source: Source, options: ImageTokenOptions) -> JanusFolder:
    """Open the folder of a Janus. Raises UserError if its pieces and the options do not fit."""
    if source.config.get("model_type") == janus_layout.ORIGINAL_TYPE:
        source = janus_layout.as_transformers(source)
    cfg = JanusConfig.from_hf(source.config, f"{spec}/config.json")
    _check(spec, cfg, options)
    tensors = inner = source.tensors
    if tensors is not None:
        tensors = _patched(with_prefix(tensors, janus.known, spec), source.config, cfg.vq, spec)
        inside = {k.removeprefix(janus.VQ): k for k in tensors.keys() if k.startswith(janus.VQ)}  # noqa: SIM118
        inner = Renamed(tensors, inside)
    config = cfg.vq.to_hf()
    files = {"config.json": _dump(config)}
    vq = ImageTokenizer(spec, Source(spec, config, inner, files, source.folder))
    if options.tokenizer and tensors is not None:
        vq, tensors = _another_decoder(options.tokenizer, vq, tensors)
    tokenizer = load_tokenizer(source.tokenizer_dir())
    layout = _layout(spec, cfg, options, tokenizer)
    check_tokenizer(layout, tokenizer, spec)
    if row_length(layout) + 1 > cfg.text.max_positions:
        raise UserError(
            f"{spec}: max_caption_tokens={layout.max_caption_tokens} and {layout.count} codes"
            f" exceed max_position_embeddings={cfg.text.max_positions} of config.json; lower it"
        )
    source = dataclasses.replace(source, tensors=tensors)
    return JanusFolder(source, cfg, layout, vq, tokenizer)


def _patched(tensors: Tensors, config: dict[str, Any], vq: VQConfig, spec: str) -> Tensors:
    """Return the tensors with the codebook for transformers' search, and a head of text if tied."""
    found = unit_rows(tensors, vq, JANUS_CODEBOOK)
    if HEAD in set(tensors.keys()):
        return found
    if config.get("tie_word_embeddings") is False:
        raise UserError(
            f"{spec}: missing tensor {HEAD}: these are the weights of a JanusModel, which has no"
            " head of text; give the folder of the JanusForConditionalGeneration"
        )
    return Overlaid(found, Renamed(tensors, {HEAD: JANUS_TABLE}))


def _another_decoder(
    spec: str, own: ImageTokenizer, tensors: Tensors
) -> tuple[ImageTokenizer, Tensors]:
    """Return the tokenizer `spec` and the tensors with its decoder over the folder's own.

    Raises UserError for another encoder or codebook.
    """
    source = open_component(spec, "vq")
    if source.config.get("model_type") != VQ_KIND or source.tensors is None:
        raise UserError(f"tokenizer={spec!r} is no {VQ_KIND} folder, so a Janus cannot hold it")
    found = unit_rows(source.tensors, own.cfg, JANUS_CODEBOOK.removeprefix(janus.VQ))
    other = ImageTokenizer(spec, dataclasses.replace(source, tensors=found))
    if (other.cfg.codes, other.fingerprint) != (own.cfg.codes, own.fingerprint):
        raise UserError(
            f"tokenizer={spec!r} has another encoder or codebook than {own.spec}: its codes mean"
            " something else; give one of which only the decoder was trained"
        )
    inside = {f"{janus.VQ}{key}": key for key in found.keys()}  # noqa: SIM118
    return other, Overlaid(tensors, Renamed(found, inside))


def _layout(spec: str, cfg: JanusConfig, options: ImageTokenOptions, tokenizer: Any) -> JanusLayout:
    vocabulary = tokenizer.get_vocab()
    boi, pad = vocabulary.get(BOI), vocabulary.get(PAD, tokenizer.pad_token_id)
    bos = tokenizer.bos_token_id
    for name, value in (("bos_token", bos), ("pad_token", pad), (BOI, boi)):
        if value is None or value >= cfg.text.vocab_size:
            raise UserError(
                f"{spec}: the tokenizer's {name} is {value}, no id of the model's"
                f" {cfg.text.vocab_size}; copy tokenizer.json and tokenizer_config.json of the"
                " original Janus there"
            )
    prompt = options.prompt or (PRO if "<|User|>" in vocabulary else OLD)
    longest = options.max_caption_tokens or JANUS_PROMPT_TOKENS
    grid, rows = (cfg.grid, cfg.grid), cfg.text.vocab_size
    return JanusLayout(bos, boi, pad, cfg.vq.codes, grid, prompt, longest, rows)


def _check(spec: str, cfg: JanusConfig, options: ImageTokenOptions) -> None:
    size = cfg.grid * cfg.vq.factor
    if options.graft:
        raise UserError(
            f"graft={options.graft!r}, but {spec} is a Janus and generates images already"
        )
    if options.resolution not in (0, size):
        raise UserError(
            f"resolution={options.resolution}, but {spec} is a Janus (family J), which generates"
            f" only {size} pixels a side; set resolution={size}, or for another size graft a VQ"
            " tokenizer onto a text model (family N: model=TEXT_MODEL graft=VQ_FOLDER)"
        )
    if options.loss.text_weight:
        raise UserError(
            f"loss.text_weight={options.loss.text_weight}: a Janus does not predict prompts"
            " with its head of codes; set it to 0"
        )


def _json(content: Path | bytes, name: str) -> dict[str, Any]:
    try:
        return json.loads(content if isinstance(content, bytes) else content.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: not readable as JSON ({error})") from None


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
