"""What a VQ tokenizer's config.json says, with the stock classes as authority on the defaults."""

import inspect

import numpy as np
import pytest
from diffusers import VQModel
from transformers import JanusVQVAEConfig

from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vq_config
from jaxft.models.autoencoders.vq_config import VQConfig, check_codes

JANUS = {"model_type": "janus_vqgan"}
# The tokenizers that LlamaGen published, as a JanusVQVAE folder has them (arXiv:2406.06525).
VQ_16 = {**JANUS, "num_patches": 24}
VQ_8 = {**VQ_16, "channel_multiplier": (1, 2, 2, 4), "num_patches": 48}
DIFFUSERS = {"_class_name": "VQModel", "norm_num_groups": 4, "block_out_channels": [8]}
ATTENDING = {
    **DIFFUSERS,
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
}


def test_defaults_are_those_of_the_stock_classes():
    stock = JanusVQVAEConfig()
    for key, default in vq_config.JANUS_DEFAULTS.items():
        if key != "codebook_l2_norm":
            assert getattr(stock, key) == default, key
    signature = inspect.signature(VQModel.__init__).parameters
    for key, default in vq_config.DIFFUSERS_DEFAULTS.items():
        if key != "codebook_l2_norm":
            assert signature[key].default == default, key


def test_trap1_a_janus_folder_that_does_not_say_is_l2():
    assert VQConfig.from_hf(JANUS).l2
    assert not VQConfig.from_hf({**JANUS, "codebook_l2_norm": False}).l2
    assert not VQConfig.from_hf(DIFFUSERS).l2
    assert VQConfig.from_hf(JANUS).unit_lookup and not VQConfig.from_hf(DIFFUSERS).unit_lookup


def test_llamagen_sizes():
    large, small = VQConfig.from_hf(VQ_16), VQConfig.from_hf(VQ_8)
    assert (large.factor, large.widths) == (16, (128, 128, 256, 256, 512))
    assert (small.factor, small.widths) == (8, (128, 256, 256, 512))
    assert large.size == small.size == 384
    assert large.down_attends == (False,) * 4 + (True,) and large.up_attends[0]


@pytest.mark.parametrize("config", [VQ_16, {**VQ_8, "codebook_l2_norm": False}, ATTENDING])
def test_to_hf_says_the_same(config):
    cfg = VQConfig.from_hf(config)
    assert VQConfig.from_hf(cfg.to_hf()) == cfg
    if config is ATTENDING:
        assert cfg.to_hf()["down_block_types"] == ATTENDING["down_block_types"]
        assert cfg.to_hf()["up_block_types"] == ATTENDING["up_block_types"]


def test_trap25_codes_fit_their_dtype_and_the_codebook():
    cfg = VQConfig.from_hf(JANUS)
    assert cfg.code_dtype == np.uint16
    assert VQConfig.from_hf({**JANUS, "num_embeddings": 2**16 + 1}).code_dtype == np.int32
    check_codes(np.array([0, 16383]), cfg, "cache/0.npy")
    check_codes(np.zeros((0,), np.uint16), cfg, "cache/0.npy")
    with pytest.raises(UserError, match=r"cache/0\.npy has code 16384, but .* 16384 rows"):
        check_codes(np.array([[3, 16384]]), cfg, "cache/0.npy")
    with pytest.raises(UserError, match="has code -1"):
        check_codes(np.array([-1, 3]), cfg, "cache/0.npy")


@pytest.mark.parametrize(
    "config, words",
    [
        ({}, "model_type=None, _class_name=None is no VQ tokenizer; .*janus_vqgan.*VQModel"),
        ({"_class_name": "AutoencoderKL"}, "_class_name='AutoencoderKL' is no VQ tokenizer"),
        ({**JANUS, "double_latent": True}, "double_latent=True"),
        ({**JANUS, "dropout": 0.1}, "dropout=0.1 is not supported; set it to 0"),
        ({**JANUS, "channel_multiplier": [2, 4]}, r"channel_multiplier=\[2, 4\].*begin with 1"),
        ({**JANUS, "base_channels": 48}, r"base_channels \* channel_multiplier has 48"),
        ({**JANUS, "in_channels": 1}, "in_channels=1 is not supported; images have 3"),
        ({**DIFFUSERS, "out_channels": 4}, "out_channels=4 is not supported"),
        ({**DIFFUSERS, "act_fn": "relu"}, "act_fn='relu' is not supported; it has to be 'silu'"),
        ({**DIFFUSERS, "norm_type": "spatial"}, "norm_type='spatial'.*'group'"),
        ({**DIFFUSERS, "codebook_l2_norm": True}, "codebook_l2_norm=True.*False"),
        ({**DIFFUSERS, "block_out_channels": [10]}, "block_out_channels has 10"),
        ({**ATTENDING, "up_block_types": ["UpDecoderBlock2D"]}, "up_block_types=.*for each of"),
        ({**DIFFUSERS, "down_block_types": ["DownBlock2D"]}, "down_block_types=.*DownEncoderBl"),
    ],
)
def test_bad_configs_name_file_and_key(config, words):
    with pytest.raises(UserError, match=words) as caught:
        VQConfig.from_hf(config, "vq/config.json")
    assert str(caught.value).startswith("vq/config.json")
