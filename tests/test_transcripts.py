"""docs/commands.md has the help of every command as it is now, at 80 columns."""

import importlib.util
from pathlib import Path

import pytest

from jaxft.core.cli.helping import overview

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    spec = importlib.util.spec_from_file_location("transcripts", ROOT / "tools" / "transcripts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_helps_of_the_page_are_those_of_the_commands(tool):
    page = tool.PAGE.read_text()
    assert page.endswith(tool.helps()), "run python tools/transcripts.py help"
    assert f"$ jaxft --help\n{overview()}\n" in page, "run python tools/transcripts.py"


def test_every_screen_of_the_page_is_of_80_columns(tool):
    blocks = tool.PAGE.read_text().split("```")[1::2]
    assert len(blocks) > 15
    wide = [line for block in blocks for line in block.splitlines() if len(line) > 80]
    assert all(line.startswith("$ ") for line in wide), wide


def test_each_kind_of_screen_is_there(tool):
    """What a newcomer meets, in the words of the code."""
    page = tool.PAGE.read_text()
    for words in (
        "compiling the step for a batch of",
        "| evaluating",
        "the same command resumes",
        "$ jaxft train --workdir runs/stickers\n",
        "give --config.optim.lr=1e-4",
        "GiB of a device; give\n",
    ):
        assert words in page, words
