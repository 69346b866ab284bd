"""What FLUX's transformer/config.json says, with diffusers' own class as the authority."""

import inspect

import pytest
from diffusers import FluxTransformer2DModel

from jaxft.core.errors import UserError
from jaxft.models.denoisers.flux.flux_config import DEFAULTS, FluxConfig

SMALL = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2}


def test_every_key_of_diffusers_is_read_and_defaults_agree():
    signature = inspect.signature(FluxTransformer2DModel.__init__).parameters
    theirs = {key: one.default for key, one in signature.items() if key != "self"}
    assert {**theirs, "_class_name": "FluxTransformer2DModel"} == DEFAULTS


def test_absent_keys_take_the_class_defaults():
    cfg = FluxConfig.from_hf({})
    assert (cfg.in_channels, cfg.num_layers, cfg.num_single) == (16, 19, 38)
    assert (cfg.heads, cfg.head_dim, cfg.dim, cfg.axes) == (24, 128, 3072, (16, 56, 56))
    assert (cfg.context_dim, cfg.pooled_dim) == (4096, 768)
    assert not cfg.guidance and cfg.qk_norm


def test_no_out_channels_are_those_of_the_input():
    assert FluxConfig.from_hf({**SMALL, "out_channels": 64}) == FluxConfig.from_hf(SMALL)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "ChromaTransformer2DModel"}, "ChromaTransformer2DModel.*FluxTransformer"),
        ({"patch_size": 2}, "patch_size=2.*expected 1"),
        ({"in_channels": 66}, "in_channels=66.*a multiple of 4"),
        ({"in_channels": 384, "out_channels": 64}, "out_channels=64.*in_channels=384: FLUX.1 Fill"),
        ({"num_single_layers": 0}, "num_single_layers=0.*from 1 to"),
        ({"attention_head_dim": None}, "attention_head_dim=null"),
        ({"attention_head_dim": 64}, "axes_dims_rope=.*of the sum attention_head_dim=64"),
        ({"axes_dims_rope": [64, 64]}, "axes_dims_rope.*three even numbers"),
        ({"axes_dims_rope": [15, 57, 56]}, "axes_dims_rope.*three even numbers"),
        ({"guidance_embeds": "yes"}, "guidance_embeds='yes'.*true or false"),
    ],
)
def test_other_values_are_refused_by_key_and_file(change, words):
    with pytest.raises(UserError, match=words) as caught:
        FluxConfig.from_hf({**SMALL, **change}, "flux/transformer/config.json")
    assert str(caught.value).startswith("flux/transformer/config.json: ")
