"""The recipes of docs/recipes: one form, messages that exist, and (slow) their small runs."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.core import runtime
from jaxft.core.config import load_config, read_config
from jaxft.tasks import OPTIONS
from tests.test_pages import ROOT, printed

PAGES = sorted((ROOT / "docs" / "recipes").rglob("*.md"))
HEADINGS = ["Your data", "The command", "Try it here", "What came out", "If it goes wrong"]
LONGEST = 75  # lines of a page
each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)


def section(page: Path, heading: str) -> str:
    return page.read_text().partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_there_are_ten():
    assert len(PAGES) == 10


@each_page
def test_a_page_has_the_form_of_a_recipe(page):
    text = page.read_text()
    assert re.findall(r"^## (.*)", text, re.M) == HEADINGS
    assert len(text.splitlines()) <= LONGEST
    assert "You get" in text.partition("\n## ")[0]
    assert len(re.findall(r"^\| ", section(page, "If it goes wrong"), re.M)) in range(5, 8)


@each_page
def test_a_message_is_one_of_jaxft(page):
    """A symptom in backticks is a part of a text in the source, with … for what varies."""
    texts = "\0".join(
        node.value
        for file in (ROOT / "jaxft").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    for message in re.findall(r"^\| `([^`]+)`", section(page, "If it goes wrong"), re.M):
        for part in message.split("…"):
            assert part.strip() in texts, message


@each_page
def test_its_small_run_is_read_as_it_stands(page):
    lines = [one for one in printed(page) if one.module == "jaxft.train"]
    for line in lines:
        found = runtime.parse_arguments(line.arguments, ("config", "workdir"))
        if "config" in found.options:
            config = load_config(str(ROOT / found.options["config"]), found.overrides, OPTIONS)
            read_config(config, OPTIONS[config["task"]])


# ---- the small runs -------------------------------------------------------------------------


def run_here(page: Path, place: Path) -> str:
    """Run the blocks of "Try it here" in an empty folder. Returns what they print."""
    blocks = re.findall(r"^```bash\n(.*?)^```", section(page, "Try it here"), re.M | re.S)
    (place / "configs").symlink_to(ROOT / "configs")
    script = 'jaxft() { "$PYTHON" -m jaxft "$@"; }\n' + "".join(blocks)
    ran = subprocess.run(
        ["bash", "-e", "-c", script],
        cwd=place,
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    print(ran.stdout, ran.stderr)
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


def measures(work: Path, name: str) -> list[float]:
    lines = (work / "metrics.jsonl").read_text().splitlines()
    return [one[name] for one in map(json.loads, lines) if name in one]


def falls(work: Path, name: str = "eval_loss") -> None:
    first, *_, last = measures(work, name)
    assert last < first, (name, first, last)
