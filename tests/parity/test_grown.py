"""A text-to-image model grown into inpainting and InstructPix2Pix: training and exports.

Oracles are a plain torch loop over diffusers' UNet, grown by hand as in its script
train_instruct_pix2pix.py, and diffusers' pipelines.
"""

import json

import numpy as np
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
)
from PIL import Image
from safetensors.numpy import load_file

from jaxft import export, sample, train, verify
from jaxft.core.step import sample_keys
from tests import plain_torch
from tests.parity.test_conditioning import SIDE, make_edits, their_loss
from tests.parity.test_diffusion_training import (
    DECAY,
    LR,
    all_of,
    assert_same_updates,
    jax_steps,
)
from tests.tiny_diffusion import flags_of, make_config
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
CONV = "unet.conv_in.weight"
WEIGHTS = "diffusion_pytorch_model.safetensors"
GROWN = {"inpainting": ("hole", 9), "instruct_pix2pix": ("source", 8)}
CLASSES = {
    ("sd", "inpainting"): StableDiffusionInpaintPipeline,
    ("sd", "instruct_pix2pix"): StableDiffusionInstructPix2PixPipeline,
    ("sdxl", "inpainting"): StableDiffusionXLInpaintPipeline,
    ("sdxl", "instruct_pix2pix"): StableDiffusionXLInstructPix2PixPipeline,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    work = tmp_path_factory.mktemp("pipelines")
    for family in ("sd", "sdxl"):
        make_pipeline(work, family).save_pretrained(work / family)
    return work


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_edits(tmp_path_factory.mktemp("pictures"))


def grown_by_hand(unet, channels):
    """As in train_instruct_pix2pix.py, but the bias is that of the model."""
    old = unet.conv_in
    new = torch.nn.Conv2d(channels, old.out_channels, old.kernel_size, old.stride, old.padding)
    with torch.no_grad():
        new.weight.zero_()
        new.weight[:, :4].copy_(old.weight)
        new.bias.copy_(old.bias)
    unet.conv_in = new


@pytest.mark.parametrize(
    "kind", ["inpainting", pytest.param("instruct_pix2pix", marks=pytest.mark.slow)]
)
def test_steps_equal_torch_over_a_unet_grown_by_hand(folders, pictures, tmp_path, kind):
    conditioning, channels = GROWN[kind]
    share = 0.2
    changes = {
        "grow": kind,
        "caption_dropout": share,
        "min_snr_gamma": 0.0,
        "optim.weight_decay": DECAY,
        "optim.lr": LR,
    }
    ours = jax_steps(make_config(folders / "sd", pictures, changes), tmp_path)
    pipe = StableDiffusionPipeline.from_pretrained(folders / "sd")
    grown_by_hand(pipe.unet, channels)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder):
        module.double().requires_grad_(module is pipe.unet)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    pipe.scheduler.alphas_cumprod = torch.tensor(np.cumprod(1 - betas), dtype=torch.float64)
    theirs = {f"unet.{key}": tensor for key, tensor in all_of(pipe.unet)}
    for key, tensor in theirs.items():
        assert np.array_equal(ours.before[key], tensor.detach().numpy().astype(np.float32)), key

    def losses():
        for step, batch in enumerate(ours.batches):
            keys = sample_keys(ours.run.cfg.seed, step, batch["sample_ids"])
            yield their_loss(conditioning, pipe, ours.run, batch, keys, share)

    wanted = plain_torch.train(theirs.values(), losses(), lr=LR, decay=DECAY)
    np.testing.assert_allclose(ours.losses, wanted, rtol=1e-5)
    after = {key: tensor.detach().numpy() for key, tensor in theirs.items()}
    assert_same_updates(ours.before, ours.after, after)
    assert (np.abs(ours.after[CONV][:, 4:]).max((0, 2, 3)) > 0).all(), "each new channel learned"


# ---- the commands ---------------------------------------------------------------------------


def make_run(source, pictures, work, kind, lora, steps):
    changes = {
        "grow": kind,
        "total": f"{steps}_steps",
        "eval_examples": 2,
        "sample.prompts": "('a fish',)",
        "optim.lr": 0.01,
        "export.kind": "all",
        "trainable": "" if lora else r"unet\.conv_in\..*",
        **({"lora.rank": 2} if lora else {}),
    }
    assert train.main([*flags_of(source, pictures, changes), "--workdir", str(work)]) == 0


