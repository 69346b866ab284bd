"""Configs: an ml_collections file plus `--config.a.b=value` overrides, read once into dataclasses.

Nothing heavy is imported here. A mistyped key thus fails before jax starts or weights are read.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_origin

from jaxft.core.cli.config_files import read_config_of
from jaxft.core.cli.synonyms import advice
from jaxft.core.cli.values import convert, plain, typed
from jaxft.core.errors import UserError, near
from jaxft.core.guards.best import Keep, Stop

Schema = TypeVar("Schema")


@dataclasses.dataclass(frozen=True)
class DataKeys:
    """Training and evaluation records.

    train: records to train on: a path, SCHEME:PLACE, or a mixture of them.
    eval: held-out records. Empty skips the evaluation.
    """

    train: str
    eval: str


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters. Names with an underscore, `from_`, are the keys without it.

    rank: rank of the adapters. 0 is off.
    alpha: scale of the adapters, which is divided by the rank.
    targets: regex over projections, or all-linear. Empty is the attention.
    rslora: divide alpha by the square root of the rank.
    dropout: dropout of the inputs of the adapters.
    from: a LoRA file or PEFT folder to continue from, with its ranks and targets.
    ranks: ranks of some projections, "REGEX=RANK, REGEX=RANK/ALPHA".
    layers: layers that get adapters, such as "0-3,7". Empty is all.
    dora: also train the norm of each row of the weights (DoRA).
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
    """Optimiser and learning rate.

    name: the optimiser.
    lr: peak of the learning rate.
    schedule: course of the learning rate after the warm-up.
    warmup: linear rise of the learning rate at the start.
    weight_decay: decoupled weight decay, for matrices only.
    clip: largest global norm of the gradient. 0 is off.
    ema: decay of the moving average that is evaluated and exported. 0 is off.
    b1: decay of the first moment.
    b2: decay of the second moment.
    lr_by: factors of lr for some parameters, "REGEX=0.1, REGEX=2".
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
    """Number of devices along each mesh axis. -1 takes the devices that remain.

    data: devices that each hold all parameters.
    fsdp: devices that share the parameters.
    tensor: devices that share each matrix product.
    """

    data: int
    fsdp: int
    tensor: int


@dataclasses.dataclass(frozen=True)
class Every:
    """Periods. "0_steps" is never.

    log: between two printed lines. metrics.jsonl has every step.
    eval: between two evaluations. The first and the last are always made.
    save: between two checkpoints. The last is always written.
    sample: between two samples. The last is always made.
    """

    log: str
    eval: str
    save: str
    sample: str


@dataclasses.dataclass(frozen=True)
class ExportKeys:
    """The export at the end of a run.

    kind: what is written, by task. none is nothing.
    dtype: dtype of the files. source keeps that of each tensor.
    """

    kind: str
    dtype: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Keys that all tasks share. `own` holds the keys of the task alone.

    task: llm, diffusion, autoencoder or image_tokens.
    model: a Hugging Face or diffusers folder, a hub id, pip:PACKAGE or demo:NAME.
    init: pretrained weights, or random ones for the configs of the folder.
    seed: seed of data order, random weights, dropout and noise.
    total: length of the run. 0_steps imports, evaluates and exports.
    batch_size: examples per step over all devices, the same on every mesh.
    micro_batches: number of parts in which a batch is processed. The loss stays the same.
    trainable: regex over parameter paths. Empty is the adapters, or everything without them.
    compute_dtype: dtype of the computation. auto is bfloat16, on a CPU float32.
    param_dtype: dtype of the imported parameters. Adapters and moments are float32.
    remat: recomputation in the backward pass, which saves memory.
    """

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

    The file is Python with get_config(), YAML that changes another config, or a run's config.json.
    An override of `lora.from` drops the file's `trainable` and `lora`. Raises UserError for a file
    that is absent or is no config.
    """
    config, changes = read_config_of(path)
    overrides = [*changes, *overrides]
    if dict(overrides).get("lora.from"):  # the file's own are for new adapters
        config |= {"lora": {"alpha": 0.0}, "trainable": ""}
    return resolve_config(config, overrides, options)


