"""The recipes of docs/recipes: one form, messages that exist, and (slow) their small runs."""

import ast
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxft.core import runtime
from jaxft.core.config import load_config, read_config
from jaxft.tasks import OPTIONS
from tests.printed import HERE, RECIPES, ROOT, printed, section

HEADINGS = ["Your data", "The command", HERE, "What came out", "If it goes wrong"]
LONGEST = 90  # lines of a page
COUNT = 10
each_page = pytest.mark.parametrize("page", RECIPES, ids=lambda page: page.stem)


def test_there_are_ten():
    assert len(RECIPES) == COUNT == len(CHECKS)


@each_page
def test_a_page_has_the_form_of_a_recipe(page):
    text = page.read_text()
    assert re.findall(r"^## (.*)", text, re.M) == HEADINGS
    assert len(text.splitlines()) <= LONGEST
    assert "You get" in text.partition("\n## ")[0]
    rows = re.findall(r"^\| ", section(text, "If it goes wrong"), re.M)
    assert 3 <= len(rows) - 2 <= 5


@pytest.fixture(scope="module")
def texts():
    """All texts of the source."""
    nodes = (
        node
        for file in (ROOT / "jaxft").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
    )
    constants = (node.value for node in nodes if isinstance(node, ast.Constant))
    return "\0".join(text for text in constants if isinstance(text, str))


@each_page
def test_a_quoted_message_is_one_of_jaxft(page, texts):
    """A symptom in backticks is a part of a text in the source, with … for what varies."""
    rows = section(page.read_text(), "If it goes wrong")
    for message in re.findall(r"^\| `([^`]+)` \|", rows, re.M):
        for part in message.split("…"):
            assert part.strip() in texts, message


@each_page
def test_the_small_run_is_read_as_it_stands(page):
    lines = printed(section(page.read_text(), HERE), page.name)
    for line in (one for one in lines if one.module == "jaxft.train"):
        found = runtime.parse_arguments(line.arguments, ("config", "workdir"))
        config = load_config(str(ROOT / found.options["config"]), found.overrides, OPTIONS)
        read_config(config, OPTIONS[config["task"]])


# ---- the small runs -------------------------------------------------------------------------


def measures(work: str, name: str) -> list[float]:
    lines = Path(work, "metrics.jsonl").read_text().splitlines()
    return [one[name] for one in map(json.loads, lines) if name in one]


def falls(work: str, name: str = "eval_loss") -> None:
    first, *_, last = measures(work, name)
    assert last < first, (name, first, last)


def chat() -> None:
    falls("runs/chat")
    assert Path("runs/chat/export/chat_template.jinja").is_file()


def classifier() -> None:
    falls("runs/classify")
    first, *_, last = measures("runs/classify", "eval_accuracy")
    assert last > max(first, 2 / 25), "25 classes"


def ollama() -> None:
    falls("runs/words")
    (file,) = Path("runs/words/export").glob("*.gguf")
    assert file.read_bytes()[:4] == b"GGUF" and file.stat().st_size < 160e6


def dpo() -> None:
    first, *_, last = measures("runs/dpo", "eval_loss")
    assert first == pytest.approx(0.6931, abs=1e-3) and last < first
    assert measures("runs/dpo", "eval_rewards/margins")[-1] > 0


def lora() -> None:
    falls("runs/zwx")
    assert len([*Path("runs/zwx/export").glob("*.safetensors")]) == 2


def dreambooth() -> None:
    falls("runs/rooster")
    assert [*Path("runs/rooster/samples").glob("*.png")]


def full() -> None:
    falls("runs/full")
    assert [*Path("runs/full/export").glob("*.safetensors")]


def vae() -> None:
    first, *_, last = measures("runs/vae", "eval_psnr")
    assert last > first


def dalle() -> None:
    first, *_, last = measures("runs/dalle", "eval_ce")
    assert last < first / 3, (first, last)
    assert [*Path("runs/dalle/samples").glob("sample-*.png")]


CHECKS: dict[str, Callable[[], None]] = {
    "sft-chat": chat,
    "text-classifier": classifier,
    "continued-pretraining": lambda: falls("runs/novel"),
    "lora-to-ollama": ollama,
    "dpo": dpo,
    "sd-lora-comfyui": lora,
    "dreambooth": dreambooth,
    "sdxl-full": full,
    "vae": vae,
    "dalle-128": dalle,
}


@pytest.mark.slow
@each_page
def test_the_small_run_gives_what_the_page_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").symlink_to(ROOT / "configs")
    blocks = re.findall(r"^```bash\n(.*?)^```", section(page.read_text(), HERE), re.M | re.S)
    shortcut = f'jaxft() {{ "{sys.executable}" -m jaxft "$@"; }}\n'
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ran = subprocess.run(
        ["bash", "-e", "-c", shortcut + "".join(blocks)],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""},
        capture_output=True,
        text=True,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stderr[-2000:]
    CHECKS[page.stem]()
