"""Configs: an ml_collections file plus `--config.a.b=value` overrides, read once into dataclasses.

Nothing heavy is imported here. A mistyped key thus fails before jax starts or weights are read.
"""

import ast
import dataclasses
import importlib.util
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from jaxft.core.errors import UserError, near
from jaxft.core.guards.best import Keep, Stop

Schema = TypeVar("Schema")
PACKAGE = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class DataKeys:
    """Training and evaluation records, each as a path, a `scheme:place` or a sum of those."""

    train: str
    eval: str


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, off at rank 0. `targets` is a regex over the paths of projections.

    `from_` is the key `lora.from`: a LoRA file or a PEFT folder from which training continues.
    Its rank, alpha and targets hold where the config has the values 0, 0.0 and "".
    ranks: ranks of some projections, "REGEX=RANK, REGEX=RANK/ALPHA". layers: the layers that get an
    adapter, such as "0-3,7", "" for all. dora: also train the norm of each row (DoRA).
    tokens: tokens whose rows of the embedding train too, divided by commas.
    """

    rank: int = 0
    alpha: float = 1.0
    targets: str = ""
    rslora: bool = False
    dropout: float = 0.0
    from_: str = ""
    ranks: str = ""
    layers: str = ""
    dora: bool = False
    tokens: str = ""


@dataclasses.dataclass(frozen=True)
class Optim:
    """Optimiser keys. lr is the peak. clip 0, ema 0 and a warm-up of 0 steps are off.

    `lr_by` multiplies lr for some parameters: "REGEX=0.1, REGEX=2".
    """

    name: str
    lr: float
    schedule: str
    warmup: str
    weight_decay: float
    clip: float
    ema: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    lr_by: str = ""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Number of devices along each mesh axis. -1 takes the devices that remain."""

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Every:
    """Periods as durations ("50_steps", "1_epochs"). "0_steps" is never."""

    log: str
    eval: str
    save: str
    sample: str


@dataclasses.dataclass(frozen=True)
class ExportKeys:
    kind: str
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Keys that all tasks share. `own` holds the keys of the task alone."""

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
    data: DataKeys
    lora: Lora = Lora()
    optim: Optim
    mesh: MeshShape
    every: Every
    keep: Keep = Keep()
    stop: Stop = Stop()
    export: ExportKeys
    own: Mapping[str, Any]


CHOICES = {
    "init": ("pretrained", "random"),
    "optim.name": ("adamw", "adamw_8bit", "adafactor", "lion", "muon", "prodigy", "schedule_free"),
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
    "stop.patience": 0,
    "optim.lr": 0,
    "optim.clip": 0,
    "optim.weight_decay": 0,
}
RENAMED = {  # keys of former versions, and their replacements
    "lora.base": "give the base by model=MODEL and the adapter by lora.from=FOLDER",
}
BELOW_ONE = ("lora.dropout", "optim.b1", "optim.b2", "optim.ema")
DURATIONS = ("total", "optim.warmup", "every.log", "every.eval", "every.save", "every.sample")
MAPPING: Mapping[str, type] = {}


def load_config(
    path: str, overrides: Iterable[tuple[str, str]] = (), options: Mapping[str, type] = MAPPING
) -> dict[str, Any]:
    """Return the resolved config of a file's `get_config()` with overrides applied.

    A path that does not exist is looked up in the installed package, so that `configs/llm.py`
    works from a wheel too. An override of `lora.from` drops the file's `trainable` and `lora`.
    Raises UserError for a file that is absent, is not Python or has no get_config().
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
    config, overrides = module.get_config().to_dict(), list(overrides)
    if dict(overrides).get("lora.from"):  # the file's own are for new adapters
        config |= {"lora": {"alpha": 0.0}, "trainable": ""}
    return resolve_config(config, overrides, options)


def resolve_config(
    config: Mapping[str, Any],
    overrides: Iterable[tuple[str, str]] = (),
    options: Mapping[str, type] = MAPPING,
) -> dict[str, Any]:
    """Return a config with its defaults and the overrides, as nested dicts of JSON values.

    `options` maps a task's name to the dataclass of its own keys. A trip through JSON leaves the
    result equal: sequences are lists, and an int for a float key is a float. Configs of run
    folders and processes can therefore be compared with `==`. A value of the wrong type is kept,
    so that `read_config` can name its key. Raises UserError for a value that JSON cannot hold.
    """
    resolved = _plain(config, "")
    for key in RENAMED:  # run folders of former versions hold empty ones, without effect
        section, _, leaf = key.rpartition(".")
        if isinstance(node := resolved.get(section), dict) and node.get(leaf) == "":
            del node[leaf]
    schemas = (Config, options.get(str(config.get("task"))))
    kinds: dict[str, Any] = {}
    for schema in filter(None, schemas):
        kinds |= _complete(resolved, schema, "")
    for key, text in overrides:
        override(resolved, key, text, kinds)
    return resolved


def read_config(config: Mapping[str, Any], own: type | None = None) -> Config:
    """Return the frozen form of a config.

    `own` is the task's dataclass, whose fields are the keys of this task alone. Raises UserError
    that names the key for one that is unknown, missing or mistyped.
    """
    shared = {f.name for f in dataclasses.fields(Config)} - {"own"}
    ours = {f.name for f in dataclasses.fields(own)} if own else set(config) - shared
    needed = (_needed(Config) - {"own"}) | (_needed(own) if own else set())
    _check_keys(set(config), shared | ours, needed, "")
    values: dict[str, Any] = {k: v for k, v in config.items() if k in ours}
    if own:
        values = vars(_build(own, values, ""))
    cfg = _build(Config, {**{k: config[k] for k in shared & set(config)}, "own": values}, "")
    _check_choices(cfg)
    return cfg


