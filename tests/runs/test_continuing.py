"""A run goes on by `--workdir` alone, and to a longer total, as if it had never ended."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from jaxft import train
from tests.interrupted import timeless

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ["--config", str(ROOT / "configs" / "llm.py")]
CHANGES = {"optim.schedule": "constant", "optim.warmup": "1_steps", "every.save": "2_steps"}


@pytest.fixture(scope="module")
def model(make_folder):
    return make_folder(tied=True)


def command(work, *flags):
    return train.main(["--workdir", str(work), *flags])


def left_by(work):
    """What a run leaves: losses of every step, and the exported weights."""
    steps = [record for record in timeless(work) if "loss" in record]
    tensors = load_file(work / "export" / "model.safetensors")
    return steps, {key: tensor.tobytes() for key, tensor in tensors.items()}


@pytest.mark.usefixtures("quick")
def test_a_longer_total_equals_the_longer_run_bitwise(model, make_flags, tmp_path, capsys):
    flags = make_flags(model, {**CHANGES, "lora.rank": 0, "total": "7_steps"})
    assert command(tmp_path / "whole", *CONFIG, *flags) == 0
    opening = capsys.readouterr().out.partition("eval at step 0")[0]
    assert 3 < len(opening.splitlines()) <= 12, "parameter paths are in the manifest"
    manifest = json.loads((tmp_path / "whole" / "manifest.json").read_text())
    assert manifest["trained"]["layers.self_attn.q_proj.kernel"] == [2, 32, 4, 8]
    work = tmp_path / "run"
    assert command(work, *CONFIG, *flags[:-1], "--config.total=4_steps") == 0
    assert left_by(work) != left_by(tmp_path / "whole")
    capsys.readouterr()
    assert command(work, "--config.total=7_steps") == 0
    shown = capsys.readouterr().out
    assert "resumed from step 4; total 4_steps -> 7_steps" in shown and "constant: 0.001" in shown
    assert left_by(work) == left_by(tmp_path / "whole")
    totals = json.loads((work / "manifest.json").read_text())["totals"]
    assert totals == [{"total": "4_steps", "from_step": 0}, {"total": "7_steps", "from_step": 4}]
    assert command(work) == 0
    assert "is finished: 7 of 7 steps" in capsys.readouterr().out
    assert command(work, "--config.total=5_steps") == 2
    assert "N above 7" in capsys.readouterr().err


def test_a_folder_without_a_run_is_told(tmp_path, capsys):
    assert command(tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert "--config is missing" in error and str(tmp_path / "none" / "config.json") in error
    assert train.main([]) == 2
    assert "--config is missing: jaxft train" in capsys.readouterr().err


def test_the_config_of_a_run_needs_a_folder_for_the_new_one(tmp_path, capsys):
    assert train.main(["--config", str(tmp_path / "config.json")]) == 2
    assert f"--workdir={tmp_path} resumes that run" in capsys.readouterr().err
