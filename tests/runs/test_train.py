"""The command as people use it: what a run leaves, resumes bitwise, and exports."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from jaxft import train
from jaxft.data.text import store
from jaxft.runs.checkpoint import Checkpoints
from tests.interrupted import kill_after, start, timeless

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]


@pytest.fixture(scope="module")
def model(make_folder):
    return make_folder(tied=True)


@pytest.fixture
def flags(model, make_flags):
    base = {"total": "6_steps", "every.log": "2_steps"}
    return lambda changes=(): make_flags(model, {**base, **dict(changes)})


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def test_a_run_leaves_what_the_contract_says(flags, tmp_path, capsys):
    work = tmp_path / "run"
    assert train.main([*CONFIG, "--workdir", str(work), *flags()]) == 0
    shown = capsys.readouterr().out
    assert "step 2/6" in shown and "step 3/6" not in shown, "one line every log step"
    assert "before" in shown and "after" in shown and str(work / "export") in shown
    for name in ("config.json", "manifest.json", "metrics.jsonl", "checkpoints", "export"):
        assert (work / name).exists(), name
    steps = [r for r in records(work) if "loss" in r]
    assert [r["step"] for r in steps] == [1, 2, 3, 4, 5, 6]
    assert all({"loss", "grad_norm", "lr", "tokens_per_s"} <= r.keys() for r in steps)
    evals = [r for r in records(work) if "eval_loss" in r]
    assert [r["step"] for r in evals] == [0, 6]
    assert evals[1]["eval_loss"] < evals[0]["eval_loss"]
    _, loading = AutoModelForCausalLM.from_pretrained(work / "export", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert train.main([*CONFIG, "--workdir", str(work), *flags()]) == 0
    assert "finished" in capsys.readouterr().out


@pytest.mark.parametrize(
    "shape",
    [
        {"tied": True, "dtype": "bfloat16"},
        {"tied": False, "dtype": "bfloat16", "shard": "20KB"},
        {"tied": True, "dtype": "float32", "shard": "20KB"},
        {"tied": False, "dtype": "float32"},
    ],
    ids=str,
)
def test_t31_zero_steps_give_the_source_bitwise(make_folder, flags, tmp_path, shape):
    folder, work = make_folder(**shape), tmp_path / "run"
    changes = {"model": folder, "total": "0_steps", "lora.rank": 0}
    assert train.main([*CONFIG, "--workdir", str(work), *flags(changes)]) == 0
    source, made = (weights(place) for place in (folder, work / "export"))
    assert source.keys() == made.keys()
    for key, tensor in source.items():
        assert made[key].dtype == tensor.dtype and made[key].tobytes() == tensor.tobytes(), key
    before = json.loads((folder / "config.json").read_text())
    after = json.loads((work / "export" / "config.json").read_text())
    assert before.items() <= after.items(), "every field as it was"
    _, loading = LlamaForCausalLM.from_pretrained(work / "export", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]


def weights(folder):
    tensors = {}
    for file in Path(folder).glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def test_a_killed_run_resumes_bitwise_from_tokens_on_disk(flags, tmp_path, monkeypatch):
    """Large sets are memory-mapped files, which the second process finds and reads again."""
    changes = {"total": "8_steps", "every.save": "2_steps", "cache": tmp_path / "cache"}
    arguments = [*CONFIG, *flags(changes)]
    assert train.main([*arguments, "--workdir", str(tmp_path / "whole")]) == 0
    assert not list(tmp_path.glob("cache/text-*")), "a small set is kept in memory"
    broken, on_disk = tmp_path / "broken", "from jaxft.data.text import store; store.IN_MEMORY = 0"
    process = start([*arguments, "--workdir", str(broken)], on_disk)
    assert kill_after(process, broken, 5), "no process was killed in time"
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/text-*/*")}
    monkeypatch.setattr(store, "IN_MEMORY", 0)
    assert train.main([*arguments, "--workdir", str(broken)]) == 0
    assert made and made == {path: path.stat().st_mtime_ns for path in made}
    assert timeless(tmp_path / "whole") == timeless(broken)
    a, b = (weights(tmp_path / name / "export") for name in ("whole", "broken"))
    assert all(a[key].tobytes() == b[key].tobytes() for key in a)


def test_ema_is_neither_the_weights_nor_the_start(flags, model, tmp_path):
    common = {"lora.rank": 0, "optim.lr": 1e-2}
    for name, ema in (("plain", 0.0), ("ema", 0.99)):
        arguments = [*CONFIG, "--workdir", str(tmp_path / name)]
        assert train.main([*arguments, *flags({**common, "optim.ema": ema})]) == 0
    plain, average, start = (
        weights(place)["model.norm.weight"]
        for place in (tmp_path / "plain" / "export", tmp_path / "ema" / "export", model)
    )
    assert not np.array_equal(average, plain) and not np.array_equal(average, start)


def test_random_init_trains_and_exports_every_tensor(flags, model, tmp_path):
    work, changes = tmp_path / "run", {"init": "random", "lora.rank": 0, "total": "2_steps"}
    assert train.main([*CONFIG, "--workdir", str(work), *flags(changes)]) == 0
    loaded = LlamaForCausalLM.from_pretrained(work / "export", dtype=torch.float32)
    assert set(weights(work / "export")) == set(weights(model))
    assert torch.isfinite(loaded(torch.arange(8)[None]).logits).all()


def test_d9_steps_that_are_not_finite_are_skipped_and_end_a_run(flags, tmp_path, capsys):
    """The numbers of a step come one step late, but never later than its checkpoint."""
    changes = {"lora.rank": 0, "optim.lr": 1e30, "optim.warmup": "0_steps", "every.save": "1_steps"}
    arguments = [*CONFIG, "--workdir", str(tmp_path / "run")]
    assert train.main([*arguments, *flags({**changes, "total": "20_steps"})]) == 77
    out, err = capsys.readouterr()
    assert "step 2 is skipped, because its grad_norm is nan" in out and "step 10 is skipped" in out
    assert err.count("\n") == 1 and "nan at step 11, and 10 steps in a row were skipped" in err
    assert "before them" in err
    assert Checkpoints(tmp_path / "run").latest() == 1


def test_classification_reports_accuracy_and_rows(flags, tmp_path, capsys):
    file = tmp_path / "labels.jsonl"
    names = ["animal", "plant thing", "water"]
    lines = [json.dumps({"text": f"text {i}", "label": names[i % 3]}) for i in range(24)]
    file.write_text("\n".join(lines) + "\n")
    changes = {"data.train": f"jsonl:{file}", "data.eval": f"jsonl:{file}", "total": "2_steps"}
    work = tmp_path / "run"
    assert train.main([*CONFIG, "--workdir", str(work), *flags(changes)]) == 0
    assert {"eval_accuracy", "eval_perplexity", "eval_bits_per_byte"} <= records(work)[-1].keys()
    assert "predicted before" in capsys.readouterr().out
