"""Folders of transformers in FP8: the weights are theirs, and a run and its export in 16 bits."""

import json
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from jaxft import train
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders.transformers import open_source

CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "llm.py")
SHAPE = {
    "vocab_size": 330,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS = {
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SHAPE, tie_word_embeddings=False)),
    "qwen3_moe": lambda: Qwen3MoeForCausalLM(Qwen3MoeConfig(**SHAPE, **EXPERTS)),
}
BLOCK = 16
STATED = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK] * 2}


def in_blocks(array):
    """Return FP8 codes and the scales of blocks, as Qwen's own FP8 folders have them."""
    rows, columns = (size // BLOCK for size in array.shape)
    blocks = array.astype(np.float32).reshape(rows, BLOCK, columns, BLOCK)
    scales = np.abs(blocks).max((1, 3)) / 448
    codes = (blocks / scales[:, None, :, None]).astype(ml_dtypes.float8_e4m3fn)
    return codes.reshape(array.shape), scales


@pytest.fixture(scope="module", params=MODELS)
def folder(request, make_folder, tmp_path_factory):
    """A small random model with the tests' tokenizer, its projections in FP8."""
    folder = tmp_path_factory.mktemp("fp8") / "model"
    shutil.copytree(make_folder(), folder)
    (folder / "model.safetensors").unlink()
    torch.manual_seed(1)
    MODELS[request.param]().to(torch.bfloat16).save_pretrained(folder)
    made = TensorFiles.open(folder)
    arrays = {key: made.read(key) for key in made.keys()}  # noqa: SIM118
    for key in [key for key in arrays if key.endswith("_proj.weight")]:
        arrays[key], arrays[key + "_scale_inv"] = in_blocks(arrays[key])
    write_sharded(folder, arrays.items(), {key: (x.shape, x.dtype) for key, x in arrays.items()})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": STATED}))
    return folder


def weights_of(model):
    """Return the state of a torch model under the names of its files."""
    state = {}
    for key, value in model.state_dict().items():
        names, parts = [key], [value]
        if key.endswith("experts.gate_up_proj"):
            stem = key.removesuffix("gate_up_proj")
            names = [
                f"{stem}{i}.{one}.weight"
                for i in range(len(value))
                for one in ("gate_proj", "up_proj")
            ]
            parts = [half for one in value for half in one.chunk(2)]
        elif key.endswith("experts.down_proj"):
            names = [
                f"{key.removesuffix('down_proj')}{i}.down_proj.weight" for i in range(len(value))
            ]
            parts = list(value)
        state |= dict(zip(names, parts, strict=True))
    return state


def test_weights_are_those_of_transformers_bit_for_bit(folder):
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    ours, state = open_source(str(folder)).tensors, weights_of(theirs)
    assert set(ours.keys()) == set(state)
    for key, want in state.items():
        shape, dtype = ours.info(key)
        assert (shape, dtype) == (tuple(want.shape), ml_dtypes.bfloat16), key
        assert ours.read(key).tobytes() == want.view(torch.uint16).numpy().tobytes(), key


def test_a_run_exports_the_model_in_16_bits(folder, make_flags, quick, tmp_path, capsys):
    keys = {"lora.rank": 2, "lora.targets": r".*q_proj", "total": "1_steps", "optim.lr": 0.1}
    flags = make_flags(folder, {**keys, "optim.warmup": "0_steps"})
    assert train.main(["--config", CONFIG, *flags, "--workdir", str(tmp_path)]) == 0
    assert "read from FP8" in capsys.readouterr().out
    before, after = open_source(str(folder)), open_source(str(tmp_path / "export"))
    assert not after.decoded_from and "quantization_config" not in after.config
    assert set(after.tensors.keys()) == set(before.tensors.keys())
    for key in after.tensors.keys():  # noqa: SIM118
        same = after.tensors.read(key).tobytes() == before.tensors.read(key).tobytes()
        assert same != key.endswith("q_proj.weight"), key
    AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
