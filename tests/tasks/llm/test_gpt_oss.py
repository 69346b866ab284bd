"""Runs of GPT-OSS whose experts are in MXFP4: in 16 bits or as an adapter, and what is refused."""

import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from gguf import GGUFReader, LlamaFileType
from peft import PeftModel
from transformers import AutoModelForCausalLM, GptOssConfig, GptOssForCausalLM

from jaxft import export, train
from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.kernels.quantised import int8
from jaxft.runs import opening
from jaxft.tasks import OPTIONS
from jaxft.weights.files.gguf import GgufFile
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders.quantised.mxfp4 import decode_mxfp4
from tests.tasks.llm.gguf.engine import Engine

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "llm.py")
SHAPE = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "sliding_window": 8,
    "initializer_range": 0.2,
}


@pytest.fixture(scope="module")
def folder(make_folder, tmp_path_factory):
    """A small random GPT-OSS in bf16, with the tests' tokenizer, its experts in MXFP4."""
    folder = tmp_path_factory.mktemp("gpt") / "model"
    shutil.copytree(make_folder(), folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    GptOssForCausalLM(GptOssConfig(**SHAPE)).to(torch.bfloat16).save_pretrained(folder)
    made, random = TensorFiles.open(folder), np.random.default_rng(0)
    arrays = {key: made.read(key) for key in made.keys()}  # noqa: SIM118
    for key in list(arrays):
        if key.endswith("experts.gate_up_proj") or key.endswith("experts.down_proj"):
            count, inputs, outputs = arrays.pop(key).shape
            shape = (count, outputs, inputs // 32)
            arrays[key + "_blocks"] = random.integers(0, 256, (*shape, 16), np.uint8)
            arrays[key + "_scales"] = random.integers(122, 126, shape, np.uint8)
    write_sharded(folder, arrays.items(), {key: (x.shape, x.dtype) for key, x in arrays.items()})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def logits(model):
    with torch.no_grad():
        return model(torch.arange(3, 60)[None]).logits.float().numpy()


def run(folder, make_flags, workdir, **keys):
    flags = {"total": "2_steps", "optim.lr": 0.1, "optim.warmup": "0_steps", **keys}
    return train.main(["--config", CONFIG, *make_flags(folder, flags), "--workdir", str(workdir)])


def test_s8_an_export_is_in_16_bits_without_the_quantisation(folder, make_flags, tmp_path, capsys):
    """The experts that did not train are the decoded ones, bit for bit."""
    keys = {"lora.rank": 0, "trainable": r".*self_attn.*"}
    assert run(folder, make_flags, tmp_path, **keys) == 0
    assert "gpt_oss read from MXFP4, exports are in 16 bits" in capsys.readouterr().out
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert "quantization_config" not in config
    before, after = TensorFiles.open(folder), TensorFiles.open(tmp_path / "export")
    assert not [key for key in after.keys() if key.endswith(("_blocks", "_scales"))]  # noqa: SIM118
    for i in range(3):
        key = f"model.layers.{i}.mlp.experts.gate_up_proj"
        want = decode_mxfp4(before.read(key + "_blocks"), before.read(key + "_scales"))
        assert after.info(key) == (want.shape, want.dtype)
        assert after.read(key).tobytes() == want.tobytes()
    sinks = "model.layers.1.self_attn.sinks"
    assert after.read(sinks).tobytes() != before.read(sinks).tobytes()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    assert np.isfinite(logits(theirs)).all()


def test_an_adapter_of_attention_in_peft(folder, make_flags, tmp_path, capsys):
    keys = {"lora.rank": 2, "export.kind": "adapter"}
    assert run(folder, make_flags, tmp_path, **keys) == 0
    printed = capsys.readouterr().out
    assert "gpt_oss read from MXFP4;" in printed and "16 bits" not in printed
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)  # decoded by theirs
    untouched = logits(base)
    theirs = PeftModel.from_pretrained(base, tmp_path / "export")
    adapted = (key.partition(".lora_A")[0] for key in theirs.state_dict() if ".lora_A" in key)
    assert {path.rpartition(".")[2] for path in adapted} == {f"{name}_proj" for name in "qkvo"}
    assert np.abs(logits(theirs) - untouched).max() > 1e-3


def test_experts_in_8_bits_are_those_of_mxfp4(folder, small_run):
    """The fused tensor of all experts is encoded expert by expert."""
    keys = small_run(folder, {"lora.rank": 2, "base": "int8"})
    run = opening.open_run(load_config(CONFIG, [(key, str(x)) for key, x in keys.items()], OPTIONS))
    params, held = opening.load_params(run), TensorFiles.open(folder)
    key = "model.layers.2.mlp.experts.gate_up_proj"
    whole = decode_mxfp4(held.read(key + "_blocks"), held.read(key + "_scales"))  # [E, D, 2 F]
    halves = np.stack([whole[..., ::2], whole[..., 1::2]], -2)  # [E, D, 2, F]
    for expert in (0, 7):
        want = int8.encode(jnp.asarray(halves[expert]), 1)
        for field, array in want._asdict().items():
            found = params[f"layers.mlp.experts.gate_up_proj.kernel.{field}"][2, expert]
            np.testing.assert_array_equal(found, array)


def test_a_gguf_has_the_experts_in_mxfp4_again(folder, make_flags, tmp_path, capsys):
    keys = {"lora.rank": 0, "trainable": r".*self_attn.*", "export.kind": "gguf"}
    assert run(folder, make_flags, tmp_path / "mine", **keys) == 0
    assert "16 bits" not in capsys.readouterr().out
    before, after = TensorFiles.open(folder), GgufFile(tmp_path / "mine" / "export" / "mine.gguf")
    types = {one.name: one.tensor_type.name for one in GGUFReader(after.path).tensors}
    experts = {kind for name, kind in types.items() if name.endswith("_exps.weight")}
    assert experts == {"MXFP4"} and types["blk.0.attn_q.weight"] == "BF16"
    assert types["blk.0.ffn_gate_inp.weight"] == types["blk.0.ffn_up_exps.bias"] == "F32"
    for i in range(3):
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{i}.mlp.experts.{name}"
            want = decode_mxfp4(before.read(key + "_blocks"), before.read(key + "_scales"))
            assert np.array_equal(after.read(key), want.astype(np.float32)), key
    out = tmp_path / "half"
    arguments = ["--workdir", str(tmp_path / "mine"), "--out", str(out), "--dtype", "bfloat16"]
    assert export.main([*arguments, "--kind", "gguf"]) == 0
    types = {one.name: one.tensor_type.name for one in GGUFReader(out / "half.gguf").tensors}
    assert types["blk.0.ffn_up_exps.weight"] == "BF16"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"lora.targets": r".*gate_up_proj"}, r"matches layers\.mlp\.experts\.gate_up_proj"),
        ({"base": "nf4"}, r"base=nf4: layers\.\w+\.\S+ has 32 inputs, which is no multiple of 64"),
    ],
)
def test_what_it_does_not_have_is_refused(changes, text, folder, small_run):
    keys = small_run(folder, {"lora.rank": 2, **changes})
    with pytest.raises(UserError, match=text) as caught:
        opening.open_run(load_config(CONFIG, [(key, str(x)) for key, x in keys.items()], OPTIONS))
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_llama_cpp_decodes_our_mxfp4_to_the_same_values(folder, make_flags, tmp_path):
    keys = {"lora.rank": 0, "trainable": r".*self_attn.*", "export.kind": "gguf"}
    assert run(folder, make_flags, tmp_path / "mine", **keys) == 0
    file, whole = tmp_path / "mine" / "export" / "mine.gguf", tmp_path / "whole.gguf"
    cpp = Engine(file).cpp
    settings = cpp.LlamaModelQuantizeParams()
    settings.ftype, settings.allow_requantize = int(LlamaFileType.ALL_F32), True
    cpp.model_quantize(str(file), str(whole), settings)
    found, theirs = GgufFile(file), GgufFile(whole)
    types = {one.tensor_type.name for one in GGUFReader(whole).tensors}
    assert types == {"F32"}
    for key in list(theirs.keys()):
        np.testing.assert_array_equal(found.read(key).astype(np.float32), theirs.read(key), key)
