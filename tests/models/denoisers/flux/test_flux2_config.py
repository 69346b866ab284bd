"""What FLUX.2's transformer/config.json says, with diffusers' own class as the authority."""

import inspect

import pytest
from diffusers import Flux2Transformer2DModel

from jaxft.core.errors import UserError
from jaxft.models.denoisers.flux.flux2_config import DEFAULTS, Flux2Config

SMALL = {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": False}


def test_every_key_of_diffusers_is_read_and_defaults_agree():
    signature = inspect.signature(Flux2Transformer2DModel.__init__).parameters
    theirs = {key: one.default for key, one in signature.items() if key != "self"}
    assert {**theirs, "_class_name": "Flux2Transformer2DModel"} == DEFAULTS


def test_absent_keys_take_the_class_defaults():
    cfg = Flux2Config.from_hf({"guidance_embeds": None})
    assert (cfg.in_channels, cfg.num_layers, cfg.num_single) == (32, 8, 48)
    assert (cfg.heads, cfg.head_dim, cfg.dim, cfg.mlp_dim) == (48, 128, 6144, 18432)
    assert (cfg.context_dim, cfg.time_dim, cfg.eps) == (15360, 256, 1e-6)
    assert (cfg.axes, cfg.theta) == ((32,) * 4, 2000)
    assert Flux2Config.from_hf({**SMALL, "rope_theta": 2000.0}).theta == 2000


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "Flux3Transformer"}, "Flux3.*expected Flux2Transformer2DModel"),
        ({"patch_size": 2}, "patch_size=2.*expected 1"),
        ({"guidance_embeds": True}, "guidance_embeds=True.*false, as in FLUX.2 klein: FLUX.2-dev"),
        ({"in_channels": 6}, "in_channels=6.*a multiple of 4"),
        ({"out_channels": 64}, "out_channels=64.*null or in_channels=128"),
        ({"num_layers": 0}, "num_layers=0.*from 1 to"),
        ({"rope_theta": "2000"}, "rope_theta='2000'"),
        ({"axes_dims_rope": [64, 32, 32]}, "axes_dims_rope.*four even numbers of the sum att"),
        ({"axes_dims_rope": [31, 33, 32, 32]}, "axes_dims_rope.*four even numbers"),
    ],
)
def test_other_values_are_refused_by_key_and_file(change, words):
    with pytest.raises(UserError, match=words) as caught:
        Flux2Config.from_hf({**SMALL, **change}, "k/transformer/config.json")
    assert str(caught.value).startswith("k/transformer/config.json: ")
