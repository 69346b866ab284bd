"""Command lines that README.md, docs/ and the docstrings of configs/ print, as words."""

import ast
import re
import shlex
from pathlib import Path
from typing import NamedTuple

from jaxft.core.cli.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
SCREENS = "commands.md"  # tools/transcripts.py ran its commands, test_transcripts.py compares it
RECIPES = sorted((ROOT / "docs" / "recipes").rglob("*.md"))
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *(page for page in sorted((ROOT / "docs").glob("*.md")) if page.name != SCREENS),
    *RECIPES,
    *sorted((ROOT / "configs").glob("*.py")),
]
COMMAND = (
    r"(?:python3?\s+(?:-m\s+jaxft|tools/)\S*"
    rf"|(?<![\w/.-])jaxft\s+(?:{'|'.join(COMMANDS)})\b)"
)
# What stands in a line for something that only its user knows: found among the places, or replaced.
WORDS = {
    "--step 50": "--step 2",
    "--topology h200:8": "--topology cpu:8",
    "--topology h100:1": "--topology cpu:1",
    "--size 512x768": "--size 24x32",
}
HERE = "Try it here"  # the section of a recipe whose commands test_recipes.py runs


class Line(NamedTuple):
    """One printed command of a page: `python -m jaxft.train …` as words."""

    page: str
    words: list[str]

    @property
    def module(self) -> str:
        return self.words[2] if self.words[1] == "-m" else self.words[1]

    @property
    def arguments(self) -> list[str]:
        return self.words[3 if self.words[1] == "-m" else 2 :]


def section(text: str, heading: str) -> str:
    """Return what stands below a heading of the second level."""
    return text.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def text_of(page: Path) -> str:
    """Return a page, or a config's docstring, without the small run of a recipe."""
    text = page.read_text()
    if page.suffix == ".py":
        return f"```\n{ast.get_docstring(ast.parse(text))}\n```"
    return text.replace(section(text, HERE), "") if page in RECIPES else text


def printed(text: str, name: str) -> list[Line]:
    """Commands of a text: in code blocks with their continued lines, and inline.

    What stands in brackets is optional, and taken.
    """
    lines = []
    for block, inline in re.findall(r"^```[a-z]*\n(.*?)^```|`([^`]+)`", text, re.M | re.S):
        lines += re.sub(r"\\\n", " ", block).splitlines() or [" ".join(inline.split())]
    parts = [part.strip() for line in lines for part in re.split(r"&&|;", line)]
    found = [re.sub(r"[][]", "", part) for part in parts if re.match(COMMAND, part)]
    for old, new in WORDS.items():
        found = [line.replace(old, new) for line in found]
    return [Line(name, as_module(shlex.split(line, comments=True))) for line in found]


def as_module(words: list[str]) -> list[str]:
    """`jaxft train …` as `python -m jaxft.train …`."""
    if words[0] != "jaxft":
        return words
    return ["python", "-m", COMMANDS[words[1]].module, *words[2:]]
