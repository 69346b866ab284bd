"""Configs: an ml_collections file plus `--config.a.b=value` overrides, read once into dataclasses.

Nothing heavy is imported here, so that a mistyped key fails before jax or weights are touched.
"""

import ast
import dataclasses
import difflib
import importlib.util
import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from jaxft.core.errors import UserError

Schema = TypeVar("Schema")
PACKAGE = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Data:
    """Which records train and which evaluate, as `kind:place` (jsonl:, text:, demo:, tfds:)."""

    train: str
    eval: str


@dataclasses.dataclass(frozen=True)
class Lora:
    """rank 0 is off; `targets` is a regex over the paths of projections; `base` is the model under
    an adapter, where `model` is a PEFT folder whose own config names none or another one."""

    rank: int = 0
    alpha: float = 1.0
    targets: str = ""
    rslora: bool = False
    dropout: float = 0.0
    base: str = ""


@dataclasses.dataclass(frozen=True)
class Optim:
    """lr is the peak; clip 0, ema 0 and a warm-up of 0 steps are off."""

    name: str
    lr: float
    schedule: str
    warmup: str
    weight_decay: float
    clip: float
    ema: float
    b1: float = 0.9
    b2: float = 0.999


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices along each mesh axis; -1 is the rest."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Every:
    """Periods as durations ("50_steps", "1_epochs"); "0_steps" is never."""

    log: str
    eval: str
    save: str
    sample: str


@dataclasses.dataclass(frozen=True)
class Export:
    kind: str
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that every task needs; `own` holds the task's further keys."""

    task: str
    model: str
    init: str
    seed: int
    total: str
    batch_size: int
    micro_batches: int
    trainable: str
    compute_dtype: str
    param_dtype: str
    remat: str
    data: Data
    lora: Lora = Lora()
    optim: Optim
    mesh: MeshShape
    every: Every
    export: Export
    own: Mapping[str, Any]


