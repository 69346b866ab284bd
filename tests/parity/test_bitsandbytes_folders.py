"""Folders that transformers saves with bitsandbytes' NF4: read as they are, tuned by an adapter."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from jaxft import train
from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.core.params import bind
from jaxft.runs import opening
from jaxft.weights.folders.transformers import open_source

CONFIG = ["--config", str(Path(__file__).resolve().parents[2] / "configs" / "llm.py")]
SHAPE = {"hidden_size": 64, "intermediate_size": 128}
WEIGHT = "model.layers.0.self_attn.q_proj.weight"


def quantised(folder, out, **changes):
    """A folder with bitsandbytes' 4-bit weights, saved by transformers."""
    stated = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, **changes}
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, **stated),
        dtype=torch.float32,
        device_map="cpu",
    )
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def folders(make_folder, tmp_path_factory):
    """NF4 with codes of scales, and with fp32 scales."""
    plain, out = make_folder(dtype="float16", **SHAPE), tmp_path_factory.mktemp("bnb")
    double = quantised(plain, out / "double-bnb-4bit")
    single = quantised(plain, out / "single-bnb-4bit", bnb_4bit_use_double_quant=False)
    return {"double": double, "single": single}


def open_nf4(make_config, folder):
    config = make_config(folder, {"export.kind": "adapter", "mesh.fsdp": -1})
    return opening.open_run(load_config(CONFIG[1]) | config | {"base": "nf4"})


@pytest.mark.parametrize("scales", ["double", "single"])
def test_codes_are_the_files_and_logits_are_transformers(scales, folders, make_config):
    run = open_nf4(make_config, folders[scales])
    params = opening.load_params(run)
    held = load_file(folders[scales] / "model.safetensors")
    codes = np.asarray(params["layers.self_attn.q_proj.kernel.codes"][0])
    np.testing.assert_array_equal(codes.reshape(-1, 1), held[WEIGHT])
    found = np.asarray(params["layers.self_attn.q_proj.kernel.scales"][0])
    np.testing.assert_array_equal(found.reshape(-1), held[f"{WEIGHT}.absmax"])
    assert ("layers.self_attn.q_proj.kernel.nested" in params) == (scales == "double")
    tokens = np.arange(3, 43).reshape(2, 20)
    with jax.set_mesh(run.mesh):
        ours = jax.jit(lambda p: bind(run.opened.template, p, jnp.float32)(tokens))(params)
    model = AutoModelForCausalLM.from_pretrained(
        folders[scales], dtype=torch.float32, device_map="cpu"
    )
    theirs = model(torch.tensor(tokens)).logits.detach().numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-5 * np.abs(theirs).max())


def test_a_run_on_it_gives_an_adapter_that_peft_loads(folders, make_flags, tmp_path, quick):
    folder, work = folders["double"], tmp_path / "run"
    changes = {"total": "2_steps", "optim.lr": 0.01, "base": "nf4", "export.kind": "adapter"}
    assert train.main([*CONFIG, "--workdir", str(work), *make_flags(folder, changes)]) == 0
    stated = json.loads((work / "export" / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(folder)
    assert not (work / "export" / "config.json").exists()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu")
    tokens = torch.arange(3, 23)[None]
    before = model(tokens).logits
    after = PeftModel.from_pretrained(model, work / "export")(tokens).logits
    assert (after - before).abs().max() > 1e-2


def test_a_merged_export_needs_the_weights_before_quantisation(
    folders, make_flags, capsys, tmp_path
):
    flags = make_flags(folders["double"], {"base": "nf4", "export.kind": "merged"})
    assert train.main([*CONFIG, "--workdir", str(tmp_path / "run"), *flags]) == 2
    assert "export.kind='merged' needs the weights before quantisation" in capsys.readouterr().err


def test_what_is_not_read_is_named(folders, make_config, make_folder, tmp_path):
    with pytest.raises(UserError, match=r"bitsandbytes.*base=nf4"):
        open_source(str(folders["double"]))
    plain = make_folder(dtype="float16", **SHAPE)
    fp4 = quantised(plain, tmp_path / "fp4", bnb_4bit_quant_type="fp4")
    with pytest.raises(UserError, match="quant_method='bitsandbytes'") as caught:
        open_nf4(make_config, fp4)
    assert "base=nf4" not in str(caught.value)
    some = quantised(plain, tmp_path / "some", llm_int8_skip_modules=["q_proj", "lm_head"])
    with pytest.raises(UserError, match=f"tensor {WEIGHT} is not in NF4"):
        opening.load_params(open_nf4(make_config, some))
    file = folders["double"] / "model.safetensors"
    held, other = load_file(file), tmp_path / "table"
    other.mkdir()
    for beside in folders["double"].glob("*.json"):
        (other / beside.name).write_bytes(beside.read_bytes())
    save_file({**held, f"{WEIGHT}.quant_map": np.zeros(16, np.float32)}, other / file.name)
    with pytest.raises(UserError, match=rf"{WEIGHT}\.quant_map is not bitsandbytes' own"):
        opening.load_params(open_nf4(make_config, other))
    config = json.loads((folders["double"] / "config.json").read_text())
    config["quantization_config"]["bnb_4bit_use_double_quant"] = False
    save_file(held, other / file.name)
    (other / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"their scales are not \(bnb_4bit_use_double_quant\)"):
        opening.load_params(open_nf4(make_config, other))
