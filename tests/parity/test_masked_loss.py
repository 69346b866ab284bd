"""Training with masks against plain torch: sum(error mask) / sum(mask) over the whole batch."""

import json

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

from jaxft import train
from jaxft.core import sharding
from jaxft.data.images.masks import loss_mask
from jaxft.tasks.common import encoded
from jaxft.tasks.diffusion import rows as diffusion_rows
from jaxft.tasks.diffusion.rows import PictureRows
from tests.parity import test_diffusion_training as steps
from tests.parity.flow import Oracle, trained
from tests.parity.test_stable_diffusion_3 import BLIND, PEFT, encode, velocity
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import NO_T5, make_sd3

pytestmark = pytest.mark.usefixtures("one_thread")
FACTOR = 2  # pixels of a latent of the tiny VAEs
COUNT = 24


@pytest.fixture(scope="module")
def masks():
    """A mask [16, 16] for each picture: a box of 255 in a field of another grey."""
    rng, made = np.random.default_rng(3), []
    for grey in np.linspace(0, 200, COUNT).astype(np.uint8):
        one = np.full((16, 16), grey, np.uint8)
        top, left = rng.integers(0, 9, 2)
        one[top : top + 5, left : left + 7] = 255  # no multiple of a latent's side
        made.append(one)
    return np.stack(made)


@pytest.fixture(scope="module")
def data(masks, tmp_path_factory):
    """The same pictures with a mask beside each, and with it as their alpha."""
    found = {}
    for kind in ("file", "alpha"):
        folder = tmp_path_factory.mktemp("pictures") / "set"
        found[kind] = make_pictures(folder, COUNT, sizes=((16, 16),))
        for i, mask in enumerate(masks):
            if kind == "file":
                Image.fromarray(mask).save(folder / f"{i:02}.mask.png")
            else:
                pixels = np.asarray(Image.open(folder / f"{i:02}.png"))
                Image.fromarray(np.dstack([pixels, mask])).save(folder / f"{i:02}.png")
    return found


def of_latents(masks, batch):
    """Weights [B, 1, Y, X] of a batch, by the area of each latent."""
    rows = masks[batch["sample_ids"]] / 255
    cells = rows.reshape(len(rows), 8, FACTOR, 8, FACTOR).mean(axis=(2, 4))
    return torch.tensor(cells)[:, None]


def masked_mean(errors, weights):
    return (errors * weights).sum() / (weights.sum() * errors.shape[1])


class MaskedUNet(steps.Oracle):
    """The loss of an epsilon model."""

    masks: np.ndarray

    def loss(self, step, batch):
        eps, noise, t, dropped = steps.draws(self.run, step, batch)
        posterior = self.pipe.vae.encode(steps.to_torch(batch["pixels"]) / 127.5 - 1).latent_dist
        latents = (posterior.mean + posterior.std * eps) * self.pipe.vae.config.scaling_factor
        noisy = self.scheduler.add_noise(latents, noise, t)
        out = self.pipe.unet(noisy, t, self.text(batch, dropped)[0]).sample
        return masked_mean((out - noise) ** 2, of_latents(self.masks, batch))


class MaskedFlow(Oracle):
    """The loss of a velocity."""

    masks: np.ndarray

    def loss(self, step, batch):
        eps, noise, sigma, dropped = steps.draws(self.run, step, batch)
        vae, share = self.pipe.vae, sigma.double()[:, None, None, None]
        posterior = vae.encode(steps.to_torch(batch["pixels"]) / 127.5 - 1).latent_dist
        drawn = posterior.mean + posterior.std * eps
        latents = (drawn - vae.config.shift_factor) * vae.config.scaling_factor
        captions = [self.captions[int(i)] for i in batch["sample_ids"]]
        words = ["" if lost else one for one, lost in zip(captions, dropped, strict=True)]
        with torch.no_grad():
            text = self.encode(self.pipe, words)
        noisy = (1 - share) * latents + share * noise
        out = self.velocity(self.pipe, noisy, sigma.double(), *text)
        return masked_mean((out - (noise - latents)) ** 2, of_latents(self.masks, batch))


def assert_equal(ours, oracle, blind=r"(?!)"):
    losses, theirs = oracle.train(ours.batches)
    np.testing.assert_allclose(ours.losses, losses, rtol=1e-5)
    moved = {key: x for key, x in theirs.items() if not steps.re.fullmatch(blind, key)}
    steps.assert_same_updates(ours.before, ours.after, moved)


def test_a_unet_with_mask_pictures_and_micro_batches(data, masks, tmp_path, monkeypatch):
    """Micro-batches and devices have unlike sums of masks, and the loss is divided once."""
    make_pipeline(tmp_path).save_pretrained(tmp_path / "folder")
    changes = {"mask": "file", "micro_batches": 2}
    ours = trained(
        tmp_path / "folder", data["file"], changes, "2x2x2", tmp_path / "run", monkeypatch
    )
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "folder")
    oracle = MaskedUNet(pipe, ours.run, ours.before)
    oracle.masks = masks
    assert_equal(ours, oracle)