CHOICES = {
    "init": ("pretrained", "random"),
    "optim.name": ("adamw", "adafactor", "lion", "muon"),
    "optim.schedule": ("constant", "cosine", "linear", "wsd"),
    "compute_dtype": ("auto", "float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "remat": ("auto", "none", "dots", "full", "offload"),
    "export.dtype": ("source", "float32", "bfloat16"),
}
AT_LEAST = {
    "batch_size": 1,
    "micro_batches": 1,
    "lora.rank": 0,
    "optim.lr": 0,
    "optim.clip": 0,
    "optim.weight_decay": 0,
}
BELOW_ONE = ("lora.dropout", "optim.b1", "optim.b2", "optim.ema")
DURATIONS = ("total", "optim.warmup", "every.log", "every.eval", "every.save", "every.sample")


MAPPING: Mapping[str, type] = {}


class Arguments(NamedTuple):
    """A command line: its plain options and its `--config.…` overrides, in order."""

    options: dict[str, str]
    overrides: list[tuple[str, str]]


def parse_arguments(argv: Iterable[str], allowed: Iterable[str]) -> Arguments:
    """Split `--name=value` / `--name value` into options and config overrides.

    Raises UserError for anything else, with the nearest allowed option.
    """
    allowed, words = tuple(allowed), list(argv)
    options: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (name in allowed or name.startswith("config.")):
            raise UserError(f"unknown argument {word!r}; {_near(name, allowed, 'options are')}")
        if not has_value:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            value = words.pop(0)
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        else:
            options[name] = value
    return Arguments(options, overrides)


def load_config(
    path: str, overrides: Iterable[tuple[str, str]] = (), options: Mapping[str, type] = MAPPING
) -> dict[str, Any]:
    """The config file's `get_config()` with overrides applied, as plain nested dicts.

    A path that does not exist is looked up beside the installed package, so that
    `configs/llm.py` works from a wheel too. What the file leaves out gets its default, of the
    task's own keys by `options` (task name to dataclass), so that it can be overridden too.
    """
    file = Path(path)
    if not file.is_file():
        file = PACKAGE / path
    if not file.is_file():
        here = sorted(f"configs/{p.name}" for p in (PACKAGE / "configs").glob("*.py"))
        raise UserError(f"config file {path} does not exist; shipped: {', '.join(here) or 'none'}")
    module_spec = importlib.util.spec_from_file_location("jaxft_config", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {file} is not Python; it must be a .py with get_config()")
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {file} defines no get_config(); copy one from configs/")
    config = module.get_config().to_dict()
    for schema in filter(None, (Config, options.get(str(config.get("task"))))):
        _complete(config, schema)
    for key, text in overrides:
        override(config, key, text)
    return config


def read_config(config: Mapping[str, Any], own: type | None = None) -> Config:
    """The frozen form of a config; unknown, missing and mistyped keys raise, naming the key.

    `own` is the task's dataclass: its fields are the keys that only this task knows.
    """
    shared = {f.name for f in dataclasses.fields(Config)} - {"own"}
    ours = {f.name for f in dataclasses.fields(own)} if own else set(config) - shared
    needed = (_needed(Config) - {"own"}) | (_needed(own) if own else set())
    _check_keys(set(config), shared | ours, needed, "")
    values: dict[str, Any] = {k: v for k, v in config.items() if k in ours}
    if own:
        values = _flat(_build(own, values, ""))
    cfg = _build(Config, {**{k: config[k] for k in shared & set(config)}, "own": values}, "")
    _check_choices(cfg)
    return cfg


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves.update(flatten_config(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for every leaf that differs between two configs."""
    a, b = flatten_config(old), flatten_config(new)
    gone = object()
    return [
        f"{key}: {a.get(key, 'absent')!r} -> {b.get(key, 'absent')!r}"
        for key in sorted(a.keys() | b.keys())
        if json.dumps(a.get(key, gone), default=str) != json.dumps(b.get(key, gone), default=str)
    ]


def steps(duration: str, batch_size: int, examples: int, key: str) -> int:
    """A duration ("200_steps", "3_epochs", "10000_examples") in optimiser steps."""
    match = re.fullmatch(r"(\d+)_(steps|epochs|examples)", duration)
    if not match:
        raise UserError(
            f'{key}={duration!r} is not a duration: write "200_steps", "3_epochs" or'
            ' "10000_examples"'
        )
    count, unit = int(match[1]), match[2]
    if unit == "steps":
        return count
    return -(-count * (examples if unit == "epochs" else 1) // batch_size)


def claim_workdir(workdir: Path, config: Mapping[str, Any]) -> None:
    """Make the folder, refuse one where another config ran, and keep this config in it.

    A config that got no further than its own config.json (a wrong model path) holds nothing.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error}); choose another --workdir"
        ) from None
    file = workdir / "config.json"
    if file.exists() and any(entry != file for entry in workdir.iterdir()):
        old = read_config_file(workdir)
        if differing := differing_keys(old, config):
            raise UserError(
                f"workdir {workdir} belongs to another config ({'; '.join(differing)});"
                " choose another --workdir, or give the same keys to resume"
            )
        return
    file.write_text(json.dumps(config, indent=2) + "\n")


def read_config_file(workdir: Path) -> dict[str, Any]:
    """The resolved config of a run folder."""
    file = workdir / "config.json"
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        raise UserError(f"{workdir} is not a run folder: it has no config.json") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None


def override(config: dict[str, Any], key: str, text: str) -> None:
    """Set one leaf of a config; its type is that of the value that is there."""
    *sections, leaf = key.split(".")
    node: Any = config
    for section in sections:
        node = node.get(section) if isinstance(node, dict) else None
    if not isinstance(node, dict) or leaf not in node or isinstance(node[leaf], dict):
        hint = _near(key, flatten_config(config), "keys are")
        raise UserError(f"unknown config key {key!r}; {hint}")
    node[leaf] = _convert(key, text, type(node[leaf]))


def _convert(key: str, text: str, kind: type) -> Any:
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _typed(key, value, kind)


def _typed(key: str, value: Any, kind: type) -> Any:
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if kind in (tuple, list) and isinstance(value, list | tuple):
        return kind(value)
    if type(value) is not kind:
        raise UserError(f"config key {key}={value!r} must be {kind.__name__}")
    return value


def _complete(config: dict[str, Any], schema: type) -> None:
    """Put in the defaults of what a config leaves out, sections too."""
    for f in dataclasses.fields(schema):
        kind: Any = f.type
        if dataclasses.is_dataclass(kind):
            if f.name not in config and f.default is not dataclasses.MISSING:
                config[f.name] = {}
            if isinstance(config.get(f.name), dict):
                _complete(config[f.name], kind)  # type: ignore[arg-type]
        elif f.default is not dataclasses.MISSING:
            config.setdefault(f.name, f.default)


def _needed(schema: type) -> set[str]:
    """The fields that a config has to give."""
    return {
        f.name
        for f in dataclasses.fields(schema)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }


def _build(schema: type[Schema], values: Mapping[str, Any], prefix: str) -> Schema:
    fields = {f.name: f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    _check_keys(set(values), set(fields), _needed(schema), prefix)
    built: dict[str, Any] = {}
    for name, value in values.items():
        kind: Any = fields[name].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UserError(f"config key {prefix}{name}={value!r} must be a section of keys")
            built[name] = _build(kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif isinstance(kind, type):
            built[name] = _typed(prefix + name, value, kind)
        else:
            built[name] = value
    return schema(**built)


def _flat(node: Any) -> dict[str, Any]:
    return {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}


def _check_keys(got: set[str], known: set[str], needed: set[str], prefix: str) -> None:
    for name in sorted(got - known):
        raise UserError(f"unknown config key {prefix}{name!r}; {_near(name, known, 'keys are')}")
    missing = sorted(prefix + name for name in needed - got)
    if missing:
        raise UserError(f"config is missing {', '.join(missing)}; add them to the config file")


def _check_choices(cfg: Config) -> None:
    leaves = flatten_config(dataclasses.asdict(cfg))
    for key, choices in CHOICES.items():
        if leaves[key] not in choices:
            hint = _near(str(leaves[key]), choices, "it is one of")
            raise UserError(f"config key {key}={leaves[key]!r} is not known; {hint}")
    for key, least in AT_LEAST.items():
        if leaves[key] < least:
            raise UserError(f"config key {key}={leaves[key]} must be at least {least}")
    for key in BELOW_ONE:
        if not 0 <= leaves[key] < 1:
            raise UserError(f"config key {key}={leaves[key]} must be at least 0 and below 1")
    for key in DURATIONS:
        steps(leaves[key], 1, 1, key)
    if cfg.batch_size % cfg.micro_batches:
        raise UserError(
            f"batch_size={cfg.batch_size} does not split into micro_batches={cfg.micro_batches}"
        )


def _near(name: str, known: Iterable[str], intro: str) -> str:
    """A did-you-mean, or the list when nothing is near."""
    known = list(known)
    leaf = {k.rsplit(".", 1)[-1]: k for k in known}
    close = difflib.get_close_matches(name, known, 1, 0.6) or [
        leaf[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], leaf, 1, 0.6)
    ]
    return f"did you mean {close[0]!r}?" if close else f"{intro} {', '.join(sorted(known))}"
