"""Descriptions of config keys, read from the docstrings of their dataclasses.

The help, the completion and docs/config.md have the same lines.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from jaxft.core.config import MAPPING, flatten_config
from jaxft.core.configs.schema import CHOICES, Config

KEY_ENTRY = re.compile(r" {4}(\w+): (.+(?:\n {8,}.+)*)")
DURATION = re.compile(r"\d+_(steps|epochs|examples)")
_KINDS = {str: "text", int: "integer", float: "number", bool: "switch"}


class ConfigKey(NamedTuple):
    """A config key. `default` is that of its dataclass, MISSING for a key without one."""

    name: str
    group: str
    kind: str
    about: str
    default: Any

    @property
    def allowed(self) -> str:
        """The choices of the key, or its type."""
        return ", ".join(CHOICES.get(self.name, ())) or self.kind


def entries(schema: type) -> dict[str, str]:
    """Return the description of each key that a dataclass's docstring lists."""
    found = KEY_ENTRY.findall(schema.__doc__ or "")
    return {name: " ".join(text.split()) for name, text in found}


def keys_of(schema: type, group: str, config: Mapping[str, Any] = MAPPING) -> list[ConfigKey]:
    """Return the keys of a dataclass, those of nested ones behind its own.

    config: a config, whose values tell durations from other texts.
    """
    return list(_walk(schema, flatten_config(config), "", group))


def _walk(schema: type, leaves: Mapping[str, Any], prefix: str, group: str) -> Iterator[ConfigKey]:
    about, nested = entries(schema), []
    for field in dataclasses.fields(schema):
        name, kind = field.name.removesuffix("_"), field.type
        if dataclasses.is_dataclass(kind):
            nested.append((name, kind))
        elif name in about:
            value = leaves.get(prefix + name, field.default)
            timed = isinstance(value, str) and DURATION.fullmatch(value)
            shown = "duration" if timed else _KINDS.get(kind, "list")  # type: ignore[arg-type]
            yield ConfigKey(prefix + name, group, shown, about[name], field.default)
    for name, kind in nested:
        yield from _walk(kind, leaves, f"{prefix}{name}.", name)  # type: ignore[arg-type]


def keys_of_task(
    task: str, options: Mapping[str, type], config: Mapping[str, Any] = MAPPING
) -> list[ConfigKey]:
    """Return the keys of a task: its own, then those of all tasks.

    options: the dataclass of each task's own keys.
    """
    shared = keys_of(Config, "run", config)
    first = [key for key in shared if key.group == "run"]
    return first + keys_of(options[task], task, config) + shared[len(first) :]