def test_a_transformer_of_flow_matching_with_alpha(data, masks, tmp_path, monkeypatch):
    make_sd3(tmp_path, t5=False).save_pretrained(tmp_path / "folder")
    # alpha: with 6, a row of an A has a gradient of the size of fp32 rounding, which Adam enlarges
    changes = {"mask": "alpha", "lora.rank": 4, "lora.alpha": 24.0}
    ours = trained(
        tmp_path / "folder", data["alpha"], changes, "one", tmp_path / "run", monkeypatch
    )
    pipe = StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", **NO_T5)
    oracle = MaskedFlow(pipe, ours.run, ours.before, PEFT, encode, velocity)
    oracle.masks = masks
    assert_equal(ours, oracle, BLIND)


def evaluations(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


def test_a_run_with_cached_moments_prior_pictures_and_evaluations(data, tmp_path, monkeypatch):
    """White masks train and evaluate as none, and the prior needs no masks. On one device.

    With eight on two cores, two collectives of a device wait at once, and one has no thread left.
    """
    monkeypatch.setattr(sharding, "make_mesh", lambda *sizes: sharding.one_device_mesh())
    make_pipeline(tmp_path).save_pretrained(tmp_path / "folder")
    white = make_pictures(tmp_path / "white", 8, sizes=((16, 16),))
    prior, found = make_pictures(tmp_path / "prior", 8, seed=1), {}
    for i in range(8):
        Image.new("L", (16, 16), 255).save(tmp_path / "white" / f"{i:02}.mask.png")
    for name, spec, mask in (
        ("none", white, ""),
        ("white", white, "file"),
        ("boxes", data["file"], "file"),
    ):
        keys = {"mask": mask, "prior.data": prior, "cache": tmp_path / "cache"}
        keys |= {"total": "2_steps", "every.eval": "1_steps"}
        flags = flags_of(tmp_path / "folder", spec, keys)
        assert train.main([*flags, "--workdir", str(tmp_path / name)]) == 0
        found[name] = evaluations(tmp_path / name)
    assert found["none"] == pytest.approx(found["white"], rel=1e-6)
    assert found["boxes"] != pytest.approx(found["white"], rel=1e-3)


@pytest.mark.parametrize("kind", ["file", "alpha"])
def test_with_a_cache_a_mask_is_decoded_once_and_losses_stay(data, kind, tmp_path, monkeypatch):
    """Bit for bit those of masks that are decoded in every step."""
    monkeypatch.setattr(sharding, "make_mesh", lambda *sizes: sharding.one_device_mesh())
    make_pipeline(tmp_path).save_pretrained(tmp_path / "folder")
    decoded, found, use = [], {}, PictureRows.use
    keys = {"mask": kind, "cache": tmp_path / "cache", "total": "2_steps", "flip": True}

    def counted(images, index, factor):
        decoded.append(index)
        return loss_mask(images, index, factor)

    for module in (encoded, diffusion_rows):
        monkeypatch.setattr(module, "loss_mask", counted)
    for name in ("cached", "again", "decoded"):
        if name == "decoded":
            plain = lambda rows, stores: use(rows, stores._replace(masks=None))  # noqa: E731
            monkeypatch.setattr(PictureRows, "use", plain)
        decoded.clear()
        flags = flags_of(tmp_path / "folder", data[kind], keys)
        assert train.main([*flags, "--workdir", str(tmp_path / name)]) == 0
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        kept = ("step", "loss", "grad_norm", "eval_loss")
        found[name] = [{key: row[key] for key in kept if key in row} for row in rows]
        counts = {"cached": 2 * COUNT, "again": 0}  # with mirrored ones
        assert len(decoded) == counts.get(name, len(decoded)), name
    assert len(decoded) > COUNT and len(found["cached"]) >= 3
    assert found["cached"] == found["again"] == found["decoded"]


@pytest.mark.parametrize(
    ("changes", "channels", "words"),
    [
        ({"mask": "box"}, 4, "mask='box' is not one of file, alpha, or empty"),
        ({"mask": "file"}, 9, "inpainting"),
        ({"mask": "alpha"}, 4, "no alpha channel"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, capsys, changes, channels, words):
    make_pipeline(tmp_path, in_channels=channels).save_pretrained(tmp_path / "folder")
    pictures = make_pictures(tmp_path / "pictures", 8, sizes=((16, 16),))
    flags = flags_of(tmp_path / "folder", pictures, changes)
    capsys.readouterr()  # what saving has shown
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and words in error[0], error
