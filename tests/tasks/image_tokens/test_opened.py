"""Runs that go on from the PEFT folder of an image-token run."""

import json

import pytest

from jaxft import train
from jaxft.runs.opening import open_run
from tests.tiny_image_tokens import arguments
from tests.tiny_janus import SIZE, make_work

pytestmark = pytest.mark.usefixtures("quick")
KEYS = {
    "resolution": SIZE,
    "max_caption_tokens": 40,
    "batch_size": 8,
    "compute_dtype": "float32",
    "eval_generated": 0,
}
LORA = {
    "total": "2_steps",
    "optim.lr": 0.02,
    "lora.rank": 4,
    "lora.alpha": 6.0,
    "lora.targets": r"language_model\..*_proj",
    "trainable": r".*\.lora_[ab]|generation_head.*",
    "export.kind": "adapter",
}


def evaluations(work):
    lines = (work / "metrics.jsonl").read_text().splitlines()
    return [one["eval_ce"] for one in map(json.loads, lines) if "eval_ce" in one]


def test_a_janus_goes_on_from_its_adapter_and_the_head_beside_it(tmp_path, capsys):
    """The first evaluation is the last one there; what was saved whole trains again."""
    work = make_work(tmp_path / "janus")

    def flags(name, changes):
        keys = {**KEYS, **changes}
        return arguments(work / "model", work / "pictures", work / "cache", tmp_path / name, keys)

    assert train.main(flags("first", LORA)) == 0
    adapter = tmp_path / "first" / "export"
    said = json.loads((adapter / "adapter_config.json").read_text())
    assert "generation_head" in said["modules_to_save"]
    more = {"total": "1_steps", "lora.from": adapter, "export.kind": "adapter"}
    assert train.main(flags("second", more)) == 0
    start, end = evaluations(tmp_path / "second")
    before, after = evaluations(tmp_path / "first")
    assert abs(start - after) <= 1e-6 * after and end != start and before != after
    run = open_run(json.loads((tmp_path / "second" / "config.json").read_text()))
    heads = {path for path in run.chosen if ".lora_" not in path}
    assert heads and all(path.startswith("generation_head.") for path in heads)
    assert json.loads((tmp_path / "second/export/adapter_config.json").read_text()) == said
    capsys.readouterr()
    assert train.main(flags("third", {**more, "lora.rank": 8})) == 2
    assert "lora.rank=8, but " in capsys.readouterr().err
