"""Write docs/commands.md: what a terminal of 80 columns shows, and the help of each command.

`python tools/transcripts.py` runs the commands in tmux, which it needs, and takes minutes.
`python tools/transcripts.py help` writes the helps again, and keeps the rest of the page.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from jaxft.core.cli.commands import COMMANDS
from jaxft.core.cli.helping import command_help, overview
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "commands.md"
COLUMNS, ROWS = 80, 100
PROMPT = "$ "
SECONDS = 500.0  # of the longest command
TRAIN = "jaxft train --config configs/image_tokens.py --workdir runs/stickers"
EVALUATED = "--config.total=12_steps --config.every.eval=6_steps --config.every.log=2_steps"
HELPS = "## Every command\n"
HEAD = """# The commands, as a terminal shows them

`jaxft --help` lists the commands. `jaxft COMMAND --help` shows the options of one, and its config
keys with the values of your config. `python tools/transcripts.py` writes this page: each screen
below is what tmux showed at 80 columns, on 2 CPU cores. A test compares the helps with the code.

```
{overview}
```

## A run

The last line names what runs now, and printed lines go above it. While the step compiles:

```
{compiling}
```

In training:

```
{training}
```

In an evaluation:

```
{evaluating}
```

## Stopped, and resumed by its folder alone

```
{resumed}
```

## A name of another trainer

The line has the key that does it here, with the value translated.
[coming-from.md](coming-from.md) has all names.

```
{synonyms}
```

## Too little memory

Nothing runs. The line has an estimate for each key that needs less. [memory.md](memory.md) says
what fits on your card, and `jaxft plan` what fits on devices that you do not have.

```
{memory}
```

"""


class Terminal:
    """A shell in tmux."""

    def __init__(self, folder: Path):
        self.name = f"transcripts-{os.getpid()}"
        size = ["-x", str(COLUMNS), "-y", str(ROWS), "-c", str(folder)]
        self._tmux("new-session", "-d", "-s", self.name, *size, "bash --norc")
        self.type(f"export PS1='{PROMPT}' PYTHONPATH={ROOT}; ln -s {ROOT}/configs .")
        self.type(f'jaxft() {{ {sys.executable} -m jaxft "$@"; }}; clear')
        time.sleep(2)

    def _tmux(self, *words: str) -> str:
        command = ["tmux", "-L", self.name, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def type(self, *keys: str) -> None:
        self._tmux("send-keys", "-t", self.name, *keys, "Enter")

    def interrupt(self) -> None:
        self._tmux("send-keys", "-t", self.name, "C-c")

    def screen(self) -> str:
        """Return what is shown, without the empty rows below it."""
        shown = self._tmux("capture-pane", "-p", "-J", "-t", self.name)
        return "\n".join(line.rstrip() for line in shown.splitlines()).strip("\n")

    def run(self, command: str, watch: Callable[[str], None] = lambda screen: None) -> str:
        """Return the screen after a command. `watch` gets those before its end."""
        self.type("clear")
        time.sleep(1)
        self.type(command)
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            time.sleep(0.2)
            screen = self.screen()
            if screen.endswith(f"\n{PROMPT.strip()}"):
                return screen.removesuffix(PROMPT.strip()).rstrip()
            watch(screen)
        raise TimeoutError(f"{command} takes more than {SECONDS:.0f} s")

    def close(self) -> None:
        self._tmux("kill-server")


def watched(terminal: Terminal) -> dict[str, str]:
    """Return the screens of a run that is stopped after its first evaluation, and resumed."""
    shown: dict[str, str] = {}
    interrupted: list[str] = []

    def watch(screen: str) -> None:
        last = screen.rpartition("\n")[2]
        bar = re.match(r"\[[#.]+\] step [1-9]", last)
        if last.startswith("compiling"):
            shown["compiling"] = screen
        elif bar and "evaluating" in last:
            shown["evaluating"] = last
        elif bar and "evaluating" not in shown:
            shown["training"] = last
        elif bar and not interrupted:
            interrupted.append(last)
            terminal.interrupt()

    stopped = terminal.run(f"{TRAIN} {EVALUATED}", watch).rpartition("\n")[2]
    resumed = terminal.run("jaxft train --workdir runs/stickers")
    shown["resumed"] = f"{stopped}\n{resumed}"
    return shown


def helps() -> str:
    """Return the help of each command at 80 columns. That of the keys ends after its first line."""
    os.environ["COLUMNS"] = str(COLUMNS)
    parts = [HELPS]
    for name in COMMANDS:
        text, keys, _ = command_help(name, [], OPTIONS).partition("keys, with their values")
        more = "keys, with their values in configs/llm.py: …" if keys else ""
        parts.append(f"```\n$ jaxft {name} --help\n{(text + more).rstrip()}\n```\n")
    return "\n".join(parts)


def main() -> None:
    os.environ["COLUMNS"] = str(COLUMNS)
    if sys.argv[1:] == ["help"]:
        PAGE.write_text(PAGE.read_text().partition(HELPS)[0] + helps())
        return
    with tempfile.TemporaryDirectory() as folder:
        terminal = Terminal(Path(folder))
        try:
            shown = watched(terminal)
            shown["synonyms"] = "\n".join(
                terminal.run(f"jaxft train --config configs/llm.py {words}")
                for words in ("--learning_rate 1e-4", "--num_train_epochs 3", "--config.lora_r=8")
            )
            shown["memory"] = terminal.run(
                "jaxft train --config configs/autoencoder.py --config.resolution=2048"
            )
        finally:
            terminal.close()
    page = HEAD.format(overview=f"$ jaxft --help\n{overview()}", **shown) + helps()
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
