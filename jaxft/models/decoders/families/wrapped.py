"""Language models inside of models of pictures and text: Gemma 3 from 4B on, Mistral 3.

Its config.json has the text model's in `text_config`. The text model is trained, and an export
copies all other tensors.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.files import equal_tensors, with_config
from jaxft.weights.folders.transformers import HEAD, Source
from jaxft.weights.rules import in_class

CLASSES = {"gemma3": "Gemma3", "mistral3": "Mistral3"}
TEXT_TYPES = {
    "gemma3": ("gemma3_text",),
    "mistral3": ("mistral", "ministral3"),
}  # the default first
IMAGE_IDS = {"gemma3": 262144, "mistral3": 10}  # the classes' defaults of image_token_index


def read(config: Mapping[str, Any], where: str) -> DecoderConfig:
    """Read the config.json of a model of pictures and text, as transformers 5 reads it.

    Raises: UserError for another architecture, and as the family of the text model.
    """
    kind, text = config["model_type"], config.get("text_config")
    stated, known = config.get("architectures"), f"{CLASSES[kind]}ForConditionalGeneration"
    if not isinstance(text, dict):
        alone = "; for a model of texts alone set model_type to gemma3_text"
        raise UserError(
            f"{where}: model_type={kind!r} without an object text_config, which holds the sizes of"
            f" the text model; take the file of the model{alone if kind == 'gemma3' else ''}"
        )
    if stated and stated != [known]:
        raise UserError(f"{where}: architectures={stated} is not supported, only {known}")
    text = {"model_type": TEXT_TYPES[kind][0], **text}
    if text["model_type"] not in TEXT_TYPES[kind] or (
        text["model_type"] == "mistral" and "layer_types" in text
    ):
        raise UserError(
            f"{where}: text_config of model_type={text['model_type']!r} is not supported in"
            f" {kind}, only {' or '.join(TEXT_TYPES[kind])} without layer_types"
        )
    tied = config.get("tie_word_embeddings", True)
    if tied not in (True, False, None):
        raise UserError(f"{where}: tie_word_embeddings={tied!r}; expected true or false")
    # The outer class alone ties the head, and it has no soft-cap of logits.
    return replace(
        registry.find(text, "decoder", where).config(text, where),
        tied=bool(tied),
        logits_soft_cap=None,
        image_ids=(config.get("image_token_index", IMAGE_IDS[kind]),),
    )


def as_wrapped(source: Source) -> Source:
    """Return the source with the names of its class, and a config.json that fits its head.

    A head that differs from the table is used even if config.json ties them, as in `as_decoder`.
    """
    source, tensors = replace(source, class_names=CLASS_NAMES), source.tensors
    if tensors is None or not read(source.config, "config.json").tied:
        return source
    own = {in_class(key, CLASS_NAMES): key for key in tensors.keys()}  # noqa: SIM118
    head, table = own.get(HEAD), own.get(CLASS_TABLE)
    if head is None or table is None or equal_tensors(tensors, head, table):
        return source
    return with_config(source, {**source.config, "tie_word_embeddings": False})


# Starts of names in files, and in transformers' class, whose names PEFT uses. Some files have
# those of the class.
CLASS_NAMES = (
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)
CLASS_TABLE = "model.language_model.embed_tokens.weight"
RULES = tuple(rule._replace(key=f"language_model.{rule.key}") for rule in llama.RULES)
CLASS_RULES = tuple(rule._replace(key=in_class(rule.key, CLASS_NAMES)) for rule in RULES)
OTHERS = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
TIED_HEAD = r"(language_model\.)?lm_head\.weight"
ARCHITECTURE = llama.ARCHITECTURE._replace(
    class_name=lambda config: f"{CLASSES[config['model_type']]}ForConditionalGeneration",
    config=read,
    rules=lambda cfg: (*RULES, *CLASS_RULES),
    ignore=lambda cfg: (OTHERS, *((TIED_HEAD,) if cfg.tied else ())),
    drop=lambda cfg: (TIED_HEAD,) if cfg.tied else (),
    opened=as_wrapped,
    classifier="",
)
