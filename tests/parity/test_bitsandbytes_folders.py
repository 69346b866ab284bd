"""Folders that transformers saves with bitsandbytes' NF4: read as they are, tuned by an adapter."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from bitsandbytes import functional as F
from peft import PeftModel
from safetensors.numpy import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    MixtralConfig,
    MixtralForCausalLM,
)

from jaxft import train
from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.core.params import bind
from jaxft.kernels.quantised import nf4
from jaxft.kernels.quantised.nf4 import NF4
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


def test_experts_that_bitsandbytes_holds_one_by_one(make_folder, make_config, tmp_path):
    """transformers 4 had a Linear for each expert, and its folders have a code for each weight."""
    shutil.copytree(make_folder(dtype="float16", **SHAPE), tmp_path / "model")
    own = {"vocab_size": 330, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(**SHAPE, **own, num_key_value_heads=2, num_local_experts=4)
    MixtralForCausalLM(config).to(torch.float16).save_pretrained(tmp_path / "model")
    file = tmp_path / "model" / "model.safetensors"
    arrays = load_file(file)
    for key in [x for x in arrays if "self_attn" in x or ".experts." in x]:
        options = {"quant_type": "nf4", "compress_statistics": True}
        codes, state = F.quantize_4bit(torch.tensor(arrays.pop(key)), **options)
        beside = {f"{key}.{x}": y.numpy() for x, y in state.as_dict(packed=True).items()}
        arrays |= {key: codes.numpy(), **beside}
    save_file(arrays, file)
    stated = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    stated["bnb_4bit_use_double_quant"] = True
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    config |= {"quantization_config": stated}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    run = open_nf4(make_config, tmp_path / "model")
    params = opening.load_params(run)
    key = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    found = {x: params[f"layers.mlp.experts.down_proj.kernel.{x}"][1, 3] for x in NF4._fields}
    np.testing.assert_array_equal(np.ravel(found["codes"]), np.ravel(arrays[key]))
    np.testing.assert_array_equal(np.ravel(found["scales"]), arrays[f"{key}.absmax"])
    np.testing.assert_array_equal(found["nested"], arrays[f"{key}.nested_absmax"])
    beside = {x: torch.tensor(y) for x, y in arrays.items() if x.startswith(f"{key}.")}
    state = F.QuantState.from_dict(beside, device=torch.device("cpu"))
    want = F.dequantize_4bit(torch.tensor(arrays[key]), state).numpy()
    np.testing.assert_array_equal(nf4.decode(NF4(**found), (128,), jnp.float16), want)
