"""What a user can get wrong: one line with the file or key and the fix, a non-zero exit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxft import train
from jaxft.core.errors import UNWRITABLE

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def model(make_folder):
    return make_folder(tied=False)


@pytest.fixture
def broken(model, tmp_path):
    """A copy of the model to break."""
    return Path(shutil.copytree(model, tmp_path / "broken"))


@pytest.fixture
def fails(model, make_flags, tmp_path, capsys):
    """`fails(words, {key: value})`: the run stops with a status and one line with all words."""

    def check(words, changes, workdir=None, status=2):
        flags = make_flags(model, {"total": "2_steps", **changes})
        place = workdir or tmp_path / "run"
        config = str(ROOT / "configs" / "llm.py")
        code = train.main(["--config", config, "--workdir", str(place), *flags])
        error = capsys.readouterr().err.strip().splitlines()
        assert code == status
        assert len(error) == 1 and error[0].startswith("jaxft: "), error
        for word in words:
            assert str(word) in error[0], f"{word!r} is not in {error[0]!r}"
        assert not (place / "export").exists()

    return check


def jsonl(tmp_path, *lines):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join(x if isinstance(x, bytes) else x.encode() for x in lines) + b"\n")
    return file


def edit_json(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rows(count):
    return [json.dumps({"prompt": f"row {i}", "completion": " done"}) for i in range(count)]


def test_mistyped_key(fails):
    with pytest.raises(AssertionError, match="not in"):
        fails(["no such words"], {"optim.lrr": 1})
    fails(["optim.lrr", "optim.lr"], {"optim.lrr": 1})


def test_wrong_type(fails):
    fails(["seed", "int"], {"seed": "abc"})


def test_unsupported_architecture(fails, broken):
    edit_json(broken / "config.json", model_type="gpt2", architectures=["GPT2LMHeadModel"])
    fails(["gpt2", "among those supported are", "gemma2"], {"model": broken})  # the nearest


def test_missing_extra_and_misshaped_tensors_are_all_listed(fails, broken):
    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors.pop("model.norm.weight")
    tensors["model.layers.0.odd.weight"] = np.zeros(3, np.float32)
    key = "model.layers.1.mlp.up_proj.weight"
    tensors[key] = tensors[key][:, :5].copy()
    save_file(tensors, file, {"format": "pt"})
    fails(["model.norm.weight", "model.layers.0.odd.weight", key], {"model": broken})


def test_truncated_safetensors(fails, broken):
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    fails([file], {"model": broken})


def test_corrupt_safetensors(fails, broken):
    file = broken / "model.safetensors"
    file.write_bytes(b"<html>" + file.read_bytes()[6:])
    fails([file], {"model": broken})


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.ckpt"])
def test_w5_pickles_are_refused_with_the_way_to_convert(fails, broken, name):
    (broken / "model.safetensors").rename(broken / name)
    fails([name, "safetensors"], {"model": broken})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf], ids=str)
@pytest.mark.parametrize("lora", [0, 2])
def test_w4_fault_5_weights_that_are_not_finite_are_named(fails, broken, value, lora):
    file = broken / "model.safetensors"
    tensors, key = load_file(file), "model.layers.1.mlp.up_proj.weight"
    tensors[key][3, 5] = value
    save_file(tensors, file, {"format": "pt"})
    fails([broken, key, "NaN or infinite"], {"model": broken, "lora.rank": lora})


def test_fault_5_a_source_that_overflows_its_dtype_is_named(fails, broken):
    file = broken / "model.safetensors"
    tensors, key = load_file(file), "model.norm.weight"
    tensors[key][3] = 3.4e38
    save_file(tensors, file, {"format": "pt"})
    fails([key, "in bfloat16"], {"model": broken, "param_dtype": "bfloat16", "lora.rank": 0})


@pytest.mark.parametrize("steps", [1, 2])
def test_fault_5_weights_that_diverged_are_not_exported(fails, tmp_path, steps):
    """After one step the loss was still finite: only the weights are not. The second is skipped."""
    words = ["optim.lr", "NaN or infinite"]
    keys = {"optim.lr": "1e39", "optim.warmup": "0_steps", "lora.rank": 0, "data.eval": ""}
    fails(words, {"total": f"{steps}_steps", **keys})


def test_fault_5_a_loss_that_is_not_finite_is_no_result(fails, broken, tmp_path):
    """The weights are finite, but their products are not."""
    file = broken / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"] *= np.float32(1e38)
    save_file(tensors, file, {"format": "pt"})
    fails(["loss of data.eval is", "step 0"], {"model": broken})
    assert "null" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_missing_tokenizer(fails, broken):
    for file in broken.glob("tokenizer*"):
        file.unlink()
    fails(["tokenizer", broken], {"model": broken})


def test_missing_model_folder(fails):
    fails(["/no/such/folder"], {"model": "/no/such/folder"})


def test_missing_package(fails):
    fails(["pip install"], {"model": "pip:no-such-package"})


def test_record_without_the_field(fails, tmp_path):
    file = jsonl(tmp_path, *rows(12), json.dumps({"prompt": "no completion"}))
    fails([f"{file}:13", "completion"], {"data.train": f"jsonl:{file}"})


def test_empty_dataset(fails, tmp_path):
    file = tmp_path / "empty.jsonl"
    file.write_text("")
    fails([file], {"data.train": f"jsonl:{file}"})


def test_dataset_smaller_than_a_batch(fails, tmp_path):
    file = jsonl(tmp_path, *rows(3))
    fails([file, "3", "batch_size=8"], {"data.train": f"jsonl:{file}"})


def test_invalid_json_line(fails, tmp_path):
    file = jsonl(tmp_path, *rows(9), '{"prompt": "a", ')
    fails([f"{file}:10"], {"data.train": f"jsonl:{file}"})


def test_d5_invalid_utf8(fails, tmp_path):
    file = jsonl(tmp_path, *rows(9), b'{"prompt": "a\xff", "completion": "b"}')
    fails([f"{file}:10", "UTF-8"], {"data.train": f"jsonl:{file}"})


def test_all_masked_rows(fails, tmp_path):
    masked = [json.dumps({"prompt": "a", "completion": ""})] * 9
    fails(["rows.jsonl"], {"data.train": f"jsonl:{jsonl(tmp_path, *masked)}"})


def test_missing_data_file(fails):
    fails(["/no/such.jsonl"], {"data.train": "jsonl:/no/such.jsonl"})


def test_mesh_that_does_not_match_the_devices(fails):
    fails(["mesh", "data=3", "there are 8"], {"mesh.data": 3, "mesh.fsdp": 1})


def test_dims_that_do_not_divide_are_listed(fails):
    words = ["layers.self_attn.k_proj.kernel", "dim 2 of (2, 32, 2, 8)", "tensor=8"]
    fails(words, {"mesh.data": 1, "mesh.fsdp": 1, "mesh.tensor": 8})


def test_batch_that_does_not_divide(fails):
    fails(["batch_size=12", "8"], {"batch_size": 12})


def test_pattern_that_matches_nothing(fails):
    fails(["trainable", "unet"], {"trainable": "unet.*"})


def test_lora_target_that_matches_nothing(fails):
    fails(["lora.targets", "layers.self_attn.q_proj"], {"lora.targets": "attention"})


def test_adapter_export_without_adapter(fails):
    fails(["export.kind", "lora.rank"], {"export.kind": "adapter", "lora.rank": 0})


def test_r12_workdir_of_another_config(fails, tmp_path):
    place = tmp_path / "run"
    place.mkdir()
    fails(["48"], {"seq_len": "48.5"}, place)
    from jaxft.core.config import load_config

    config = load_config(str(ROOT / "configs" / "llm.py"), [("seed", "7"), ("optim.lr", "0.5")])
    (place / "config.json").write_text(json.dumps(config))
    (place / "metrics.jsonl").write_text("")
    fails(["optim.lr: 0.5 -> 0.001", "seed: 7 -> 0"], {}, place)


def test_read_only_workdir(fails, tmp_path):
    (tmp_path / "file").write_text("")
    place = tmp_path / "file" / "run"
    fails([place, "--workdir"], {}, place, UNWRITABLE)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
def test_a_device_that_is_not_there(platform, model, tmp_path):
    import os

    command = [sys.executable, "-m", "jaxft.train", "--config", "configs/llm.py"]
    command += ["--workdir", str(tmp_path / "run"), f"--config.model={model}"]
    env = {**os.environ, "JAX_PLATFORMS": platform}
    ran = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env)
    last = ran.stderr.strip().splitlines()[-1]
    assert ran.returncode == 2 and last.startswith("jaxft: JAX_PLATFORMS="), ran.stderr
    assert f"jaxft[{platform}]" in last and "Traceback" not in ran.stderr
