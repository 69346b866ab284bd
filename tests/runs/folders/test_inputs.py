"""Inputs of a run that change between its stop and its next start."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jaxft import export, train
from jaxft.core.errors import UserError
from jaxft.runs.folders import inputs
from jaxft.runs.folders.inputs import INPUTS, check_inputs, record_inputs

KEYS = (*inputs.MODEL_KEYS, "data.train", "data.eval")
CONFIG = ["--config", "configs/llm.py"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with a model, pictures and texts, and the config that names them."""
    monkeypatch.chdir(tmp_path)
    for folder in ("m", "pictures", "runs/a"):
        (tmp_path / folder).mkdir(parents=True)
    np.random.default_rng(0).integers(0, 256, 3 * 2**20, np.uint8).tofile(tmp_path / "m/w.bin")
    (tmp_path / "m/config.json").write_text("{}")
    for number in range(5):
        (tmp_path / f"pictures/{number}.png").write_bytes(bytes([number] * 9))
    for name in ("a.jsonl", "b.csv"):
        (tmp_path / name).write_text("words\n")
    data = {"train": "0.7*jsonl:a.jsonl + 0.3**.csv", "eval": "folder:pictures"}
    return tmp_path, {"model": "m", "tokenizer": "", "data": data, "lora": {"from": "demo:x"}}


def refused(place, key, name, keys=KEYS):
    with pytest.raises(UserError, match=rf"^{key}: .*{name}.* not as when the run in runs/a began"):
        check_inputs(Path("runs/a"), place[1], keys)


def test_case_llm_09_a_change_of_any_kind_is_found(place):
    root, config = place
    run = Path("runs/a")
    record_inputs(run, config)
    record = json.loads((run / INPUTS).read_text())
    assert {key: len(one["files"]) for key, one in record.items()} == {
        "model": 2,
        "data.train": 2,
        "data.eval": 5,
    }
    check_inputs(run, config)
    # Not inputs: what another program or this run leaves there.
    (root / "pictures/.DS_Store").write_text("x")
    (root / "pictures/cache.npy").write_text("x")
    (run / "metrics.csv").write_text("x")
    check_inputs(run, config)
    text = root / "a.jsonl"
    text.write_text("other\n")
    refused(place, "data.train", "a.jsonl is")
    check_inputs(run, config, inputs.MODEL_KEYS)
    text.write_text("words\n")
    os.utime(text, (1, 1))  # a copy has other times
    check_inputs(run, config)
    (root / "pictures/3.png").unlink()
    refused(place, "data.eval", "pictures/3.png is")
    (root / "pictures/3.png").write_bytes(bytes([3] * 9))
    (root / "pictures/9.png").write_bytes(b"new")
    refused(place, "data.eval", "other files")
    (root / "pictures/9.png").unlink()
    with (root / "m/w.bin").open("r+b") as weights:
        weights.seek(3 * 2**20 - 5)
        weights.write(b"other")
    refused(place, "model", "m/w.bin is")
    (run / INPUTS).unlink()
    check_inputs(run, config)  # as a run of an earlier version


def test_of_many_files_some_are_read_and_all_are_listed(place, monkeypatch):
    monkeypatch.setattr(inputs, "MOST_FILES", 2)
    root, config = place
    run = Path("runs/a")
    record_inputs(run, config)
    assert len(json.loads((run / INPUTS).read_text())["data.eval"]["files"]) == 2
    (root / "pictures/1.png").write_bytes(b"of another size")
    refused(place, "data.eval", "other sizes")


@pytest.mark.usefixtures("quick", "one_thread")
def test_case_llm_09_a_run_stops_at_other_data_and_an_export_at_another_base(
    make_folder, make_flags, records_file, tmp_path, capsys
):
    data = shutil.copy(records_file, tmp_path / "records.jsonl")
    model = shutil.copytree(make_folder(), tmp_path / "model")
    keys = {"total": "4_steps", "every.save": "2_steps", "mesh.fsdp": 1, "batch_size": 8}
    keys |= {"data.train": f"jsonl:{data}", "data.eval": "", "export.kind": "none"}
    command = [*CONFIG, "--workdir", str(tmp_path / "run"), *make_flags(model, keys)]
    assert train.main(command) == 0
    shutil.rmtree(tmp_path / "run/checkpoints/4")  # as after a kill
    whole = data.read_text()
    data.write_text(whole.replace("water", "metal"))
    assert train.main(command) == 2
    assert f"data.train: {data} is not as when the run in" in capsys.readouterr().err
    data.write_text(whole)
    out = ["--workdir", str(tmp_path / "run"), "--out", str(tmp_path / "out"), "--kind", "merged"]
    weights = model / "model.safetensors"
    former = weights.read_bytes()
    weights.write_bytes(former[:-1] + bytes([former[-1] ^ 1]))
    assert export.main(out) == 2
    assert f"model: {weights} is not as when the run in" in capsys.readouterr().err
    weights.write_bytes(former)
    assert export.main(out) == 0
    assert train.main(command) == 0
