"""A language model's folder as transformers reads it, under the names of its weight table."""

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.folders.transformers import HEAD, TABLE, Source, open_source
from jaxft.weights.rules import renamed
from jaxft.weights.views import Place, Relaid

PREFIX = "model."  # base_model_prefix of the causal language models, and of Janus


def check_causal(config: Mapping[str, Any]) -> None:
    """Raise UserError for a config.json that is not a plain causal language model.

    Refused are the head of another task, layers that attend to later tokens, and layers of several
    sizes.
    """
    stated, causal = config.get("architectures") or [], registry.class_names("decoder")
    stated = [str(one) for one in stated] if isinstance(stated, list) else [str(stated)]
    # LlamaModel is LlamaForCausalLM without its head, which may be tied.
    known = {*causal, *(name.replace("ForCausalLM", "Model") for name in causal)}
    if stated and known.isdisjoint(stated):
        raise UserError(
            f"config.json: architectures={stated} is not a causal language model;"
            f" supported are {', '.join(causal)}: give the language model that it was made from"
        )
    if not config.get("is_causal", True):
        raise UserError(
            f"config.json: is_causal={json.dumps(config['is_causal'])} lets tokens attend to later"
            " ones, which is not supported; give the causal language model that it was made from"
        )
    if config.get("per_layer_config") is not None:
        raise UserError(
            "config.json: per_layer_config is not supported, only layers of one size; give the"
            " model that it was pruned from"
        )


def open_decoder(spec: str, weights: bool = True, nf4: bool = False) -> Source:
    """Open the causal language model that transformers loads from `spec`. nf4: as there."""
    source = open_source(spec, weights, nf4)
    return registry.find(source.config, "decoder").opened(source)


def as_decoder(source: Source) -> Source:
    """Return the source under the names of its weight table, with a config.json that fits it.

    Like transformers 5, it accepts the tensors of a base model, whose names lack `model.`. The head
    becomes the table of a tied model whose file has no table. If the head of a tied model differs
    from its table, transformers 5 uses that head. Older versions tie by the flag alone, so the flag
    is then set to false.
    Raises: UserError for a config.json that is not supported, and for an untied model without head.
    """
    architecture = registry.find(source.config, "decoder")
    cfg, config = architecture.config(source.config, "config.json"), dict(source.config)
    stated = config.get("architectures")
    if stated and not any(name in registry.class_names("decoder") for name in stated):
        config["architectures"] = [architecture.class_name(config)]
    tensors = source.tensors
    if tensors is not None:
        rules = architecture.rules(cfg)
        tensors = with_prefix(tensors, lambda key: bool(renamed(rules, key)), source.name)
        keys = set(tensors.keys())
        if cfg.tied and HEAD in keys and TABLE not in keys:
            places = {TABLE if key == HEAD else key: Place(key) for key in tensors.keys()}  # noqa: SIM118
            tensors = Relaid(tensors, places)
        elif cfg.tied and HEAD in keys and not equal_tensors(tensors, HEAD, TABLE):
            config["tie_word_embeddings"] = False
        elif not cfg.tied and HEAD not in keys and TABLE in keys:
            raise UserError(
                f"{source.name}: missing tensor {HEAD}: these are the weights of a base model, and"
                " config.json does not tie a head to its embedding; give the causal language"
                " model, or set tie_word_embeddings to true if its head is its embedding"
            )
    return with_config(replace(source, tensors=tensors), config)


def with_config(source: Source, config: dict[str, Any]) -> Source:
    """Return the source with another config.json."""
    if config == source.config:
        return source
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    files = {**source.side_files, "config.json": text.encode()}
    return replace(source, config=config, side_files=files)


def with_prefix(tensors: Tensors, known: Callable[[str], bool], where: str) -> Tensors:
    """Return the tensors with PREFIX added to a name, or removed, where only that name is `known`.

    In this way transformers loads a base model as one with a head, and the reverse.
    Raises: UserError for two tensors that get the same name.
    """
    places: dict[str, Place] = {}
    for key in tensors.keys():  # noqa: SIM118
        shorter, longer = key.removeprefix(PREFIX), PREFIX + key
        name = shorter if shorter != key and known(shorter) else longer if known(longer) else key
        if name in places:
            raise UserError(f"{where}: tensors {places[name].key} and {key} are both {name}")
        places[name] = Place(key)
    return tensors if all(p.key == name for name, p in places.items()) else Relaid(tensors, places)


def equal_tensors(tensors: Tensors, first: str, second: str) -> bool:
    """Return True if two matrices have equal values, whatever their dtypes."""
    if tensors.info(first)[0] != tensors.info(second)[0]:
        return False
    head, table = tensors.read(first), tensors.read(second)
    blocks = (slice(i, i + 4096) for i in range(0, len(head), 4096))  # fp32 copies of all are GBs
    return all(
        np.array_equal(head[rows].astype(np.float32), table[rows].astype(np.float32))
        for rows in blocks
    )
