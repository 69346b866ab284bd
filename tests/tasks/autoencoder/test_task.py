"""The autoencoder task as people run it: what trains, what stays, what comes out, what is said."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from safetensors.numpy import load_file, save_file
from transformers import JanusVQVAE

from jaxft import train
from tests import whole as runs
from tests.interrupted import kill_after, start, timeless
from tests.tiny_autoencoders import (
    SIZE,
    changes_of,
    make_config,
    make_images,
    make_janus,
    make_vae,
    make_vqmodel,
)

ROOT = Path(__file__).resolve().parents[3]
DECODER = r"vae\.(decoder|post_quant_conv)\..*|discriminator\..*"
INVARIANT = ("to_k.bias", ".k.bias")  # softmax does not see it
MAKE = {"vae": make_vae, "vqmodel": make_vqmodel, "janus": make_janus}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("autoencoders")


@pytest.fixture(scope="module")
def images(work):
    return make_images(work / "images")


@pytest.fixture(scope="module")
def models(work):
    return {name: make(work / name) for name, make in MAKE.items()}


@pytest.fixture
def one_device(monkeypatch):
    """Compiles in a fraction of the time that eight take."""
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


def arguments(model, images, workdir, changes=()):
    keys = changes_of(model, images, changes)
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config", str(ROOT / "configs" / "autoencoder.py"), "--workdir", str(workdir), *flags]


def tensors(folder):
    return {k: v for f in Path(folder).glob("*.safetensors") for k, v in load_file(f).items()}


def records(workdir):
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def load_stock(name, folder):
    """The model in its own library, without a missing or an unexpected tensor."""
    cls = {"vae": AutoencoderKL, "vqmodel": VQModel, "janus": JanusVQVAE}[name]
    model, info = cls.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    return model


@pytest.mark.parametrize("name", MAKE)
def test_decoder_only_training_keeps_what_encodes_bitwise(
    models, images, one_device, tmp_path, name, capsys
):
    """So latents and tokens that were made before stay valid."""
    changes = {"trainable": DECODER, "total": "2_steps", "every.log": "1_steps"}
    assert train.main(arguments(models[name], images, tmp_path / "run", changes)) == 0
    source, made = tensors(models[name]), tensors(tmp_path / "run" / "export")
    assert source.keys() == made.keys()
    for key, tensor in source.items():
        same = made[key].tobytes() == tensor.tobytes()
        trains = key.startswith(("decoder.", "post_quant_conv."))
        assert same != trains or key.endswith(INVARIANT), key
    load_stock(name, tmp_path / "run" / "export")
    last = records(tmp_path / "run")[-1]
    assert {"eval_psnr", "eval_ssim", "eval_effnet-lite0", "eval_kid-lite0"} <= last.keys()
    assert (tmp_path / "run" / "samples" / "reconstructions-000002.png").exists()
    stated = capsys.readouterr().out.split("; loss ")[1].splitlines()[0]
    assert ("kl" in stated) == (name == "vae") and ("commitment" in stated) == (name != "vae")
    if name != "vae":
        assert {"eval_codebook_used", "eval_codebook_perplexity", "eval_dead_codes"} <= last.keys()


@pytest.mark.parametrize("name", MAKE)
def test_zero_steps_give_the_source_bitwise(models, images, one_device, tmp_path, name):
    changes = {"total": "0_steps", "data.eval": ""}
    assert train.main(arguments(models[name], images, tmp_path / "run", changes)) == 0
    source, made = tensors(models[name]), tensors(tmp_path / "run" / "export")
    assert source.keys() == made.keys()
    if name == "janus":  # transformers finds the model's own codes only by rows of unit length
        rows = source.pop("quantize.embedding.weight")
        unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
        np.testing.assert_allclose(made["quantize.embedding.weight"], unit, rtol=1e-6)
    assert all(made[key].tobytes() == tensor.tobytes() for key, tensor in source.items())
    before, after = (
        json.loads((folder / "config.json").read_text())
        for folder in (models[name], tmp_path / "run" / "export")
    )
    assert before.items() <= after.items(), "every field as it was"
    if name == "vae":
        assert (tmp_path / "run" / "export" / "LICENSE").read_text() == "free\n"


@pytest.mark.parametrize("name", ["vae", "janus"])
def test_from_nothing_but_a_config(models, images, one_device, tmp_path, name):
    empty = tmp_path / "empty"
    empty.mkdir()
    shutil.copy(models[name] / "config.json", empty)
    changes = {"init": "random", "total": "1_steps", "data.eval": "", "export.dtype": "bfloat16"}
    assert train.main(arguments(empty, images, tmp_path / "run", changes)) == 0
    model = load_stock(name, tmp_path / "run" / "export")
    x = torch.zeros(1, 3, SIZE, SIZE).to(next(model.parameters()).dtype)
    made = model.encode(x).latent_dist.mode() if name == "vae" else model.encode(x).image_tokens
    assert torch.isfinite(made.float()).all()
    assert {t.dtype.name for t in tensors(tmp_path / "run" / "export").values()} == {"bfloat16"}


def test_sigkill_and_the_same_command_again_is_bitwise(models, images, tmp_path):
    """The discriminator and its moments too: they lie in the same checkpoint."""
    changes = {
        "loss.adversarial": 0.5,
        "loss.adversarial_start": "2_steps",
        "optim.ema": 0.9,
        "total": "8_steps",
        "every.save": "2_steps",
        "data.eval": "",
        "mesh.fsdp": 8,
    }
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert train.main(arguments(models["vae"], images, whole, changes)) == 0
    again = arguments(models["vae"], images, broken, changes)
    assert kill_after(start(again), broken, 5)
    assert train.main(again) == 0
    assert timeless(whole) == timeless(broken)
    a, b = (runs.restore_run(folder, None)[1] for folder in (whole, broken))
    assert any(path.startswith("discriminator.") for path in a)
    for path in a:
        assert np.asarray(a[path]).tobytes() == np.asarray(b[path]).tobytes(), path


def test_dead_codes_are_reported(work, images, one_device, tmp_path, capsys):
    """Half of the codes lie where no latent ever comes."""
    folder = make_vqmodel(work / "dead", codes=32)
    state = tensors(folder)
    state["quantize.embedding.weight"][16:] += 8.0
    save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    changes = {"total": "1_steps", "trainable": r"vae\.quantize\..*"}
    assert train.main(arguments(folder, images, tmp_path / "run", changes)) == 0
    shown = capsys.readouterr().out
    assert "of 32 codes are dead" in shown and "loss.revive=1.0 pulls them back" in shown
    first = next(r for r in records(tmp_path / "run") if "eval_dead_codes" in r)
    assert first["eval_dead_codes"] >= 16 and first["eval_codebook_used"] <= 0.5


def test_nothing_is_advised_to_who_revives(models, images, one_device, capsys):
    task = runs.open_run(make_config(models["vqmodel"], images, {"loss.revive": 1.0}))
    found = task.preview._usage(np.repeat(np.arange(4), 4).reshape(1, 4, 4))
    assert found["dead_codes"] == 12 and found["codebook_used"] == 0.25
    assert found["codebook_perplexity"] == pytest.approx(4)
    shown = capsys.readouterr().out
    assert "12 of 16 codes are dead" in shown and "loss.revive" not in shown


def test_a_perceptual_network_is_read_only_where_it_measures(models, images, one_device):
    for changes, used in (({"loss.perceptual": 0.5}, True), ({}, False)):
        config = make_config(models["vae"], images, {**changes, "data.eval": ""})
        leaves = runs.open_run(config).leaves
        assert any(path.startswith("perceptual.") for path in leaves) == used


@pytest.fixture
def fails(models, images, one_device, tmp_path, capsys):
    """`fails(words, changes)`: the run stops with 2 and one line that holds all words."""

    def check(words, changes, model=None):
        code = train.main(arguments(model or models["vae"], images, tmp_path / "run", changes))
        error = capsys.readouterr().err.strip().splitlines()
        assert code == 2 and len(error) == 1 and error[0].startswith("jaxft: "), error
        for word in words:
            assert str(word) in error[0], f"{word!r} is not in {error[0]!r}"
        assert not (tmp_path / "run" / "export").exists()

    return check


def test_perceptual_weights_missing_or_of_another_network(fails, models, tmp_path):
    fails(["perceptual", "nowhere", "no such file"], {"perceptual": tmp_path / "nowhere"})
    fails(["perceptual", "another network", "effic"], {"perceptual": models["vae"]})


def test_images_of_other_than_three_channels(fails, models, tmp_path):
    for name in ("vae", "vqmodel", "janus"):
        broken = Path(shutil.copytree(models[name], tmp_path / name))
        config = json.loads((broken / "config.json").read_text())
        (broken / "config.json").write_text(json.dumps({**config, "in_channels": 4}))
        fails(["config.json", "in_channels=4", "3 channels"], {}, broken)


def test_what_is_no_autoencoder(fails, models, tmp_path):
    broken = Path(shutil.copytree(models["vae"], tmp_path / "unet"))
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps({**config, "_class_name": "UNet2DModel"}))
    fails(["UNet2DModel", "AutoencoderKL", "VQModel", "janus_vqgan"], {}, broken)


def test_sizes_that_do_not_fit(fails):
    fails(["resolution=33", "multiple of 2"], {"resolution": 33})
    fails(["resolution=16", "32 pixels"], {"resolution": 16, "loss.adversarial": 0.5})


def test_losses_that_could_do_nothing(fails, models):
    fails(["loss.l1", "loss.l2"], {"loss.l1": 0.0})
    words = ["discriminator", "trainable", "add |discriminator"]
    fails(words, {"loss.adversarial": 0.5, "trainable": r"vae\..*"})
    fails(["remat='offload'", "convolutions", "full"], {"remat": "offload"})
    fails(["lora.rank=4", "lora.rank=0"], {"lora.rank": 4, "lora.targets": ".*"})
    fails(["loss.revive=1", "has none"], {"loss.revive": 1.0})
    fails(
        ["loss.revive=1", "vae.quantize.embedding"],
        {"loss.revive": 1.0, "trainable": DECODER},
        models["vqmodel"],
    )


def test_an_adversarial_start_beyond_the_run_is_warned_of(models, images, one_device, capsys):
    late = {"loss.adversarial": 0.5, "loss.adversarial_start": "5_steps"}
    assert runs.open_run(make_config(models["vae"], images, late)).objective.start == 5
    shown = capsys.readouterr().out
    assert "warning: loss.adversarial_start='5_steps'" in shown and "never train" in shown
    assert runs.open_run(make_config(models["vae"], images, {**late, "total": "6_steps"})).objective
    assert "warning" not in capsys.readouterr().out


def test_it_makes_nothing_of_a_prompt(models, images, one_device):
    from jaxft.core.errors import UserError
    from jaxft.tasks import Request

    task = runs.open_run(make_config(models["vae"], images))
    with pytest.raises(UserError, match="takes no prompt"):
        task.preview.complete({}, ["a cat"], Request())
