"""What a transformer/config.json says, with diffusers' own class as the authority on defaults."""

import inspect

import pytest
from diffusers import SD3Transformer2DModel

from jaxft.core.errors import UserError
from jaxft.models.denoisers.mmdit.mmdit_config import DEFAULTS, BlockRun, MMDiTConfig

SMALL = {"num_layers": 4, "num_attention_heads": 2, "caption_projection_dim": 128}


def test_every_key_of_diffusers_is_read_and_defaults_agree():
    signature = inspect.signature(SD3Transformer2DModel.__init__).parameters
    theirs = {key: one.default for key, one in signature.items() if key != "self"}
    assert {**theirs, "_class_name": "SD3Transformer2DModel"} == DEFAULTS


def test_absent_keys_take_the_class_defaults():
    cfg = MMDiTConfig.from_hf({})
    assert (cfg.in_channels, cfg.out_channels, cfg.patch_size) == (16, 16, 2)
    assert (cfg.num_layers, cfg.heads, cfg.head_dim, cfg.dim) == (18, 18, 64, 1152)
    assert (cfg.context_dim, cfg.pooled_dim, cfg.max_patches) == (4096, 2048, 96)
    assert cfg.dual_layers == () and not cfg.qk_norm and cfg.sample_size == 128


def test_no_out_channels_are_those_of_the_input():
    config = {**SMALL, "in_channels": 4, "out_channels": None}
    assert MMDiTConfig.from_hf(config).out_channels == 4


@pytest.mark.parametrize(
    ("dual", "runs"),
    [
        ((), [(range(3), False, False), (range(3, 4), False, True)]),
        (
            [1, 0],
            [(range(2), True, False), (range(2, 3), False, False), (range(3, 4), False, True)],
        ),
        ([3], [(range(3), False, False), (range(3, 4), True, True)]),
        (
            [0, 2, 3],
            [
                (range(1), True, False),
                (range(1, 2), False, False),
                (range(2, 3), True, False),
                (range(3, 4), True, True),
            ],
        ),
    ],
)
def test_alike_blocks_that_follow_each_other_are_one_run(dual, runs):
    cfg = MMDiTConfig.from_hf({**SMALL, "dual_attention_layers": dual})
    assert cfg.runs == tuple(BlockRun(*one) for one in runs)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "FluxTransformer2DModel"}, "FluxTransformer2DModel.*SD3Transformer2DMod"),
        ({"qk_norm": "layer_norm"}, "qk_norm='layer_norm'.*null or 'rms_norm'"),
        ({"caption_projection_dim": 64}, "caption_projection_dim=64.*expected 128"),
        ({"dual_attention_layers": [4]}, "dual_attention_layers.*below num_layers=4"),
        ({"dual_attention_layers": 2}, "dual_attention_layers=2.*a list"),
        ({"dual_attention_layers": None}, "dual_attention_layers=null"),
        ({"num_layers": 0}, "num_layers=0.*from 1 to"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size=null"),
        ({"attention_head_dim": "64"}, "attention_head_dim='64'"),
    ],
)
def test_other_values_are_refused_by_key_and_file(change, words):
    with pytest.raises(UserError, match=words) as caught:
        MMDiTConfig.from_hf({**SMALL, **change}, "sd3/transformer/config.json")
    assert str(caught.value).startswith("sd3/transformer/config.json: ")
