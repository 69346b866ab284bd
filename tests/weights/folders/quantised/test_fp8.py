"""FP8 against transformers' own decoding, bit for bit, and folders that are damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders.quantised.fp8 import Fp8Tensors, decode_fp8, is_fp8, scale_blocks
from jaxft.weights.folders.transformers import open_source
from jaxft.weights.views import InMemory

BF16, E4M3 = np.dtype(ml_dtypes.bfloat16), np.dtype(ml_dtypes.float8_e4m3fn)
KEY = "model.layers.0.mlp.down_proj.weight"
CHANNELS = {"num_bits": 8, "type": "float", "strategy": "channel"}
CONFIGS = {
    "transformers": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "static": {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None},
    "fbgemm": {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0},
    "modelopt": {"quant_method": "modelopt", "quant_algo": "FP8"},
    "compressed": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": CHANNELS}},
    },
}
# The ends of the names of scales, their shape for a weight of [96, 64], and what lies beside them.
SCALES = {
    "transformers": ("_scale_inv", (3, 2), ()),
    "static": ("_scale_inv", (), ("activation_scale",)),
    "fbgemm": ("_scale", (96, 1), ("input_scale_ub",)),
    "modelopt": ("_scale", (), ("input_scale", "k_scale")),
    "compressed": ("_scale", (96, 1), ()),
}


def data(shape=(96, 64), grid=(3, 2), kind=np.float32):
    random = np.random.default_rng(0)
    codes = random.integers(0, 127, shape, np.uint8) + 128 * random.integers(0, 2, shape, np.uint8)
    return codes.view(E4M3), random.uniform(1e-4, 1e-2, grid).astype(kind)


def as_torch(array):
    kind = {E4M3: torch.float8_e4m3fn, BF16: torch.bfloat16}.get(array.dtype)
    if kind is None:
        return torch.tensor(array)
    return torch.tensor(array.view(f"u{array.itemsize}")).view(kind)


@pytest.mark.parametrize("grid", [(3, 2), (96, 1), (1, 1), (96, 2), ()])
@pytest.mark.parametrize("kind", [np.float32, BF16])
def test_decoding_is_transformers_bit_for_bit(grid, kind):
    codes, scales = data(grid=grid, kind=kind)
    one = Fp8Dequantize(None)._dequantize_one
    want = one(as_torch(codes), as_torch(scales), torch.bfloat16)
    made = decode_fp8(codes, scales, BF16)
    np.testing.assert_array_equal(made.view(np.uint16), want.view(torch.uint16).numpy())


def test_every_code_in_both_formats():
    for kind, same in (
        (ml_dtypes.float8_e4m3fn, torch.float8_e4m3fn),
        (ml_dtypes.float8_e5m2, torch.float8_e5m2),
    ):
        every = np.arange(256, dtype=np.uint8).reshape(16, 16)
        made = decode_fp8(every.view(kind), np.float32(1), np.dtype(np.float32))
        np.testing.assert_array_equal(made, torch.tensor(every).view(same).float().numpy())


def test_the_last_block_may_be_smaller():
    """As in DeepSeek's own files: 5 blocks of 128 rows hold 576."""
    codes, scales = data((576, 200), (5, 2))
    made = decode_fp8(codes, scales, np.dtype(np.float32), (128, 128))
    each = np.repeat(np.repeat(scales, 128, 0), 128, 1)[:576, :200]
    np.testing.assert_array_equal(made, codes.astype(np.float32) * each)
    assert scale_blocks((576, 200), (5, 2)) is None


def test_stacked_experts_have_their_own_scales():
    codes, scales = data((4, 96, 64), (4, 3, 2))
    made = decode_fp8(codes, scales, BF16)
    for i in range(4):
        np.testing.assert_array_equal(made[i], decode_fp8(codes[i], scales[i], BF16))


def test_scales_that_are_powers_of_two():
    codes, scales = data()
    powers = np.exp2(np.round(np.log2(scales))).astype(ml_dtypes.float8_e8m0fnu)
    same = decode_fp8(codes, powers.astype(np.float32), BF16)
    np.testing.assert_array_equal(decode_fp8(codes, powers, BF16), same)


def write(folder, config, arrays):
    infos = {key: (one.shape, one.dtype) for key, one in arrays.items()}
    write_sharded(folder, arrays.items(), infos)
    config = {"model_type": "llama", "dtype": "bfloat16", "quantization_config": config}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("weights", [True, False])
