"""The tables of README.md and docs/memory.md, compared with those of the code and of its tool."""

import json
import re
import sys
from pathlib import Path

import pytest

from jaxft.models import registry
from jaxft.models.decoders.gguf import GGUF_WRITTEN
from jaxft.models.pipelines.families import FLOW
from jaxft.tasks.autoencoder.exports import WRITERS as AUTOENCODER
from jaxft.tasks.diffusion.exports import WRITERS as DIFFUSION
from jaxft.tasks.image_tokens.exports import WRITERS as IMAGE_TOKENS
from jaxft.verify.pipelines.denoisers import FLOW_SUBJECTS

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TABLES = README.partition("<!-- models -->\n")[2].partition("<!-- /models -->")[0]
TEXTS, PICTURES = (
    [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    for table in TABLES.split("\n\n")
)
PICTURE_KINDS = {
    "denoiser": DIFFUSION,
    "autoencoder": AUTOENCODER,
    "image_tokens": IMAGE_TOKENS,
}
LONGEST = 125
FLOW_CLASSES = {name for name in registry.MODEL_TYPES["denoiser"] if "UNet" not in name}


def names(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


def test_it_is_short():
    assert len(README.splitlines()) <= LONGEST


def test_every_language_model_of_the_registry_has_a_row():
    listed = [name for row in TEXTS for name in names(row[1])]
    assert sorted(listed) == sorted(registry.MODEL_TYPES["decoder"])


@pytest.mark.parametrize("row", TEXTS, ids=lambda row: row[1])
def test_a_row_of_language_models_is_true(row):
    _, kinds, full, lora, quantised, gguf, classifier, verify = row
    assert [full, lora, quantised, verify] == ["yes"] * 4
    for name in names(kinds):
        assert (gguf == "yes") == (name in GGUF_WRITTEN)
        found = registry.find({"model_type": name}, "decoder")
        assert (classifier == "yes") == bool(found.classifier)


def test_every_picture_model_of_the_registry_has_a_row():
    listed = [name for row in PICTURES for name in names(row[1])]
    known = [name for kind in PICTURE_KINDS for name in registry.MODEL_TYPES[kind]]
    assert sorted(listed) == sorted(known)


@pytest.mark.parametrize("row", PICTURES, ids=lambda row: row[1])
def test_a_row_of_picture_models_is_true(row):
    kind = str(registry.find_family({"_class_name": names(row[1])[0]}))
    flow = row[1].strip("`") in FLOW_CLASSES
    refused = ("all", "inversion") if flow else ("all",)
    expected = [name for name in PICTURE_KINDS[kind] if name not in refused]
    assert row[5].split(", ") == expected
    assert row[2] == "yes" and (row[3] == "yes") == (kind != "autoencoder")
    assert (row[4] == "yes") == (kind == "denoiser") and row[6] == "yes"


def test_verify_compares_all_of_them():
    assert {*FLOW_SUBJECTS} == {*FLOW}
    assert len(FLOW_CLASSES) == len(FLOW)


def test_the_page_of_memory_is_that_of_its_tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import memory_table

    results = json.loads(memory_table.RESULTS.read_text())
    assert memory_table.PAGE.read_text() == memory_table.page(results)
    assert memory_table.card(7.1 * 2**30) == "8 GB" and memory_table.card(7.3 * 2**30) == "16 GB"
    assert memory_table.card(73 * 2**30) == "–"
    sys.modules.pop("memory_table")
