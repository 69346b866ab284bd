"""What a shipped config trains with adapters: them alone, a small share of the model."""

import math
from pathlib import Path

import pytest

from jaxft.core.config import load_config
from jaxft.runs.opening import open_run
from jaxft.tasks import OPTIONS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
DEVICE = [("mesh.data", "1"), ("mesh.fsdp", "1")]


@pytest.mark.parametrize(
    ("name", "changes"),
    [("diffusion", [("lora.rank", "8")]), ("llm", []), ("classify", []), ("preference", [])],
)
def test_adapters_alone_train(name, changes, monkeypatch):
    monkeypatch.setattr("jax.device_count", lambda *_: 1)
    run = open_run(load_config(str(CONFIGS / f"{name}.py"), [*changes, *DEVICE], OPTIONS))
    assert run.cfg.lora.rank > 0
    count = {path: math.prod(leaf.shape) for path, leaf in run.leaves.items()}
    share = sum(count[path] for path in run.chosen) / sum(count.values())
    assert 0 < share < 0.03
    heads = {path for path in run.chosen if "lora_" not in path}
    assert all("score" in path for path in heads)
