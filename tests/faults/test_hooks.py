"""Faults that a variable plans, in a whole training."""

import json
from pathlib import Path

import pytest

from jaxft import train
from jaxft.core.guards.faults import FAULTS
from jaxft.core.guards.watchdog import IDLE_STARTS, STALL, STARTS
from tests.several import ends, start, told

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


def test_r8_r10_a_step_that_stalls_ends_with_76_and_not_for_ever(command, tmp_path):
    """Two starts are real. The others before the refusal are their record."""
    words = ["-m", "jaxft.train", *command]
    faults = {FAULTS: "stall@step:5,stall@step:3", STALL: "5"}
    for _ in range(2):  # step 2 is saved, and stands before the second start
        ((code, _, err),) = ends([start(words, devices=1, **faults)])
        (line,) = told(err)
        assert code == 76 and "takes longer than 5 s" in line, err
        assert "inject" in (tmp_path / "stalled-0.txt").read_text()
    record = json.loads((tmp_path / STARTS).read_text())
    assert record == {"step": 2, "starts": 1}
    (tmp_path / STARTS).write_text(json.dumps({**record, "starts": IDLE_STARTS}))
    ((code, _, err),) = ends([start(words, devices=1)])
    assert code == 70 and "without a checkpoint after step 2" in err
