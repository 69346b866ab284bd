"""Checks of a config that need neither jax nor the model: what it names is there, and fits."""

import importlib.util
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from jaxft.core.errors import UserError, near
from jaxft.data.sources.mixtures import read_mixture
from jaxft.data.sources.schemes import check_place, open_records
from jaxft.demo import demo_path
from jaxft.weights.files.gguf_header import read_positions
from jaxft.weights.packages import package_folders, package_model

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(/[\w.-]+)*")
SMALL = 2**24  # bytes of a file whose first records are looked at
FIRST_RECORDS = 1000
# The keys of each task's writers, which take jax to import.
EXPORT_KINDS = {
    "llm": ("merged", "adapter", "gguf", "gguf-q8_0", "gguf-q4_0", "gguf-adapter", "none"),
    "autoencoder": ("folder", "none"),
    "diffusion": ("folder", "single_file", "lora", "inversion", "all", "none"),
    "image_tokens": ("folder", "adapter", "original", "none"),
}

# Pickled weights have an error of their own, which names the command that converts them.
MODEL_FILES = (".gguf", ".safetensors", ".bin", ".pt", ".pth", ".ckpt")
TRACKERS = ("wandb", "trackio", "mlflow")  # the values of `track`, which are names of packages


def check_track(track: str) -> None:
    """Raise UserError for an unknown service, or for one whose package is not installed."""
    name = track.partition(":")[0]
    if name not in ("none", *TRACKERS):
        hint = near(name, ("none", *TRACKERS), "it is one of")
        raise UserError(f"track={track!r} is not known; {hint}")
    if name != "none" and importlib.util.find_spec(name) is None:
        raise UserError(f"track={name} needs its package; run `pip install {name}`")


def check_early(config: Mapping[str, Any]) -> None:
    """Raise UserError for a model or data of a config that are not there.

    Also for a `seq_len` beyond the positions of a model on this disk, and for a record of a small
    local file whose label is not one of `labels`. The rest is checked when the model is opened.
    """
    kind, kinds = config["export"]["kind"], EXPORT_KINDS[config["task"]]
    if kind not in kinds:
        raise UserError(f"export.kind={kind!r} is not one of {', '.join(kinds)}")
    _check_model(str(config["model"]), config)
    texts = config["task"] == "llm"
    places = {"data.train": config["data"]["train"], "data.eval": config["data"]["eval"]}
    if config["task"] == "diffusion":
        places["prior.data"] = config["prior"]["data"]
    if not places["data.train"]:
        example = "jsonl:train.jsonl" if texts else "folder:images"
        raise UserError(f"data.train is empty; give --config.data.train={example}")
    for key, spec in places.items():
        for part in read_mixture(spec).specs if texts else (spec,):
            if part:
                _check_part(key, part, not texts)
    if texts and config["objective"] == "classify" and config["labels"]:
        for key in ("data.train", "data.eval"):
            for part in read_mixture(places[key]).specs:
                _check_labels(part, config)


def check_length(config: Mapping[str, Any], seq_len: int, where: str) -> None:
    """Raise UserError if rows of `seq_len` tokens have more positions than the model was made for.

    config: the content of config.json, which `where` names. A model with scaled rope may go beyond
    its number. So it is not checked.
    """
    text = config.get("text_config")
    config = text if isinstance(text, Mapping) else config
    positions = config.get("max_position_embeddings")
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kinds = [rope, *rope.values()] if isinstance(rope, Mapping) else []
    stated = [one.get("rope_type", one.get("type")) for one in kinds if isinstance(one, Mapping)]
    scaled = any(kind not in (None, "default") for kind in stated)
    if type(positions) is int and seq_len > positions and not scaled:
        raise UserError(
            f"seq_len={seq_len} is more than max_position_embeddings={positions} of {where}; give"
            f" --config.seq_len={positions} or less, or a model of longer texts"
        )


def _check_part(key: str, spec: str, images: bool) -> None:
    try:
        check_place(spec, images)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None


def _check_model(spec: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a model that is not there. Hub ids are looked up when it is opened."""
    if not spec:
        raise UserError(
            "model is empty; give --config.model=FOLDER, a hub id org/name, pip:PACKAGE or"
            " demo:NAME"
        )
    texts, package = config["task"] == "llm", spec.removeprefix("pip:")
    if package != spec and not texts:
        package_folders(package)
        return
    demo = demo_path(spec, "model")
    path = package_model(package) if package != spec else demo or Path(spec).expanduser()
    if not path.exists() and (not HUB_ID.fullmatch(spec) or spec.startswith(".")):
        raise UserError(
            f"model {spec!r}: no such folder or file; give a Hugging Face folder, a hub id"
            " org/name, pip:PACKAGE or demo:NAME"
        )
    if texts and path.is_file() and path.suffix not in MODEL_FILES:
        raise UserError(
            f"model {spec} is a file without weights; give the folder of a model, or a .gguf or"
            " .safetensors file"
        )
    if texts and path.suffix == ".gguf":
        check_length(read_positions(path), config["seq_len"], str(path))
        return
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not path.exists():  # an earlier run may have fetched it
        cached = try_to_load_from_cache("/".join(spec.split("/")[:2]), "config.json")
        file = Path(cached) if isinstance(cached, str) else path / "config.json"
    if texts and file.is_file():
        try:
            content = json.loads(file.read_bytes())
        except ValueError:
            return  # the error of the opened model names the place in the file
        if isinstance(content, dict):
            check_length(content, config["seq_len"], str(file))


def _check_labels(spec: str, config: Mapping[str, Any]) -> None:
    """Raise UserError for a label outside of `labels` in the first records of a small file."""
    path = Path(spec.removeprefix("jsonl:")).expanduser()
    if not path.is_file() or path.stat().st_size > SMALL or path.suffix == ".parquet":
        return
    from jaxft.data.text.labelled import LabelRule  # it takes the tokenizers to import

    names = tuple(name.strip() for name in config["labels"].split(","))
    rule, records = LabelRule(names, config["problem_type"]), open_records(spec, config["columns"])
    for index in range(min(len(records), FIRST_RECORDS)):
        rule.read(records[index], records.where(index))
