"""Evaluations: the same numbers for every batch size, length of rows and number of devices."""

import json
from pathlib import Path

import jax
import pytest

from jaxft.core.config import load_config
from jaxft.tasks import OPTIONS
from tests import whole as runs
from tests.conftest import LINES

ROOT = Path(__file__).resolve().parents[3]
ROWS = 21  # no multiple of a batch, so that the last one is padded
PAIRS = [
    {
        "prompt": f"{i}: {LINES[i % 5]}",
        "chosen": f" {LINES[i % 3][: 5 + i]}",
        "rejected": f" no {i}",
    }
    for i in range(ROWS)
]
KINDS = {
    "llm": [{"prompt": row["prompt"], "completion": row["chosen"]} for row in PAIRS],
    "preference": PAIRS,
    "classify": [{"text": row["prompt"], "label": f"l{i % 3}"} for i, row in enumerate(PAIRS)],
}
# A loss that is no constant at step 0, and the labels of these rows.
OWN = {"llm": {}, "preference": {"objective": "orpo"}, "classify": {"labels": "l0,l1,l2"}}


@pytest.mark.parametrize("name", KINDS)
def test_a_loss_does_not_depend_on_batch_size_and_padding(
    name, make_folder, tmp_path, monkeypatch, one_thread
):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in KINDS[name]))
    data = {"data.train": file, "data.eval": file, "eval_examples": 0}
    shared = {"model": make_folder(), **data, **OWN[name]}
    found = []
    for changes in (
        {"batch_size": 8, "seq_len": 96},
        {"batch_size": 16, "seq_len": 96, "micro_batches": 2},
        {"batch_size": 8, "seq_len": 160},
        {"batch_size": 3, "seq_len": 128, "devices": 1},
    ):
        devices = changes.pop("devices", 8)
        monkeypatch.setattr(jax, "device_count", lambda *_, n=devices: n)
        given = [(key, str(value)) for key, value in {**shared, **changes}.items()]
        config = load_config(str(ROOT / "configs" / f"{name}.py"), given, OPTIONS)
        run = runs.open_run({**config, "cache": str(tmp_path / "cache")})
        assert run.mesh.size == devices
        with jax.set_mesh(run.mesh):
            params = runs.load_params(run)
            run.encode(params, run.chosen)
            found.append(run.preview.evaluate(params, run.mesh).metrics["loss"])
    assert found[1:] == pytest.approx([found[0]] * 3, rel=1e-6)
    assert found[0] > 0.5
