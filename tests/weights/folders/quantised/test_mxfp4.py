"""MXFP4 against transformers' own decoding, bit for bit, and folders that are damaged."""

import json

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders.quantised.mxfp4 import Mxfp4Tensors, decode_mxfp4, is_mxfp4
from jaxft.weights.folders.transformers import open_source
from jaxft.weights.views import InMemory

CONFIG = {
    "model_type": "gpt_oss",
    "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
}
KEY = "model.layers.0.mlp.experts.down_proj"


def data(experts=3, outputs=8, groups=4):
    random = np.random.default_rng(0)
    blocks = random.integers(0, 256, (experts, outputs, groups, 16), np.uint8)
    return blocks, random.integers(100, 140, (experts, outputs, groups), np.uint8)


def bits(blocks, scales):
    want = convert_moe_packed_tensors(torch.tensor(blocks), torch.tensor(scales))
    return want.view(torch.uint16).numpy()


def test_s7_decoding_is_transformers_bit_for_bit():
    blocks, scales = data()
    made = decode_mxfp4(blocks, scales)
    assert made.shape == (3, 128, 8) and made.flags.c_contiguous
    np.testing.assert_array_equal(made.view(np.uint16), bits(blocks, scales))
    # The low 4 bits are the first value: 0x21 is 0.5, then 1.0.
    one = decode_mxfp4(np.full((1, 1, 1, 16), 0x21, np.uint8), np.full((1, 1, 1), 128, np.uint8))
    np.testing.assert_array_equal(one[0, :4, 0].astype(np.float32), [1, 2, 1, 2])


def test_s7_every_byte_at_every_scale():
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16), (1, 255, 1, 1))
    scales = np.tile(np.arange(255, dtype=np.uint8)[None, :, None], (1, 1, 16))
    made = decode_mxfp4(blocks, scales)
    np.testing.assert_array_equal(made.view(np.uint16), bits(blocks, scales))
    last = decode_mxfp4(blocks[:, :1], np.full((1, 1, 16), 255, np.uint8)).astype(np.float32)
    assert not np.isfinite(last).any()


@pytest.mark.parametrize("weights", [True, False])
def test_s8_a_folder_opens_as_the_model_in_16_bits(weights, tmp_path):
    blocks, scales = data()
    table = np.ones((4, 4), ml_dtypes.bfloat16)
    arrays = {"lm_head.weight": table, KEY + "_blocks": blocks, KEY + "_scales": scales}
    infos = {key: (one.shape, one.dtype) for key, one in arrays.items()}
    write_sharded(tmp_path, arrays.items(), infos)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    source = open_source(str(tmp_path), weights)
    assert source.config == {"model_type": "gpt_oss"} and source.decoded_from == "MXFP4"
    assert json.loads(source.side_files["config.json"]) == source.config
    if not weights:
        return
    assert sorted(source.tensors.keys()) == ["lm_head.weight", KEY]
    made = source.tensors.read(KEY)
    assert source.tensors.info(KEY) == (made.shape, made.dtype)
    np.testing.assert_array_equal(made.view(np.uint16), bits(blocks, scales))
    np.testing.assert_array_equal(source.tensors.read("lm_head.weight"), table)
    assert source.tensors.info("lm_head.weight") == (table.shape, table.dtype)
    assert source.dtype == "bfloat16"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda b, s: {KEY + "_blocks": b}, f"{KEY}_blocks needs {KEY}_scales beside it"),
        (lambda b, s: {KEY: b, KEY + "_blocks": b, KEY + "_scales": s}, f"and no {KEY}; get"),
        (lambda b, s: {KEY + "_blocks": b[..., :8], KEY + "_scales": s}, r"expected uint8 \[E, F"),
        (lambda b, s: {KEY + "_blocks": b, KEY + "_scales": s[:2]}, r"_scales uint8 \(2, 8, 4\)"),
        (lambda b, s: {KEY + "_blocks": b, KEY + "_scales": s * 1.0}, "_scales float64"),
    ],
)
def test_damaged_folders_are_refused(change, text):
    with pytest.raises(UserError, match=text) as caught:
        Mxfp4Tensors(InMemory(change(*data())), "here")
    assert "\n" not in str(caught.value) and str(caught.value).startswith("here: ")


def test_only_gpt_oss_is_read():
    assert is_mxfp4(CONFIG)
    assert not is_mxfp4({**CONFIG, "model_type": "llama"})
    for stated in (None, {}, "mxfp4", {"quant_method": "fp8"}):
        assert not is_mxfp4({**CONFIG, "quantization_config": stated})
