"""The table from a config.json's model_type or class name to the code of that architecture.

A package outside of jaxft adds a decoder by an entry point of the group `jaxft.architectures`: its
name is a model_type, its value `module:ATTRIBUTE` of an Architecture. All commands find it, and so
does a run folder that is opened again. No config key and no call is needed.
"""

import difflib
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, NamedTuple

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import DecoderConfig
from jaxft.weights.folders.transformers import Source
from jaxft.weights.rules import Rule
from jaxft.weights.transfer import Part

GROUP = "jaxft.architectures"
NEAREST = 10  # names in an error
# Values are imported on use, so that a command imports no other model's module.
MODEL_TYPES: dict[str, dict[str, str]] = {
    "decoder": {
        "llama": "jaxft.models.decoders.families.llama:ARCHITECTURE",
        "mistral": "jaxft.models.decoders.families.llama:ARCHITECTURE",
        "ministral": "jaxft.models.decoders.families.llama:ARCHITECTURE",
        "ministral3": "jaxft.models.decoders.families.llama:ARCHITECTURE",
        "mistral3": "jaxft.models.decoders.families.wrapped:ARCHITECTURE",
        "qwen2": "jaxft.models.decoders.families.qwen:ARCHITECTURE",
        "qwen3": "jaxft.models.decoders.families.qwen:ARCHITECTURE",
        "smollm3": "jaxft.models.decoders.families.llama:ARCHITECTURE",
        "mixtral": "jaxft.models.decoders.families.mixtral:ARCHITECTURE",
        "qwen3_moe": "jaxft.models.decoders.families.mixtral:QWEN3_MOE",
        "gpt_oss": "jaxft.models.decoders.families.gpt_oss:ARCHITECTURE",
        "phi3": "jaxft.models.decoders.families.phi:ARCHITECTURE",
        "granite": "jaxft.models.decoders.families.granite:ARCHITECTURE",
        "gemma2": "jaxft.models.decoders.families.gemma:ARCHITECTURE",
        "gemma3_text": "jaxft.models.decoders.families.gemma:GEMMA3",
        "gemma3": "jaxft.models.decoders.families.wrapped:ARCHITECTURE",
        "olmo2": "jaxft.models.decoders.families.olmo:ARCHITECTURE",
        "olmo3": "jaxft.models.decoders.families.olmo:ARCHITECTURE",
    },
    "image_tokens": {
        "janus": "jaxft.models.pipelines.janus:ARCHITECTURE",
        "multi_modality": "jaxft.models.pipelines.janus:ARCHITECTURE",
    },
    "autoencoder": {
        "AutoencoderKL": "jaxft.models.autoencoders.vae:ARCHITECTURE",
        "VQModel": "jaxft.models.autoencoders.vqgan:ARCHITECTURE",
        "janus_vqgan": "jaxft.models.autoencoders.vqgan:ARCHITECTURE",
    },
    "denoiser": {
        "UNet2DConditionModel": "jaxft.models.denoisers.unet:ARCHITECTURE",
        "SD3Transformer2DModel": "jaxft.models.denoisers.mmdit.mmdit:ARCHITECTURE",
        "FluxTransformer2DModel": "jaxft.models.denoisers.flux.flux:ARCHITECTURE",
        "Flux2Transformer2DModel": "jaxft.models.denoisers.flux.flux2:ARCHITECTURE",
        "ZImageTransformer2DModel": "jaxft.models.denoisers.zimage.zimage:ARCHITECTURE",
    },
    "text_encoder": {
        "clip_text_model": "jaxft.models.text_encoders.clip:ARCHITECTURE",
        "clip": "jaxft.models.text_encoders.clip:ARCHITECTURE",
        "t5": "jaxft.models.text_encoders.t5:ARCHITECTURE",
    },
}


class Architecture(NamedTuple):
    """The interface of one architecture to the rest of jaxft. `cfg` is the result of `config`.

    class_name: the class that transformers or diffusers builds for a config.json. config: called
    with a config.json and its name in errors, it returns `cfg`, or raises UserError for values that
    no layer computes. module: called with (cfg, key=key). rules, sizes: the weight table, and the
    dims that its layouts name. ignore: tensors that fill no parameter and that an export copies.
    drop: tensors that training would make stale. flops: the forward FLOPs of one token in a row of
    a given length, 0 for models without tokens. lora: a regex over projections, the default of
    `lora.targets`. opened: renames the tensors of a source to the names of the weight table.
    classifier: replaces "ForCausalLM" in the name of transformers' sequence classifier, "" if
    transformers has none.
    """

    family: str
    class_name: Callable[[Mapping[str, Any]], str]
    config: Callable[[Mapping[str, Any], str], Any]
    module: Callable[..., Any]
    rules: Callable[[Any], tuple[Rule, ...]]
    sizes: Callable[[Any], Mapping[str, int]] = lambda cfg: {}
    ignore: Callable[[Any], tuple[str, ...]] = lambda cfg: ()
    drop: Callable[[Any], tuple[str, ...]] = lambda cfg: ()
    flops: Callable[[Any, int], float] = lambda cfg, length: 0.0
    lora: str = ""
    opened: Callable[[Source], Source] = lambda source: source
    classifier: str = "ForSequenceClassification"

    def part(self, source: Source, cfg: Any) -> Part:
        """Return the part that fills the model's parameters and that an export writes."""
        tables = self.rules(cfg), self.sizes(cfg), self.ignore(cfg), self.drop(cfg)
        return Part("", source.name, source.tensors, *tables, class_names=source.class_names)


def find(config: Mapping[str, Any], family: str, where: str = "config.json") -> Architecture:
    """Return the architecture of a config.json within a family of MODEL_TYPES.

    `where` is the name of the file in errors.
    Raises: UserError for a name that is not in the table, with the names that are nearest to it.
    """
    # transformers writes a model_type, diffusers a class name.
    key = "model_type" if "model_type" in config or family == "decoder" else "_class_name"
    name, known = config.get(key), MODEL_TYPES[family]
    # Names of jaxft have priority over those of entry points.
    if name not in tuple(known) and family == "decoder":
        known = known | {one.name: one.value for one in entry_points(group=GROUP)}
    if name not in tuple(known):  # a tuple, because a name in JSON may be a list, which has no hash
        near, which = list(known), ""
        if len(near) > NEAREST and isinstance(name, str):
            near, which = difflib.get_close_matches(name, near, NEAREST, 0.0), "among those "
        raise UserError(
            f"{where}: {key}={name!r} is not supported; {which}supported are {', '.join(near)}:"
            " give a model of one of these"
        )
    module, _, attribute = known[name].partition(":")
    return getattr(import_module(module), attribute)


def find_family(config: Mapping[str, Any]) -> str | None:
    """Return the family of a config.json's model_type or class name, or None."""
    name = config.get("model_type", config.get("_class_name"))
    return next((one for one, names in MODEL_TYPES.items() if name in tuple(names)), None)


def read_decoder(config: Mapping[str, Any]) -> DecoderConfig:
    """Read the config.json of a causal language model. Raises as `find`."""
    return find(config, "decoder").config(config, "config.json")


def class_names(family: str) -> tuple[str, ...]:
    """Return the class names of a family's entries in the table, in its order."""
    configs = [{"model_type": name, "_class_name": name} for name in MODEL_TYPES[family]]
    return tuple(find(config, family).class_name(config) for config in configs)
