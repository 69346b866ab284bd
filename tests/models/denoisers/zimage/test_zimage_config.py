"""What Z-Image's transformer/config.json says, with diffusers' own class as the authority."""

import inspect

import pytest
from diffusers import ZImageTransformer2DModel

from jaxft.core.errors import UserError
from jaxft.models.denoisers.zimage.zimage_config import DEFAULTS, ZImageConfig

SMALL = {"dim": 256, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2}


def test_every_key_of_diffusers_is_read_and_defaults_agree():
    signature = inspect.signature(ZImageTransformer2DModel.__init__).parameters
    theirs = {
        key: tuple(one.default) if isinstance(one.default, list) else one.default
        for key, one in signature.items()
        if key != "self"
    }
    assert {**theirs, "_class_name": "ZImageTransformer2DModel"} == DEFAULTS


def test_absent_keys_take_the_class_defaults():
    cfg = ZImageConfig.from_hf({})
    assert (cfg.in_channels, cfg.num_layers, cfg.num_refiners) == (16, 30, 2)
    assert (cfg.heads, cfg.head_dim, cfg.dim, cfg.mlp_dim) == (30, 128, 3840, 10240)
    assert (cfg.context_dim, cfg.axes, cfg.theta) == (2560, (32, 48, 48), 256.0)
    assert cfg.qk_norm and not ZImageConfig.from_hf({"qk_norm": None}).qk_norm


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "QwenImageTransformer2DModel"}, "QwenImage.*expected ZImageTransformer"),
        ({"all_patch_size": [2, 4]}, r"all_patch_size=\[2, 4\].*expected \[2\]"),
        ({"all_f_patch_size": [2]}, r"all_f_patch_size=\[2\].*expected \[1\]"),
        ({"siglip_feat_dim": 1152}, "siglip_feat_dim=1152.*expected None"),
        ({"n_kv_heads": 1}, "n_kv_heads=1.*expected 2"),
        ({"n_layers": 0}, "n_layers=0.*from 1 to"),
        ({"axes_dims": [64, 64]}, "axes_dims.*three even numbers of the sum dim / n_heads=128"),
        ({"axes_dims": [31, 49, 48]}, "axes_dims.*three even numbers"),
        ({"n_heads": 3, "n_kv_heads": 3}, r"axes_dims.*n_heads=85\.3333"),
    ],
)
def test_other_values_are_refused_by_key_and_file(change, words):
    with pytest.raises(UserError, match=words) as caught:
        ZImageConfig.from_hf({**SMALL, **change}, "z/transformer/config.json")
    assert str(caught.value).startswith("z/transformer/config.json: ")
