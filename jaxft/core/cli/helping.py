"""Texts of `--help`, from the table of commands and the descriptions of the keys."""

import dataclasses
import os
import shutil
import sys
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from jaxft.core.cli.commands import COMMANDS, DEBUG, HELP, Option
from jaxft.core.cli.keys import ConfigKey, keys_of_task
from jaxft.core.config import flatten_config, load_config
from jaxft.core.configs.schema import CHOICES
from jaxft.core.errors import UserError

_WIDTH, _INDENT = 100, 50  # columns of a help, and those in front of what a key is
_NARROW = 80  # the fewest columns that the help is made for
_OPTION = 24  # columns in front of what an option is
SHOWN_CONFIG = "configs/llm.py"  # the keys of a help without --config or --workdir
_COMPLETION = "Print the completion of a shell"
_TITLES = {
    "run": "the run",
    "llm": "language models",
    "preference": "preference objectives",
    "lora": "low-rank adapters",
    "optim": "the optimiser",
    "mesh": "devices",
    "every": "how often",
    "keep": "the best step",
    "stop": "early stopping",
}


def overview() -> str:
    """Return the help of `jaxft` itself."""
    names = [(name, one.about.partition(". ")[0].rstrip(".")) for name, one in COMMANDS.items()]
    names += [("completion", f"{_COMPLETION}: bash, zsh or fish")]
    return "\n".join(
        [
            "usage: jaxft COMMAND [--option VALUE …] [--config.KEY=VALUE …]",
            "",
            "Fine-tune generative models in JAX: a Hugging Face folder in, and one out.",
            "",
            *_columns(names),
            "",
            "jaxft COMMAND --help shows the options and keys of a command.",
            "jaxft --version shows the version.",
            "First run: jaxft train --config configs/diffusion.py",
        ]
    )


def completion_help() -> str:
    """Return the help of `jaxft completion`."""
    lines = ["usage: jaxft completion bash|zsh|fish", "", f"{_COMPLETION}."]
    return "\n".join([*lines, "", "example:", '  eval "$(jaxft completion bash)"'])


def command_help(name: str, argv: Sequence[str], options: Mapping[str, type]) -> str:
    """Return the help of a command. The keys have the values of `--config` or `--workdir`.

    options: the dataclass of each task's own keys.
    """
    command = COMMANDS[name]
    usage = ["usage: jaxft", name, command.words, "[--option VALUE …]"]
    usage += ["[--config.KEY=VALUE …]"] if command.keys else []
    rows = [(_option(one), one.about) for one in (*command.options, DEBUG, HELP)]
    lines = [" ".join(filter(None, usage)), "", *textwrap.wrap(command.about, _width())]
    lines += ["", "example:", f"  {command.example}", "", "options:", *_columns(rows)]
    if command.keys and any(one.name == "config" for one in command.options):
        file = _file(argv)
        lines += ["", *_keys(file, load_config(file, (), options), options)]
    return "\n".join(lines)


def _option(one: Option) -> str:
    return f"--{one.name} {one.value}".strip()


def _file(argv: Sequence[str]) -> str:
    """Return the config file that a command line names, by default `SHOWN_CONFIG`."""
    for place, word in enumerate(argv):
        name, equals, value = word.partition("=")
        value = value if equals else "".join(argv[place + 1 : place + 2])
        if name == "--config":
            return value
        if name == "--workdir" and (file := Path(value) / "config.json").is_file():
            return str(file)
    return SHOWN_CONFIG


def _keys(file: str, config: Mapping[str, Any], options: Mapping[str, type]) -> list[str]:
    """Return the lines of the keys, by group, with the values of a config."""
    if config.get("task") not in options:
        raise UserError(f"{file}: task={config.get('task')!r} is not one of {', '.join(options)}")
    leaves, keys = flatten_config(config), keys_of_task(config["task"], options, config)
    lines = [f"keys, with their values in {file}: set them by --config.KEY=VALUE"]
    for group, members in groupby(keys, key=lambda key: key.group):
        lines += ["", f"  {_TITLES.get(group, group)}:"]
        lines += [line for key in members for line in _key(key, leaves.get(key.name, key.default))]
    return [*lines, "", "docs/config.md has the details of every key."]


def _key(key: ConfigKey, value: Any) -> list[str]:
    """Return the lines of a key: its value, its type and what it is.

    In a narrow terminal, the type and what the key is have lines of their own.
    """
    if isinstance(value, list | tuple):
        value = list(value)
    shown = "" if value is dataclasses.MISSING else str(value).replace("\n", "\\n") or '""'
    shown = shown if len(shown) <= 44 else f"{shown[:43]}…"
    about = key.about.rstrip(".") + (f": {key.allowed}" if key.name in CHOICES else "")
    head, width = f"    {key.name:<21} {shown}", _width()
    if width < _WIDTH:
        margin = " " * 8
        text = f"({key.kind}) {about}"
        return [head, *textwrap.wrap(text, width, initial_indent=margin, subsequent_indent=margin)]
    first, *rest = textwrap.wrap(about, width - _INDENT)
    start = f"{head:<41}{key.kind:<9}{first}"
    if len(shown) > 14:
        start = f"{head}\n{' ' * (_INDENT - 9)}{key.kind:<9}{first}"
    return [start, *(" " * _INDENT + line for line in rest)]


def _columns(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Return lines of a name and what it is, which is wrapped in its column."""
    lines = []
    for name, about in rows:
        first, *rest = textwrap.wrap(about, _width() - _OPTION)
        lines += [f"  {name:<{_OPTION - 2}}{first}", *(" " * _OPTION + line for line in rest)]
    return lines


def _width() -> int:
    """Return the columns of the terminal, at most `_WIDTH`. A pager has stderr's terminal."""
    columns = shutil.get_terminal_size((0, 0)).columns
    with suppress(AttributeError, ValueError, OSError):
        columns = columns or os.get_terminal_size(sys.__stderr__.fileno()).columns  # type: ignore
    return min(max(_NARROW, columns or _WIDTH), _WIDTH)
