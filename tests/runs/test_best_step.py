"""Runs that keep their best step: what stays on disk, what is exported, where they stop."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import jax.numpy as jnp
import pytest
from safetensors.numpy import load_file

from jaxft import export, train
from jaxft.core import sharding
from jaxft.core.guards.best import BEST_FILE
from jaxft.tasks import Report
from jaxft.tasks.llm.preview import DecoderPreview
from tests.interrupted import timeless

CONFIG = ["--config", str(Path(__file__).resolve().parents[2] / "configs" / "llm.py")]
LR, MIDDLE = 1e-3, 3  # the measure is best where adapters have moved by 3 times LR
KEYS = {
    "total": "14_steps", "every.save": "1_steps", "every.eval": "2_steps", "lora.rank": 4,
    "optim.lr": LR, "optim.warmup": "0_steps", "optim.schedule": "constant", "batch_size": 4,
    "eval_examples": 4, "keep.best": "loss", "export.kind": "adapter",
}  # fmt: skip


@pytest.fixture(autouse=True)
def measured(monkeypatch, quick):
    """An evaluation whose loss falls and rises again: a function of the parameters alone."""

    def evaluate(self, params, mesh):
        moved = [x for path, x in params.items() if path.endswith("lora_b")]
        size = sum(x.size for x in moved)
        norm = float(jnp.sqrt(sum(jnp.sum(x.astype(jnp.float32) ** 2) for x in moved) / size))
        return Report({"loss": 1 + (norm / LR - MIDDLE) ** 2})

    monkeypatch.setattr(DecoderPreview, "evaluate", evaluate)


@pytest.fixture(scope="module")
def model(make_folder):
    return make_folder(tied=True)


@pytest.fixture
def run(model, make_flags):
    def start(work, changes=()):
        flags = make_flags(model, {**KEYS, **dict(changes)})
        return train.main([*CONFIG, "--workdir", str(work), *flags])

    return start


def evaluations(work):
    lines = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
    return {one["step"]: one["eval_loss"] for one in lines if "eval_loss" in one}


def tensors(folder):
    return load_file(folder / "adapter_model.safetensors")


def equal(a, b):
    return all((a[key] == b[key]).all() for key in a)


def test_the_best_step_stays_and_is_exported(run, tmp_path, capsys):
    work = tmp_path / "run"
    assert run(work) == 0
    shown = capsys.readouterr().out
    losses = evaluations(work)
    best = min((step for step in losses if step), key=losses.get)
    assert 2 < best < 10, "neither the first nor among the newest three"
    kept = json.loads((work / BEST_FILE).read_text())
    assert (kept["step"], kept["value"], kept["ended"]) == (best, losses[best], None)
    steps = sorted(int(x.name) for x in (work / "checkpoints").iterdir() if x.name.isdigit())
    assert steps == [best, 12, 13, 14]
    assert f"step {best} is the best of 14, and the one that is exported" in shown
    for step, name in ((best, "best"), (14, "last"), (None, "default")):
        words = ["--workdir", str(work), "--out", str(tmp_path / name)]
        assert export.main(words + ([f"--step={step}"] if step else [])) == 0
    assert f"step {best} is the best by loss" in capsys.readouterr().out
    made = tensors(work / "export")
    assert equal(made, tensors(tmp_path / "best")) and equal(made, tensors(tmp_path / "default"))
    assert not equal(made, tensors(tmp_path / "last"))
    shutil.rmtree(work / "checkpoints" / str(best) / "state" / "d")
    words = ["--workdir", str(work), "--out", str(tmp_path / "damaged")]
    assert export.main(words) == 0
    assert "is damaged" in capsys.readouterr().out
    assert equal(tensors(tmp_path / "damaged"), tensors(tmp_path / "last"))


def test_a_run_without_progress_stops_and_a_stopped_one_resumes_to_the_same(
    run, tmp_path, capsys, monkeypatch
):
    changes = {"stop.patience": 2}
    assert run(tmp_path / "whole", changes) == 0
    best = json.loads((tmp_path / "whole" / BEST_FILE).read_text())
    assert best["ended"] == best["step"] + 4 < 14
    assert list(evaluations(tmp_path / "whole"))[-1] == best["ended"]
    assert run(tmp_path / "whole", changes) == 0
    assert f"{best['ended']} of 14 steps, stopped early; nothing to do" in capsys.readouterr().out

    # The signal comes in the step before the best evaluation, which the checkpoint must include.
    inner, calls = sharding.place_batch, []

    def place(*given):
        calls.append(1)
        if len(calls) == best["step"]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)  # a thread receives it
        return inner(*given)

    monkeypatch.setattr(sharding, "place_batch", place)
    assert run(tmp_path / "broken", changes) == 75
    assert f"stopped at step {best['step']} of 14" in capsys.readouterr().err
    assert run(tmp_path / "broken", changes) == 0
    assert timeless(tmp_path / "broken") == timeless(tmp_path / "whole")
    assert json.loads((tmp_path / "broken" / BEST_FILE).read_text()) == best
    assert equal(tensors(tmp_path / "broken" / "export"), tensors(tmp_path / "whole" / "export"))


def test_a_lost_export_of_a_run_that_stopped_early_is_made_again(run, tmp_path):
    work = tmp_path / "run"
    assert run(work, {"stop.patience": 1}) == 0
    made, best = tensors(work / "export"), (work / BEST_FILE).read_text()
    shutil.rmtree(work / "export")
    lines = evaluations(work)
    assert run(work, {"stop.patience": 1}) == 0
    assert equal(tensors(work / "export"), made) and (work / BEST_FILE).read_text() == best
    assert evaluations(work) == lines


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"keep.best": "acuracy"}, "keep.best='acuracy' is not measured in this run"),
        ({"keep.best": "", "stop.patience": 1}, "add keep.best=loss"),
        ({"every.eval": "0_steps"}, "set every.eval=50_steps"),
        ({"stop.patience": -1}, "stop.patience=-1 must be at least 0"),
    ],
)
def test_keys_that_cannot_work_are_refused(run, tmp_path, capsys, changes, words):
    assert run(tmp_path / "run", changes) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