def flatten_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the leaves of a config by dotted key."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            leaves.update(flatten_config(value, f"{prefix}{key}."))
        else:
            leaves[prefix + key] = value
    return leaves


def steps(duration: str, batch_size: int, examples: int, key: str) -> int:
    """Return the optimiser steps of a duration ("200_steps", "3_epochs", "10000_examples")."""
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


def override(
    config: dict[str, Any], key: str, text: str, kinds: Mapping[str, Any] = MAPPING
) -> None:
    """Set one leaf of a config to a text from the command line.

    `kinds` maps the schemas' dotted keys to types. These keys may be absent from the config. Any
    other key has to be there and keeps the type of its value. Raises UserError for an unknown key.
    """
    *sections, leaf = key.split(".")
    node: Any = config
    for section in sections:
        if key in kinds and isinstance(node, dict):
            node.setdefault(section, {})
        node = node.get(section) if isinstance(node, dict) else None
    known = isinstance(node, dict) and (key in kinds or leaf in node)
    if not known or isinstance(node.get(leaf), dict):
        _refuse_renamed(key)
        hint = near(key, {**flatten_config(config), **kinds}, "keys are")
        raise UserError(f"unknown config key {key!r}; {hint}")
    node[leaf] = _plain(_convert(key, text, kinds.get(key) or type(node[leaf])), key)


def _convert(key: str, text: str, kind: Any) -> Any:
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return _typed(key, value, kind)


def _typed(key: str, value: Any, kind: Any) -> Any:
    """Return a value as `kind`, which is a class, list or tuple[class, ...]."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (get_origin(kind) or kind) in (tuple, list):
        if not isinstance(value, list | tuple):
            raise UserError(f"config key {key}={value!r} must be a list, such as ['a', 'b']")
        inner, *_ = get_args(kind) or (None,)
        whole: Any = get_origin(kind) or kind
        return whole(
            _typed(f"{key}[{i}]", one, inner) if inner else one for i, one in enumerate(value)
        )
    if type(value) is not kind:
        raise UserError(f"config key {key}={value!r} must be {kind.__name__}")
    return value


def _plain(value: Any, key: str) -> Any:
    """Return a copy of a config's value as JSON would return it."""
    if isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return {str(name): _plain(one, f"{prefix}{name}") for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one, f"{key}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config key {key}={value} must be a finite number")
    if value is not None and type(value) not in (bool, int, float, str):
        raise UserError(
            f"config key {key}={value!r} is a {type(value).__name__}; write a number, a text,"
            " True, False or a list of them"
        )
    return value


def _complete(config: dict[str, Any], schema: type, prefix: str) -> dict[str, Any]:
    """Fill in the defaults of absent keys. Return the types of all keys by dotted key."""
    kinds: dict[str, Any] = {}
    for f in dataclasses.fields(schema):
        kind: Any = f.type
        name = _key(f)
        if dataclasses.is_dataclass(kind):
            absent = name not in config
            section = {} if absent else config[name]
            if isinstance(section, dict):
                kinds |= _complete(section, kind, f"{prefix}{name}.")  # type: ignore[arg-type]
            if absent and f.default is not dataclasses.MISSING:
                config[name] = section
        elif isinstance(kind, type) or get_origin(kind) is tuple:
            kinds[prefix + name] = kind
            if f.default is not dataclasses.MISSING:
                config.setdefault(name, _plain(f.default, prefix + name))
            if kind is float and type(config.get(name)) is int:
                config[name] = float(config[name])
    return kinds


def _key(f: dataclasses.Field) -> str:
    """Return the config key of a field: its name without the underscore behind a Python keyword."""
    return f.name.removesuffix("_")


def _needed(schema: type) -> set[str]:
    """Return the keys without a default, which a config has to hold."""
    return {
        _key(f)
        for f in dataclasses.fields(schema)
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING
    }


def _build(schema: type[Schema], values: Mapping[str, Any], prefix: str) -> Schema:
    fields = {_key(f): f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    _check_keys(set(values), set(fields), _needed(schema), prefix)
    built: dict[str, Any] = {}
    for name, value in values.items():
        kind: Any = fields[name].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UserError(f"config key {prefix}{name}={value!r} must be a section of keys")
            value = _build(kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif isinstance(kind, type) or get_origin(kind) is tuple:
            value = _typed(prefix + name, value, kind)
        built[fields[name].name] = value
    return schema(**built)


def _check_keys(got: set[str], known: set[str], needed: set[str], prefix: str) -> None:
    for name in sorted(got - known):
        _refuse_renamed(prefix + name)
        raise UserError(f"unknown config key {prefix}{name!r}; {near(name, known, 'keys are')}")
    missing = sorted(prefix + name for name in needed - got)
    if missing:
        raise UserError(f"config is missing {', '.join(missing)}; add them to the config file")


def _refuse_renamed(key: str) -> None:
    if key in RENAMED:
        raise UserError(f"config key {key} is gone: {RENAMED[key]}")


def _check_choices(cfg: Config) -> None:
    leaves = flatten_config(dataclasses.asdict(cfg))
    for key, choices in CHOICES.items():
        if leaves[key] not in choices:
            hint = near(str(leaves[key]), choices, "it is one of")
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
            f"batch_size={cfg.batch_size} does not split into micro_batches={cfg.micro_batches};"
            " give a multiple of it"
        )
