"""What a unet/config.json says, with diffusers' own class as the authority on its defaults."""

import inspect

import pytest
from diffusers import UNet2DConditionModel

from jaxft.core.errors import UserError
from jaxft.models.denoisers.unet_config import DEFAULTS, ONLY, UNetConfig

SD21 = {"attention_head_dim": [5, 10, 20, 20]}
SDXL = {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "block_out_channels": [320, 640, 1280],
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {
    "block_out_channels": [64, 128],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}


def test_d12_attention_head_dim_is_the_number_of_heads():
    assert UNetConfig.from_hf({}).heads == (8, 8, 8, 8)
    for config, heads in ((SD21, (5, 10, 20, 20)), (SDXL, (5, 10, 20))):
        cfg = UNetConfig.from_hf(config)
        assert cfg.heads == heads
        assert {width // n for width, n in zip(cfg.channels, heads, strict=True)} == {64}


def test_sdxl_levels_depths_and_added_conditions():
    cfg = UNetConfig.from_hf(SDXL)
    assert cfg.depths == (1, 2, 10)
    assert cfg.down_attends == (False, True, True) and cfg.up_attends == (True, True, False)
    assert (cfg.added_time_dim, cfg.added_dim) == (256, 2816)


def test_d12_absent_keys_take_the_class_defaults():
    cfg = UNetConfig.from_hf({})
    assert cfg.channels == (320, 640, 1280, 1280) and cfg.layers == (2, 2, 2, 2)
    assert cfg.context_dims == (1280,) * 4 and cfg.depths == (1,) * 4
    assert not cfg.linear_projection and cfg.time_dim == 1280 and cfg.added_dim is None


def test_d12_every_key_of_diffusers_is_read_or_refused_and_defaults_agree():
    known = {**DEFAULTS, **{key: values[0] for key, values in ONLY.items()}}
    signature = inspect.signature(UNet2DConditionModel.__init__).parameters
    for key, parameter in signature.items():
        if key in ("self", "addition_embed_type_num_heads"):  # of addition_embed_type "text" only
            continue
        assert known[key] == parameter.default, key


def test_d20_norm_num_groups_and_heads_must_divide_the_widths():
    with pytest.raises(UserError, match=r"norm_num_groups=48.*block_out_channels=\(64, 128\)"):
        UNetConfig.from_hf({**SMALL, "norm_num_groups": 48})
    with pytest.raises(UserError, match=r"attention_head_dim=\(7, 7\).*\(64, 128\)"):
        UNetConfig.from_hf({**SMALL, "attention_head_dim": 7})
    with pytest.raises(UserError, match="addition_time_embed_dim"):
        UNetConfig.from_hf({**SDXL, "addition_time_embed_dim": None})


BAD = {
    "resnet_time_scale_shift": "scale_shift",
    "addition_embed_type": "text_image",
    "class_embed_type": "timestep",
    "num_attention_heads": 8,
    "mid_block_type": None,
    "time_cond_proj_dim": 256,
    "attention_head_dim": [8],
    "cross_attention_dim": "768",
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D"],
    "transformer_layers_per_block": [[1], [2]],
    "_class_name": "UNet3DConditionModel",
}


@pytest.mark.parametrize("key", BAD)
def test_unsupported_values_are_refused_by_name(key):
    with pytest.raises(UserError, match=rf"unet/config.json: {key}=.*expected") as error:
        UNetConfig.from_hf({**SMALL, key: BAD[key]})
    assert "\n" not in str(error.value)
