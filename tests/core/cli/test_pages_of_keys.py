"""docs/config.md and docs/coming-from.md hold the tables of the command line, and nothing else."""

from dataclasses import MISSING
from pathlib import Path

import pytest

from jaxft.core.cli.keys import keys_of
from jaxft.core.config import load_config
from jaxft.core.configs.schema import Config
from jaxft.core.configs.synonyms import AXOLOTL_NAMES, DIFFUSERS_NAMES, KOHYA_NAMES, TRL_NAMES
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[3]
DOCS = ROOT / "docs"
CONFIGS = {task: load_config(str(ROOT / "configs" / f"{task}.py"), (), OPTIONS) for task in OPTIONS}
SECTIONS = {"All tasks": keys_of(Config, "run", CONFIGS["llm"])}
SECTIONS |= {task: keys_of(schema, task, CONFIGS[task]) for task, schema in OPTIONS.items()}


def section(page, title):
    text = (DOCS / page).read_text().split(f"\n## {title}\n", 1)[1]
    return text.split("\n## ", 1)[0]


@pytest.mark.parametrize("title", SECTIONS)
def test_config_md_has_a_row_for_each_key_and_begins_it_with_its_description(title):
    """In the order of the dataclasses. A row may go on with details."""
    table = section("config.md", title).split("| key | type | meaning |\n| --- | --- | --- |\n")[1]
    rows = table.partition("\n\n")[0].splitlines()
    assert len(rows) == len(SECTIONS[title])
    for row, key in zip(rows, SECTIONS[title], strict=True):
        optional = key.default is not MISSING or key.group == "lora"
        start = f"| `{key.name}`{'°' if optional else ''} | {key.allowed} | "
        about = key.about.replace("|", "\\|").rstrip(".")
        assert row.startswith(f"{start}{about}"), f"begin the row with: {start}{about}"
        assert row[len(start + about) :].startswith((". ", " |")), row


def synonym_table(names):
    """The rows of docs/coming-from.md for the names of one trainer."""
    rows = ["| there | here |", "| --- | --- |"]
    for name, found in sorted(names.items()):
        option = found.key if found.key.startswith("--") else f"--config.{found.key}"
        example = f"`{option}={found.form.format('VALUE')}`" if found.key else ""
        key = set("._") & set(found.note.partition(" ")[0])  # is written as it is
        note = found.note if key else found.note[:1].upper() + found.note[1:]
        rows.append(f"| `{name}` | {'. '.join(filter(None, (example, note)))} |")
    return rows


@pytest.mark.parametrize(
    ("title", "names"),
    [
        ("TRL", TRL_NAMES),
        ("axolotl", AXOLOTL_NAMES),
        ("diffusers' training scripts", DIFFUSERS_NAMES),
        ("kohya", KOHYA_NAMES),
    ],
)
def test_coming_from_md_has_the_table_of_synonyms(title, names):
    rows = [row for row in section("coming-from.md", title).splitlines() if row.startswith("|")]
    assert rows == synonym_table(names)
