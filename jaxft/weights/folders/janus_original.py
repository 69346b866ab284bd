"""Janus between DeepSeek's names of tensors and config (MultiModalityCausalLM) and transformers'.

Source of the pairs: transformers' conversion script for Janus.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.folders.transformers import Source
from jaxft.weights.rules import Rule, renamed
from jaxft.weights.transfer import Export
from jaxft.weights.views import THIRDS, Place, Relaid, relaid

ORIGINAL_TYPE, ORIGINAL_CLASS = "multi_modality", "MultiModalityCausalLM"
_VQ, _GEN = "model.vqmodel.", "gen_vision_model."
_VISION, _TOWER = "model.vision_model.", "vision_model.vision_tower."
_LAYER, _BLOCK = _VISION + "encoder.layers.{m}.", _TOWER + "blocks.{m}."
# From transformers' names to the original ones. The first rule that matches counts, either way.
ORIGINAL_NAMES = (
    Rule("lm_head.weight", "language_model.lm_head.weight"),
    Rule("model.language_model.{p}", "language_model.model.{p}"),
    Rule("model.generation_embeddings.weight", "gen_embed.weight"),
    Rule("model.generation_aligner.fc1.{p}", "gen_aligner.layers.0.{p}"),
    Rule("model.generation_aligner.hidden_layers.0.{p}", "gen_aligner.layers.2.{p}"),
    Rule("model.generation_head.proj_out.{p}", "gen_head.output_mlp_projector.{p}"),
    Rule("model.generation_head.vision_head.{p}", "gen_head.vision_head.{p}"),
    Rule("model.aligner.fc1.{p}", "aligner.layers.0.{p}"),
    Rule("model.aligner.hidden_layers.0.{p}", "aligner.layers.2.{p}"),
    Rule(_VQ + "encoder.down.{m}.block.{p}", _GEN + "encoder.conv_blocks.{m}.res.{p}"),
    Rule(_VQ + "encoder.down.{p}", _GEN + "encoder.conv_blocks.{p}"),
    Rule(_VQ + "decoder.up.{m}.block.{p}", _GEN + "decoder.conv_blocks.{m}.res.{p}"),
    Rule(_VQ + "decoder.up.{p}", _GEN + "decoder.conv_blocks.{p}"),
    Rule(_VQ + "{p}.mid.block_1.{pq}", _GEN + "{p}.mid.0.{pq}"),
    Rule(_VQ + "{p}.mid.attn_1.{pq}", _GEN + "{p}.mid.1.{pq}"),
    Rule(_VQ + "{p}.mid.block_2.{pq}", _GEN + "{p}.mid.2.{pq}"),
    Rule(_VQ + "{p}", _GEN + "{p}"),
    Rule(_VISION + "embeddings.position_embedding.weight", _TOWER + "pos_embed", "p d -> 1 p d"),
    Rule(_VISION + "embeddings.patch_embedding.{p}", _TOWER + "patch_embed.proj.{p}"),
    Rule(_VISION + "post_layernorm.{p}", _TOWER + "norm.{p}"),
    Rule(_LAYER + "layer_norm{n}.{p}", _BLOCK + "norm{n}.{p}"),
    Rule(_LAYER + "self_attn.projection_layer.{p}", _BLOCK + "attn.proj.{p}"),
    Rule(_LAYER + "mlp.{p}", _BLOCK + "mlp.{p}"),
)
BACK = tuple(
    Rule(rule.path, rule.key, " -> ".join(reversed(rule.layout.split(" -> "))))
    for rule in ORIGINAL_NAMES
)
# The original tower has q, k and v as one tensor, in this order.
_NUMBER = {"m": r"(\d+)"}
FUSED = re.compile(_LAYER.format(**_NUMBER) + r"self_attn\.([qkv])_proj\.(\w+)")
FUSED_QKV = re.compile(_BLOCK.format(**_NUMBER) + r"attn\.qkv\.(\w+)")
# What transformers' class has no place for: the tower's pooling, statistics of VQ training.
DROPPED = re.compile(r"vision_model\.vision_tower\.attn_pool\..*|.*\.quantize\.codebook_used")


def transformers_keyed(tensors: Tensors, where: str) -> Relaid:
    """Return an original checkpoint under transformers' keys and shapes.

    Raises: UserError for a tensor that no rule matches.
    """
    places: dict[str, Place] = {}
    for key in tensors.keys():  # noqa: SIM118 (a Tensors is no dict)
        if DROPPED.fullmatch(key):
            continue
        if match := FUSED_QKV.fullmatch(key):
            stem = f"{_LAYER.format(m=match[1])}self_attn."
            for letter, rows in zip("qkv", THIRDS, strict=True):
                places[f"{stem}{letter}_proj.{match[2]}"] = Place(key, rows=rows)
        elif found := renamed(BACK, key):
            places[found[0]] = Place(key, found[1])
        else:
            raise UserError(f"{where}: tensor {key} is none of a Janus; give the folder of one")
    return Relaid(tensors, places)


def original(made: Export) -> Export:
    """Return an export under transformers' keys as one under DeepSeek's keys."""
    places: dict[str, Place] = {}
    for key in made.infos:
        if match := FUSED.fullmatch(key):
            name = f"{_BLOCK.format(m=match[1])}attn.qkv.{match[3]}"
            places[key] = Place(name, rows=THIRDS["qkv".index(match[2])])
        else:
            name, layout = renamed(ORIGINAL_NAMES, key) or (key, "")
            places[key] = Place(name, layout)
    return relaid(made, places)


# ---- configs ----------------------------------------------------------------------------------


def as_transformers(source: Source) -> Source:
    """Return an original folder with transformers' config, keys and preprocessor config.

    Raises: UserError for a config that is not supported.
    """
    where = f"{source.name}/config.json"
    config = _transformers_config(source.config, where)
    files = {k: v for k, v in source.side_files.items() if not k.startswith("processor_config")}
    side = config["vision_config"]["image_size"]
    processor = {"size": {"height": side, "width": side}, "min_size": 14}
    files["preprocessor_config.json"] = json.dumps(processor).encode()
    tensors = None if source.tensors is None else transformers_keyed(source.tensors, source.name)
    return dataclasses.replace(source, config=config, tensors=tensors, side_files=files)


def _transformers_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    params = {
        name: dict((config.get(f"{name}_config") or {}).get("params") or {})
        for name in ("vision", "aligner", "gen_vision", "gen_aligner", "gen_head")
    }
    text = {"model_type": "llama", **(config.get("language_config") or {})}
    width = params["gen_aligner"].get("n_embed", text.get("hidden_size", 4096))
    for name in ("aligner", "gen_aligner"):
        if (depth := params[name].get("depth", 2)) != 2:
            raise UserError(f"{where}: {name}_config.params.depth={depth} is not supported, only 2")
    side, (patch, layers) = params["vision"].get("image_size", 384), _tower(params["vision"], where)
    vq = params["gen_vision"]
    return {
        "architectures": ["JanusForConditionalGeneration"],
        "model_type": "janus",
        "text_config": text,
        "vision_config": {
            "model_type": "janus_vision_model",
            "image_size": side,
            "patch_size": patch,
            "num_image_tokens": (side // patch) ** 2,
            "projection_dim": params["aligner"].get("n_embed", width),
            **layers,
        },
        "vq_config": {
            "model_type": "janus_vqgan",
            "embed_dim": vq.pop("n_embed", 8),
            "num_embeddings": vq.pop("image_token_size", 16384),
            "projection_dim": width,
            "image_token_embed_dim": params["gen_head"].get("image_token_embed", width),
            **vq,
        },
        "tie_word_embeddings": False,
        **{key: config[key] for key in ("torch_dtype", "dtype") if key in config},
    }


def _tower(params: Mapping[str, Any], where: str) -> tuple[int, dict[str, int]]:
    """Return (patch size, other keys of vision_config) of the vision tower.

    The original config holds only the name of the tower. Raises: UserError for other towers.
    """
    name = params.get("model_name", "siglip_large_patch16_384")
    if name != "siglip_large_patch16_384":
        raise UserError(
            f"{where}: vision_config.params.model_name={name!r} is not supported;"
            " siglip_large_patch16_384 is"
        )
    return 16, {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}


def original_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return DeepSeek's config.json for one of transformers."""
    text, vq = dict(config["text_config"]), {**_VQ_SIZES, **(config.get("vq_config") or {})}
    width, codes, dim = text.get("hidden_size", 4096), vq["num_embeddings"], vq["embed_dim"]
    side = (config.get("vision_config") or {}).get("image_size", 384)
    mlp = {"depth": 2, "n_embed": width, "projector_type": "mlp_gelu"}
    head = {"image_token_embed": width, "image_token_size": codes, "n_embed": width}
    tower = {"image_size": side, "model_name": "siglip_large_patch16_384"}
    tower |= {"select_feature": "same", "select_layer": -1}

    def one(cls: str, kind: str, params: dict[str, Any]) -> dict[str, Any]:
        return {"cls": cls, "model_type": kind, "params": params}

    made = {
        "architectures": [ORIGINAL_CLASS],
        "model_type": ORIGINAL_TYPE,
        "language_config": text,
        "vision_config": one("CLIPVisionTower", "vision", tower),
        "aligner_config": one("MlpProjector", "aligner", {**mlp, "input_dim": 1024}),
        "gen_vision_config": one(
            "VQ-16", "gen_vision", {"image_token_size": codes, "n_embed": dim}
        ),
        "gen_aligner_config": one("MlpProjector", "gen_aligner", {**mlp, "input_dim": dim}),
        "gen_head_config": one("vision_head", "gen_head", head),
    }
    return made | {key: config[key] for key in ("torch_dtype",) if key in config}


