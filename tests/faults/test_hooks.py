"""Faults that a variable plans, in a whole training."""

from pathlib import Path

import pytest

from jaxft import train
from jaxft.core.guards.faults import FAULTS

CONFIG = ["--config", str(Path(__file__).resolve().parents[2] / "configs" / "llm.py")]


@pytest.fixture
def command(make_folder, make_flags, tmp_path):
    keys = {"total": "8_steps", "every.save": "2_steps", "lora.rank": 2, "eval_examples": 4}
    keys |= {"every.log": "1_steps", "every.sample": "0_steps", "export.kind": "none"}
    return [*CONFIG, "--workdir", str(tmp_path), *make_flags(make_folder(tied=True), keys)]


def test_s1_s5_d9_a_nan_a_full_disk_and_a_flipped_bit_lose_nothing(
    command, tmp_path, capsys, monkeypatch, quick
):
    monkeypatch.setenv(FAULTS, "nan@step:3,enospc@save:1,flip@ckpt:4")
    assert train.main(command) == 0
    out = capsys.readouterr().out
    assert "step 3 is skipped, because its loss is nan" in out
    assert "the disk was full before step 2 was saved" in out and "the run goes on" in out
    monkeypatch.delenv(FAULTS)
    assert train.main([*command, "--config.total=9_steps"]) == 0
    out = capsys.readouterr().out
    assert "the checkpoint of step 8 is damaged" in out and "going on from step 6" in out
    assert (tmp_path / "checkpoints" / "8.bad").exists()


def test_an_unknown_fault_ends_a_run_before_its_first_step(command, capsys, monkeypatch, quick):
    monkeypatch.setenv(FAULTS, "kill@lunch")
    assert train.main(command) == 2
    assert "JAXFT_FAULT='kill@lunch'" in capsys.readouterr().err
