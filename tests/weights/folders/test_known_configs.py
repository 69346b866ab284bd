"""The published configs build models of the published sizes."""

import jax
import pytest

from jaxft.core.params import describe
from jaxft.models.denoisers.unet import UNet
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.weights.folders.known_configs import KNOWN_COMPONENTS, KNOWN_INDEXES, KNOWN_SCHEDULERS

UNETS = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}
TEXTS = {"sd1": [123_060_480], "sd2": [340_387_840], "sdxl": [123_060_480, 694_659_840]}


def count(model, cfg):
    leaves = describe(jax.eval_shape(lambda: model(cfg, key=jax.random.key(0))))
    total = 0
    for leaf in leaves.values():
        size = 1
        for dim in leaf.shape:
            size *= dim
        total += size
    return total


@pytest.mark.parametrize("kind", KNOWN_COMPONENTS)
def test_parameters(kind):
    configs = KNOWN_COMPONENTS[kind]
    assert count(UNet, UNetConfig.from_hf(configs["unet"])) == UNETS[kind]
    texts = [configs[name] for name in ("text_encoder", "text_encoder_2") if name in configs]
    assert [count(CLIPText, CLIPTextConfig.from_hf(text)) for text in texts] == TEXTS[kind]


@pytest.mark.parametrize("kind", KNOWN_COMPONENTS)
def test_the_index_names_every_component_and_the_betas_are_scaled_linear(kind):
    assert set(KNOWN_COMPONENTS[kind]) <= set(KNOWN_INDEXES[kind])
    wanted = ("scaled_linear", 0.00085, 0.012)
    assert (
        tuple(KNOWN_SCHEDULERS[kind][k] for k in ("beta_schedule", "beta_start", "beta_end"))
        == wanted
    )
    assert KNOWN_COMPONENTS[kind]["vae"]["scaling_factor"] == (
        0.13025 if kind == "sdxl" else 0.18215
    )
