"""The certificates of AutoencoderKL, VQModel and JanusVQVAE, and what fails them."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from transformers import JanusVQVAE

from jaxft import verify
from jaxft.models import registry
from jaxft.models.autoencoders import vqgan
from tests.tiny_autoencoders import make_janus, make_vae, make_vqmodel

FORWARD = {"vae": ("mean", "logvar", "pictures"), "tokenizer": ("latents", "pictures")}


def figures(folder, code):
    assert verify.main([str(folder)]) == code
    content = json.loads((folder / "parity.json").read_text())
    assert content["passed"] == (code == 0)
    return {check["name"]: check for check in content["checks"]}, content


@pytest.mark.parametrize(
    "make, name, oracle",
    [
        (make_vae, "vae", "diffusers"),
        (make_vqmodel, "tokenizer", "diffusers"),
        (make_janus, "tokenizer", "transformers"),
    ],
)
def test_a_sound_folder_passes(make, name, oracle, tmp_path):
    checks, content = figures(make(tmp_path / "model"), 0)
    for output in FORWARD[name]:
        assert 0 < checks[f"{name} {output}, max relative"]["figure"] < 1e-5
    assert checks[f"{name} gradients, worst relative"]["figure"] > 0
    assert ("tokenizer codes, differing" in checks) == (name == "tokenizer")
    assert content["oracles"].keys() == {"torch", oracle}
    assert content["components"][name]["parameters"] > 1000


def test_16_channels_without_quant_convolutions_pass(tmp_path):
    torch.manual_seed(0)
    model = AutoencoderKL(
        block_out_channels=(8,),
        norm_num_groups=4,
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    model.save_pretrained(tmp_path)
    figures(tmp_path, 0)


def test_rows_of_the_codebook_of_unit_length_fail_a_vqmodel(tmp_path, monkeypatch):
    """Janus decodes rows of unit length, a VQModel its rows as they are."""
    folder = make_vqmodel(tmp_path / "model")
    real = vqgan.Codebook.__call__
    monkeypatch.setattr(
        vqgan.Codebook, "__call__", lambda self, codes, unit: real(self, codes, unit=True)
    )
    checks, _ = figures(folder, 1)
    failed = {name for name, check in checks.items() if not check["passed"]}
    assert failed == {"tokenizer pictures, max relative", "tokenizer gradients, worst relative"}


def test_another_code_than_the_nearest_fails(tmp_path, monkeypatch):
    folder = make_vqmodel(tmp_path / "model")
    real = vqgan.Codebook.nearest
    monkeypatch.setattr(vqgan.Codebook, "nearest", lambda self, z, l2: real(self, z, l2=True))
    checks, _ = figures(folder, 1)
    assert {name for name, check in checks.items() if not check["passed"]} == {
        "tokenizer codes, differing"
    }


def test_janus_codes_are_the_stock_search_where_rows_have_unit_length(tmp_path):
    model = JanusVQVAE.from_pretrained(make_janus(tmp_path / "model"))
    rows = model.quantize.embedding.weight.data
    model.quantize.embedding.weight.data = torch.nn.functional.normalize(rows, dim=-1)
    model.save_pretrained(tmp_path / "unit")
    checks, _ = figures(tmp_path / "unit", 0)
    assert checks["tokenizer codes, differing"]["figure"] == 0


def test_what_is_an_autoencoder():
    assert registry.find_family({"model_type": "janus_vqgan"}) == "autoencoder"
    assert registry.find_family({"_class_name": "AutoencoderKL"}) == "autoencoder"
    assert registry.find_family({"model_type": "llama"}) != "autoencoder"
