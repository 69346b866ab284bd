"""What an AutoencoderKL's config.json may say, and what is refused by name."""

import inspect

import pytest
from diffusers import AutoencoderKL

from jaxft.core.errors import UserError
from jaxft.models.autoencoders.vae_config import DEFAULTS, VAEConfig

TINY = {
    "block_out_channels": [8, 16],
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}


def test_every_key_of_diffusers_is_read_and_defaults_agree():
    signature = inspect.signature(AutoencoderKL.__init__).parameters
    assert DEFAULTS.keys() - signature.keys() == {"_class_name"}
    assert all(DEFAULTS[key] == signature[key].default for key in signature if key != "self")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 2}, "down_block_types=.*DownEncoder"),
        ({"norm_num_groups": 32}, "block_out_channels has 8, which norm_num_groups=32"),
        ({"shift_factor": 0.1, "latents_mean": [0.1] * 4}, "shift_factor and latents_mean"),
        (
            {"_class_name": "AutoencoderTiny"},
            "_class_name='AutoencoderTiny'.*AutoencoderKL",
        ),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "_class_name='Asymmetric.*AutoencoderKL"),
        ({"_class_name": "ConsistencyDecoderVAE"}, "_class_name='Consistency.*AutoencoderKL"),
        ({"latents_std": [1.0]}, "latents_std has 1 numbers for latent_channels=4"),
    ],
)
def test_bad_configs_name_file_and_key(change, words):
    with pytest.raises(UserError, match=words) as caught:
        VAEConfig.from_hf({**TINY, **change}, "sd/vae/config.json")
    assert str(caught.value).startswith("sd/vae/config.json")
