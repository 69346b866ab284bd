"""Command lines of the commands, read by their table. Other trainers' names are refused."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxft.core.cli.commands import COMMANDS
from jaxft.core.cli.helping import command_help
from jaxft.core.cli.keys import keys_of_task
from jaxft.core.configs.synonyms import SYNONYMS, advice, quoted
from jaxft.core.errors import Printed, UserError
from jaxft.core.runtime import Arguments, parse_arguments


def parse(name: str, argv: Sequence[str], tasks: Mapping[str, type]) -> Arguments:
    """Return the options and overrides of a command. A switch that is given is "True".

    tasks: the dataclass of each task's own keys. Raises: Printed for --help. UserError
    for a word that the command does not know, with the option or key that does its work.
    """
    if "--help" in argv or "-h" in argv:
        raise Printed(command_help(name, argv, tasks))
    options = COMMANDS[name].options
    switches = {f"--{one.name}" for one in options if not one.value}
    allowed = [one.name for one in options if one.value]
    words = [word for word in argv if word not in switches]
    _refuse(words, allowed, tasks)
    parsed = parse_arguments(words, allowed)
    for one in options:
        if one.value != "TEXT" and parsed.options.get(one.name) == "":
            raise UserError(
                f"--{one.name} is empty; give --{one.name}={one.value}, or leave it out"
            )
    given = {word.removeprefix("--"): "True" for word in argv if word in switches}
    return parsed._replace(options={**parsed.options, **given})


def _refuse(words: list[str], allowed: list[str], tasks: Mapping[str, type]) -> None:
    """Raise UserError for the first word that is a key or a name of another trainer."""
    known = {key.name for task in tasks for key in keys_of_task(task, tasks)}
    place = 0
    while place < len(words):
        word = words[place]
        name, equals, value = word.removeprefix("--").partition("=")
        dashed, place = word.startswith("--"), place + 1
        if dashed and not equals and place < len(words) and not words[place].startswith("--"):
            value, place = words[place], place + 1
        if dashed and (name in allowed or name.startswith("config.")):
            continue
        # One of both means the same by another number (clip_skip).
        if name in known and name not in SYNONYMS and (dashed or equals):
            shown = quoted(value) if value else "VALUE"
            raise UserError(f"{name} is a key of the config: give --config.{name}={shown}")
        if (dashed or equals) and (line := advice(name, value)):
            raise UserError(line)
        if not dashed and "config" in allowed and Path(word).suffix in (".py", ".yaml", ".json"):
            raise UserError(f"{word} stands without its option: give --config={word}")