def resolve_config(
    config: Mapping[str, Any],
    overrides: Iterable[tuple[str, Any]] = (),
    options: Mapping[str, type] = MAPPING,
) -> dict[str, Any]:
    """Return a config with its defaults and the overrides, as nested dicts of JSON values.

    `options` maps a task's name to the dataclass of its own keys. A trip through JSON leaves the
    result equal: sequences are lists, and an int for a float key is a float. Configs of run
    folders and processes can therefore be compared with `==`. A value of the wrong type is kept,
    so that `read_config` can name its key. Raises UserError for a value that JSON cannot hold.
    """
    resolved = plain(config, "")
    for key in RENAMED:  # run folders of former versions hold empty ones, without effect
        section, _, leaf = key.rpartition(".")
        if isinstance(node := resolved.get(section), dict) and node.get(leaf) == "":
            del node[leaf]
    schemas = (Config, options.get(str(config.get("task"))))
    kinds: dict[str, Any] = {}
    for schema in filter(None, schemas):
        kinds |= _complete(resolved, schema, "")
    for key, text in overrides:
        if key not in kinds:
            _refuse_others(key, str(config.get("task")), options)
        override(resolved, key, text, kinds)
    return resolved


def _refuse_others(key: str, task: str, options: Mapping[str, type]) -> None:
    """Raise UserError for a key of another task."""
    owners = [name for name, schema in options.items() if key in _complete({}, schema, "")]
    if owners and task in options:
        raise UserError(
            f"config key {key} belongs to task={' or '.join(owners)}, not to task={task}; give"
            f" --config=configs/{owners[0]}.py, or leave the key out"
        )


def read_config(config: Mapping[str, Any], own: type | None = None) -> Config:
    """Return the frozen form of a config.

    `own` is the task's dataclass, whose fields are the keys of this task alone. Raises UserError
    that names the key for one that is unknown, missing or mistyped.
    """
    shared = {f.name for f in dataclasses.fields(Config)} - {"own"}
    ours = {f.name for f in dataclasses.fields(own)} if own else set(config) - shared
    needed = (_needed(Config) - {"own"}) | (_needed(own) if own else set())
    _check_keys(config, shared | ours, needed, "")
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
    config: dict[str, Any], key: str, text: Any, kinds: Mapping[str, Any] = MAPPING
) -> None:
    """Set one leaf of a config to a text from the command line, or a list of texts.

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
        _refuse_renamed(key, text)
        hint = near(key, {**flatten_config(config), **kinds}, "keys are")
        raise UserError(f"unknown config key {key!r}; {hint}")
    node[leaf] = plain(convert(key, text, kinds.get(key) or type(node[leaf])), key)


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
                config.setdefault(name, plain(f.default, prefix + name))
            if kind is float and type(config.get(name)) is int:
                config[name] = float(config[name])
    return kinds


def _key(f: dataclasses.Field) -> str:
    """Return the config key of a field: its name without the underscore behind a Python keyword."""
    return f.name.removesuffix("_")


def _needed(schema: type) -> set[str]:
    """Return the keys without a default, which a config has to hold."""
    return {_key(f) for f in dataclasses.fields(schema) if f.default is dataclasses.MISSING}


def _build(schema: type[Schema], values: Mapping[str, Any], prefix: str) -> Schema:
    fields = {_key(f): f for f in dataclasses.fields(schema)}  # type: ignore[arg-type]
    _check_keys(values, set(fields), _needed(schema), prefix)
    built: dict[str, Any] = {}
    for name, value in values.items():
        kind: Any = fields[name].type
        if dataclasses.is_dataclass(kind):
            if not isinstance(value, Mapping):
                raise UserError(f"config key {prefix}{name}={value!r} must be a section of keys")
            value = _build(kind, value, f"{prefix}{name}.")  # type: ignore[arg-type]
        elif isinstance(kind, type) or get_origin(kind) is tuple:
            value = typed(prefix + name, value, kind)
        built[fields[name].name] = value
    return schema(**built)


def _check_keys(values: Mapping[str, Any], known: set[str], needed: set[str], prefix: str) -> None:
    for name in sorted(values.keys() - known):
        _refuse_renamed(prefix + name, values[name])
        raise UserError(f"unknown config key {prefix}{name!r}; {near(name, known, 'keys are')}")
    missing = sorted(prefix + name for name in needed - values.keys())
    if missing:
        raise UserError(
            f"config is missing {', '.join(missing)}; add them to the config file, or"
            " begin a YAML file with `config: configs/llm.py`"
        )


def _refuse_renamed(key: str, value: Any) -> None:
    """Raise UserError for a key of a former version, or the name of another trainer."""
    if key in RENAMED:
        raise UserError(f"config key {key} is gone: {RENAMED[key]}")
    if line := advice(key, str(value)):
        raise UserError(f"config key {line}")


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