_VQ_SIZES = {"num_embeddings": 16384, "embed_dim": 8}


def original_files(
    files: Mapping[str, Path | bytes], config: Mapping[str, Any], conversation: str
) -> dict[str, Path | bytes]:
    """Return the files beside the weights: tokenizer and licence unchanged, configs as DeepSeek's.

    `conversation` is DeepSeek's name of the prompt template.
    """
    own = ("config.json", "generation_config.json", "preprocessor_config.json")
    kept = {k: v for k, v in files.items() if k not in own and not k.startswith("processor_config")}
    made = original_config(config)
    side = made["vision_config"]["params"]["image_size"]
    half = [0.5, 0.5, 0.5]
    pixels = {"image_processor_type": "VLMImageProcessor", "image_size": side, "min_size": 14}
    pixels |= {"image_mean": half, "image_std": half, "do_normalize": True}
    pixels |= {"background_color": [127, 127, 127], "rescale_factor": 1 / 255}
    chat = {"processor_class": "VLChatProcessor", "image_tag": "<image_placeholder>"}
    chat |= {"num_image_tokens": (side // 16) ** 2, "sft_format": conversation}
    written = {"config.json": made, "preprocessor_config.json": pixels}
    written["processor_config.json"] = chat
    return {**kept, **{name: json.dumps(one, indent=2).encode() for name, one in written.items()}}