def test_a_folder_opens_as_the_model_in_16_bits(name, weights, tmp_path):
    end, grid, beside = SCALES[name]
    codes, scales = data(grid=grid)
    table = np.ones((4, 4), BF16)
    arrays = {"lm_head.weight": table, KEY: codes, KEY + end: scales}
    arrays |= {KEY.replace("weight", one): np.float32(1) for one in beside}
    write(tmp_path, CONFIGS[name], {key: np.asarray(one) for key, one in arrays.items()})
    source = open_source(str(tmp_path), weights)
    assert "quantization_config" not in source.config and source.decoded_from == "FP8"
    assert "quantization_config" not in json.loads(source.side_files["config.json"])
    if not weights:
        assert source.tensors is None
        return
    assert sorted(source.tensors.keys()) == sorted(["lm_head.weight", KEY])
    assert source.tensors.info(KEY) == ((96, 64), BF16)
    np.testing.assert_array_equal(source.tensors.read(KEY), decode_fp8(codes, scales, BF16))
    np.testing.assert_array_equal(source.tensors.read("lm_head.weight"), table)


def test_an_older_folder_of_modelopt_states_it_in_a_file_of_its_own(tmp_path):
    codes, scales = data(grid=())
    write(tmp_path, None, {KEY: codes, KEY + "_scale": np.asarray(scales)})
    file = tmp_path / "hf_quant_config.json"
    file.write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    source = open_source(str(tmp_path))
    assert file.name not in source.side_files and "quantization_config" not in source.config
    np.testing.assert_array_equal(source.tensors.read(KEY), decode_fp8(codes, scales, BF16))
    file.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    with pytest.raises(UserError, match="quant_method='modelopt'"):
        open_source(str(tmp_path))


def test_other_numbers_of_the_same_methods_are_not_read():
    groups = CONFIGS["compressed"]["config_groups"]
    narrow = {"weights": {**CHANNELS, "num_bits": 4}}
    for config in (
        {"quant_method": "fp8", "expert_dtype": "fp4"},
        {"quant_method": "modelopt", "quant_algo": "NVFP4"},
        {**CONFIGS["compressed"], "format": "pack-quantized"},
        {**CONFIGS["compressed"], "config_groups": {**groups, "group_1": narrow}},
        {**CONFIGS["compressed"], "config_groups": {}},
        {"quant_method": "compressed-tensors"},
        "fp8",
        None,
    ):
        assert not is_fp8({"quantization_config": config})
    assert all(is_fp8({"quantization_config": config}) for config in CONFIGS.values())


def test_a_grid_that_is_not_of_the_stated_blocks_is_refused():
    """The division alone would decode 96 rows by 1 scale, where the file states blocks of 32."""
    assert scale_blocks((96, 64), (3, 2), (32, 32)) == (32, 32)
    assert scale_blocks((96, 64), (1, 2), (32, 32)) is None
    assert scale_blocks((96, 64), (3, 2), (16, 16)) is None
    assert scale_blocks((96, 64), (1, 1), (32, 32)) == (96, 64)


@pytest.mark.parametrize("stated", ["128", [128], [0, 0], [128, "128"], [True, 1], {}], ids=str)
def test_blocks_that_are_no_pair_of_sizes_are_named(stated, tmp_path):
    codes, scales = data()
    config = {**CONFIGS["transformers"], "weight_block_size": stated}
    write(tmp_path, config, {KEY: codes, KEY + "_scale_inv": scales})
    with pytest.raises(UserError, match=r"config\.json: quantization_config\.weight_block_size="):
        open_source(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {KEY + "_scale_inv": None},
            rf"tensor {KEY} is in FP8, and {KEY}_scale_inv or {KEY}_scale",
        ),
        ({KEY + "_scale_inv": np.ones((5, 2), np.float32)}, r"is float32 \(5, 2\), which are no"),
        (
            {KEY + "_scale_inv": np.ones((3, 2), np.int32)},
            r"is int32 \(3, 2\), which are no",
        ),
    ],
)
def test_damaged_scales_are_named(changes, message):
    codes, scales = data()
    arrays = {KEY: codes, KEY + "_scale_inv": scales, **changes}
    tensors = InMemory({key: one for key, one in arrays.items() if one is not None})
    with pytest.raises(UserError, match=message) as caught:
        Fp8Tensors(tensors, "x", BF16, None)
    assert "\n" not in str(caught.value)
