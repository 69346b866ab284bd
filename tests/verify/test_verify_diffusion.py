"""A pipeline's certificate: what it passes, and that one wrong detail in one network fails it."""

import json

import jax
import jax.numpy as jnp
import pytest

from jaxft import verify
from jaxft.models.denoisers import unet
from jaxft.models.pipelines import stable_diffusion
from jaxft.nn import conv
from jaxft.verify import component, diffusion
from jaxft.verify.pipelines import pictures
from tests.tiny_pipelines import make_pipeline

NETWORKS = ["text_encoder", "vae", "unet"]


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def any_folder(request, tmp_path_factory):
    work = tmp_path_factory.mktemp(request.param)
    make_pipeline(work, request.param).save_pretrained(work / "pipeline")
    return work / "pipeline"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("one")
    make_pipeline(work, prediction="v_prediction").save_pretrained(work / "pipeline")
    return work / "pipeline"


def failures(checks):
    return {check.name for check in checks if not check.passed}


def subject(folder, name):
    opened = diffusion.open_pipeline(str(folder))
    return next(one for one in opened.subjects if one.name == name)


def test_a_sound_pipeline_passes_and_its_certificate_lies_beside_it(any_folder, capsys):
    code = verify.main([str(any_folder)])
    shown = capsys.readouterr().out
    assert code == 0, shown
    content = json.loads((any_folder / "parity.json").read_text())
    figures = {check["name"]: check for check in content["checks"]}
    xl = content["trajectory"]["sampler"] == "euler"
    names = [*NETWORKS[:1], *(["text_encoder_2"] if xl else []), *NETWORKS[1:]]
    assert list(content["components"]) == names
    for name in names:
        assert figures[f"{name} gradients, worst relative"]["figure"] > 0
        assert figures[f"{name} gradients, worst relative"]["bound"] < 1e-3
        assert figures[f"{name} weights, differing tensors"]["figure"] == 0
        assert figures[f"{name} round trip, differing tensors"]["figure"] == 0
        assert len(content["components"][name]["weights_sha256"]) == 64
    outputs = {name: one for name, one in figures.items() if name.endswith("max relative")}
    pictures = outputs.pop(
        f"pictures after 5 {content['trajectory']['sampler']} steps, max relative"
    )
    assert 0 < pictures["figure"] < pictures["bound"] < 1e-3
    assert int(pictures["note"].split("%")[0]) > 20
    assert all(one["bound"] < 1e-5 for one in outputs.values())
    assert all(one["bound"] >= 6 * one["rounding"] > 0 for one in outputs.values())
    assert len(outputs) == 3 * len(names) - 2 and all(one["figure"] > 0 for one in outputs.values())
    assert content["oracles"].keys() == {"torch", "diffusers", "transformers"}


def test_swapped_geglu_halves_fail_the_unet_alone(folder, tmp_path, monkeypatch, capsys):
    def swapped(self, x, keys):
        gate, value = jnp.split(self.proj(x, keys), 2, axis=-1)
        return self.out(value * jax.nn.gelu(gate, approximate=False), keys)

    monkeypatch.setattr(unet.FeedForward, "__call__", swapped)
    assert verify.main([str(folder), f"--out={tmp_path / 'parity.json'}"]) == 1
    content = json.loads((tmp_path / "parity.json").read_text())
    failed = {check["name"] for check in content["checks"] if not check["passed"]}
    assert not content["passed"]
    assert {"unet output, max relative", "unet gradients, worst relative"} <= failed
    assert all(name.startswith(("unet", "pictures")) for name in failed)
    assert "FAILED" in (shown := capsys.readouterr().out) and "unet output" in shown


def test_another_epsilon_fails_the_vae(folder, monkeypatch):
    monkeypatch.setattr("jaxft.models.autoencoders.vae.VAE_EPS", 1e-4)
    failed = failures(component.check(subject(folder, "vae")).checks)
    assert {f"vae {name}, max relative" for name in ("mean", "logvar", "pictures")} <= failed
    assert "vae round trip, differing tensors" not in failed


def test_another_padding_fails_the_vae(folder, monkeypatch):
    monkeypatch.setattr("jaxft.models.autoencoders.vae.BOTTOM_RIGHT", conv.ALL_SIDES)
    failed = failures(component.check(subject(folder, "vae")).checks)
    assert "vae mean, max relative" in failed and "vae pictures, max relative" not in failed


def test_another_quick_gelu_fails_the_text_encoder(folder, monkeypatch):
    real = jax.nn.sigmoid
    monkeypatch.setattr(jax.nn, "sigmoid", lambda x: real(x * (1.7 / 1.702)))
    failed = failures(component.check(subject(folder, "text_encoder")).checks)
    assert "text_encoder last state, max relative" in failed


def test_guidance_the_other_way_fails_the_pictures(folder, monkeypatch):
    opened = diffusion.open_pipeline(str(folder))
    real = stable_diffusion.guide
    monkeypatch.setattr(
        stable_diffusion, "guide", lambda uncond, cond, *rest: real(cond, uncond, *rest)
    )
    assert not pictures.trajectory(opened).passed


def test_without_diffusers_it_says_how_to_get_it(folder, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "diffusers", None)
    assert verify.main([str(folder)]) == 2
    assert "diffusers: pip install 'jaxft[verify]'" in capsys.readouterr().err
