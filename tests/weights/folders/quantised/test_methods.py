"""Quantised folders are refused in one line that names the method and what to do."""

import json
import shutil

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders.quantised.methods import refuse_config, refuse_tensors
from jaxft.weights.folders.transformers import open_source

# quantization_config as each method's own tools write it (shortened).
METHODS = {
    "bitsandbytes": {"load_in_4bit": True, "quant_method": "bitsandbytes"},
    "gptq": {"bits": 4, "group_size": 128, "quant_method": "gptq"},
    "awq": {"bits": 4, "version": "gemm", "quant_method": "awq"},
    "fp8": {"expert_dtype": "fp4", "quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed-tensors": {"format": "pack-quantized", "quant_method": "compressed-tensors"},
    "mxfp4": {"modules_to_not_convert": ["lm_head"], "quant_method": "mxfp4"},
    "torchao": {"quant_type": {"default": {}}, "quant_method": "torchao"},
}
MLX = {"group_size": 64, "bits": 4}
TENSORS = {
    "bitsandbytes": ("self_attn.q_proj.weight.absmax", "self_attn.q_proj.SCB"),
    "gptq or awq": ("self_attn.q_proj.qweight", "self_attn.q_proj.qzeros"),
    "compressed-tensors": ("self_attn.q_proj.weight_packed",),
    "fp8": ("self_attn.q_proj.weight_scale_inv", "self_attn.q_proj.weight_scale"),
    "mxfp4": ("mlp.experts.gate_up_proj_blocks", "mlp.experts.down_proj_scales"),
    "torchao": ("self_attn.q_proj.weight:qdata", "self_attn.q_proj.weight_qdata"),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("weights", [True, False])
def test_case_llm_18_a_quantised_folder_names_its_method(method, weights, tmp_path):
    """Before a weight file is opened: some have dtypes that no reader here has."""
    config = {"model_type": "llama", "quantization_config": METHODS[method]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = rf"config\.json: the weights are quantised .*quant_method='{method}'.*give the model"
    with pytest.raises(UserError, match=message) as caught:
        open_source(str(tmp_path), weights)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", TENSORS)
def test_case_llm_18_tensors_give_it_away_where_the_config_does_not(method, tmp_path):
    for name in TENSORS[method]:
        key = f"model.layers.0.{name}"
        infos = {key: ((2,), np.dtype(np.uint8))}
        write_sharded(tmp_path, [(key, np.ones(2, np.uint8))], infos)
        (tmp_path / "config.json").write_text('{"model_type": "llama"}')
        with pytest.raises(UserError, match=f"tensor {key} is of quant_method='{method}'"):
            open_source(str(tmp_path))


def test_sub_configs_old_spellings_and_no_name():
    for config, method in [
        ({"text_config": {"quantization_config": METHODS["awq"]}}, "awq"),
        ({"compression_config": {"quant_method": "compressed-tensors"}}, "compressed-tensors"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        ({"quantization_config": {"bits": 4}}, "unknown"),
        ({"quantization_config": "int8"}, "int8"),
        ({"quantization_config": MLX, "quantization": MLX}, "mlx"),  # as mlx_lm writes it
    ]:
        with pytest.raises(UserError, match=f"quant_method='{method}'"):
            refuse_config(config, "x")


def test_what_is_not_quantised_passes(make_folder, tmp_path):
    """transformers reads null and an empty object as no quantisation."""
    folder = shutil.copytree(make_folder(), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    for none in (None, {}):
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": none}))
        refuse_tensors(open_source(str(folder)).tensors.keys(), "x")
