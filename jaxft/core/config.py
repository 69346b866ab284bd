"""Configs: an ml_collections file plus `--config.a.b=value` overrides, read once into dataclasses.

Nothing heavy is imported here. A mistyped key thus fails before jax starts or weights are read.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, get_origin

from jaxft.core.configs.files import read_config_of
from jaxft.core.configs.schema import (
    AT_LEAST,
    AT_MOST,
    BELOW_ONE,
    CHOICES,
    DURATIONS,
    RENAMED,
    Config,
)
from jaxft.core.configs.synonyms import advice
from jaxft.core.configs.values import convert, plain, typed
from jaxft.core.errors import UserError, check_choice, near

Schema = TypeVar("Schema")


MAPPING: Mapping[str, type] = {}


def load_config(
    path: str, overrides: Iterable[tuple[str, Any]] = (), options: Mapping[str, type] = MAPPING
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
        hint = near(name, known, "keys are")
        if not hint.startswith("did you mean"):
            hint += "; if a newer jaxft wrote this config, install that version"
        raise UserError(f"unknown config key {prefix}{name!r}; {hint}")
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
        check_choice(key, leaves[key], choices)
    for key, least in AT_LEAST.items():
        if leaves[key] < least:
            raise UserError(f"config key {key}={leaves[key]} must be at least {least}")
    for key, most in AT_MOST.items():
        if leaves[key] > most:
            raise UserError(f"config key {key}={leaves[key]} must be at most {most}")
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
