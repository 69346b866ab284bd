"""The command `jaxft`: `jaxft train …` is the same as `python -m jaxft.train …`."""

import sys
from importlib import import_module

from jaxft import __version__
from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.cli.commands import COMMANDS
from jaxft.core.cli.completion import SHELLS, completion
from jaxft.core.cli.helping import completion_help, overview
from jaxft.core.errors import Printed, UserError, near
from jaxft.tasks import OPTIONS


def main() -> int:
    """Run the command that the command line names. Returns its exit status."""
    return run(sys.argv[1:])


def run(argv: list[str]) -> int:
    """Run a command line without its program. The help needs neither jax nor the command."""
    name = argv[0].replace("_", "-") if argv else "--help"
    if name in COMMANDS and not {"--help", "-h", "--version"} & set(argv):
        processes.restart_with_huge_pages()
        return import_module(COMMANDS[name].module).main(argv[1:])
    return processes.command(_answer, [name, *argv[1:]])


def _answer(argv: list[str]) -> None:
    """Raise Printed with a help, the version or a completion, and UserError for other words."""
    name, *words = argv
    if "--version" in argv:
        raise Printed(f"jaxft {__version__}")
    if name in COMMANDS:
        parse(name, words, OPTIONS)
    if name in ("--help", "-h", "help"):
        raise Printed(overview())
    if name == "completion":
        if {"--help", "-h"} & set(words):
            raise Printed(completion_help())
        if len(words) != 1 or words[0] not in SHELLS:
            raise UserError(f"name a shell: jaxft completion {'|'.join(SHELLS)}")
        raise Printed(completion(words[0], OPTIONS))
    hint = near(name, [*COMMANDS, "completion"], "commands are")
    raise UserError(f"unknown command {name!r}; {hint}")


if __name__ == "__main__":
    sys.exit(main())