def test_an_export_beside_adapters_is_an_inpainting_pipeline(folders, pictures, tmp_path):
    make_run(folders / "sd", pictures, tmp_path / "run", "inpainting", True, 2)
    check_export(folders / "sd", tmp_path / "run" / "export", "sd", "inpainting", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "family", "lora"),
    [
        ("inpainting", "sd", True),
        ("inpainting", "sdxl", False),
        ("instruct_pix2pix", "sd", False),
        ("instruct_pix2pix", "sdxl", True),
    ],
)
def test_a_run_resumes_samples_and_goes_on(folders, pictures, tmp_path, capsys, kind, family, lora):
    """Resumed after a step, its export is that of a run without a stop, and its pipeline's."""
    source, work = folders / family, tmp_path / "run"
    for steps in (1, 2):
        make_run(source, pictures, work, kind, lora, steps)
    assert "resumed from step 1" in capsys.readouterr().out
    make_run(source, pictures, tmp_path / "whole", kind, lora, 2)
    files = [x / "export" / "unet" / WEIGHTS for x in (work, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()
    check_export(source, work / "export", family, kind, lora)
    check_later_commands(work, pictures, tmp_path, kind, capsys)


def check_export(source, out, family, kind, lora):
    """Both layouts are those of diffusers' class, and what did not train is as it was."""
    cls, channels = CLASSES[family, kind], GROWN[kind][1]
    assert json.loads((out / "unet" / "config.json").read_text())["in_channels"] == channels
    again = DiffusionPipeline.from_pretrained(out)
    assert type(again) is cls and again.unet.config.in_channels == channels
    assert not (out / "lora").exists(), "its base would lack the new inputs"
    (single,) = out.glob("*.safetensors")
    whole = cls.from_single_file(str(single), config=str(out))
    theirs, ours = whole.unet.state_dict(), again.unet.state_dict()
    assert theirs.keys() == ours.keys() and all(torch.equal(x, ours[k]) for k, x in theirs.items())
    made, own = (load_file(folder / "unet" / WEIGHTS) for folder in (out, source))
    kernel, before = made.pop("conv_in.weight"), own.pop("conv_in.weight")
    assert kernel[:, :4].shape == before.shape and not np.array_equal(kernel[:, :4], before)
    assert (np.abs(kernel[:, 4:]).max((0, 2, 3)) > 0).all(), "each new channel learned"
    assert not np.array_equal(made.pop("conv_in.bias"), own.pop("conv_in.bias"))
    moved = {key for key in own if made[key].tobytes() != own[key].tobytes()}
    assert made.keys() == own.keys() and all(".attn" in key for key in moved)
    assert bool(moved) == lora
    for file in (source / "vae").iterdir():
        assert file.read_bytes() == (out / "vae" / file.name).read_bytes(), file


def check_later_commands(work, pictures, place, kind, capsys):
    Image.new("RGB", (SIDE, SIDE), "red").save(place / "image.png")
    Image.new("L", (SIDE, SIDE), 255).save(place / "mask.png")
    given = [f"--image={place / 'image.png'}"]
    given += [f"--mask={place / 'mask.png'}"] * (kind == "inpainting")
    drawn = ["--workdir", str(work), "--prompt=a cat", f"--out={place / 'drawn'}", *given]
    assert sample.main(drawn) == 0 and len(list((place / "drawn").glob("sample-*.png"))) == 1
    assert verify.main([str(work / "export"), "--out", str(place / "proof.json")]) == 0
    out = ["--workdir", str(work), "--out", str(place / "lora"), "--kind", "lora"]
    capsys.readouterr()
    assert export.main(out) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "use export.kind='folder'" in line
    flags = flags_of(work / "export", pictures, {"eval_examples": 2, "total": "0_steps"})
    assert train.main([*flags, "--workdir", str(place / "more")]) == 0
    last, first = (evaluated(folder) for folder in (work, place / "more"))
    assert first[0] == pytest.approx(last[-1], rel=1e-6)


def evaluated(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_a_grown_single_file_is_an_inpainting_model(folders, pictures, tmp_path):
    """A file of text-to-image, as others write it, grows as its folder does."""
    flags = flags_of(folders / "sd", pictures, {"total": "0_steps", "export.kind": "single_file"})
    assert train.main([*flags, "--workdir", str(tmp_path / "plain")]) == 0
    (file,) = (tmp_path / "plain" / "export").glob("*.safetensors")
    changes = {"grow": "inpainting", "total": "0_steps", "export.kind": "folder"}
    flags = flags_of(file, pictures, {**changes, "eval_examples": 2})
    assert train.main([*flags, "--workdir", str(tmp_path / "grown")]) == 0
    made = StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "grown" / "export")
    own = StableDiffusionPipeline.from_pretrained(folders / "sd").unet
    grown_by_hand(own, 9)
    ours = made.unet.state_dict()
    assert all(torch.equal(x, ours[key]) for key, x in own.state_dict().items())
