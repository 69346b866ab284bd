"""`jaxft.sample` on a pipeline: negative prompt and size against diffusers, seeds, files."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image

from jaxft import sample
from jaxft.objectives.denoising import normal
from tests.tiny_diffusion import flags_of
from tests.tiny_pipelines import make_pipeline

CONFIG = ["--config", str(Path(__file__).resolve().parents[3] / "configs" / "diffusion.py")]
HEIGHT, WIDTH, STEPS, SCALE, SEED = 24, 32, 3, 5.0, 4
ASKED = [f"--steps={STEPS}", f"--guidance={SCALE}", "--sampler=ddim", f"--seed={SEED}"]
pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("pipeline")
    make_pipeline(work, "sd").save_pretrained(work / "model")
    return work / "model"


@pytest.fixture
def draw(folder, tmp_path):
    """`draw("--prompt=a", …)`: the exit status of a call of sample in one folder."""
    words = [*CONFIG, *flags_of(folder, ""), f"--out={tmp_path / 'out'}"]
    return lambda *more: sample.main([*words, *more])


def picture(tmp_path, number=0):
    return np.asarray(Image.open(tmp_path / "out" / f"sample-{number:03}.png"))


@pytest.mark.parametrize("negative", [None, "grey stones"])
def test_a_negative_prompt_and_a_size_are_those_of_diffusers(draw, folder, tmp_path, negative):
    more = [] if negative is None else [f"--negative={negative}"]
    assert draw("--prompt=a red fish", f"--size={WIDTH}x{HEIGHT}", *ASKED, *more) == 0
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    factor = pipe.vae_scale_factor
    keys = jax.vmap(partial(jax.random.fold_in, jax.random.key(SEED)))(jnp.arange(1))
    noise = np.array(normal(keys, (HEIGHT // factor, WIDTH // factor, 4)))
    theirs = pipe(
        "a red fish", negative_prompt=negative, height=HEIGHT, width=WIDTH,
        latents=torch.tensor(noise).permute(0, 3, 1, 2), num_inference_steps=STEPS,
        guidance_scale=SCALE, output_type="np",
    ).images[0]  # fmt: skip
    ours = picture(tmp_path)
    assert ours.shape == (HEIGHT, WIDTH, 3)
    assert np.abs(ours / 255 - theirs).max() < 1e-3 + 0.5 / 255
    assert theirs.std() > 0.05


def test_a_negative_prompt_changes_the_picture(draw, tmp_path):
    for more in ([], ["--negative=grey stones"], ["--negative="]):
        assert draw("--prompt=a red fish", *ASKED, *more) == 0
    plain, avoided, empty = (picture(tmp_path, i) for i in range(3))
    assert (plain == empty).all() and (plain != avoided).any()


def test_earlier_files_stay_and_seeds_are_rows(draw, tmp_path, capsys):
    assert draw("--prompt=a", "--steps=2", "--seeds=3-5") == 0
    assert "3 pictures and grid.png" in capsys.readouterr().out
    first = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert draw("--prompt=a", "--steps=2", "--seed=4") == 0
    assert "1 pictures (sample-003 to 003) and grid-003.png" in capsys.readouterr().out
    later = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    assert later.keys() - first.keys() == {"sample-003.png", "grid-003.png"}
    assert all(later[name] == content for name, content in first.items())
    assert later["sample-003.png"] == first["sample-001.png"] != first["sample-000.png"]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--size=30x32"], "both sides have to be multiples of 4, such as 32x32"),
        (["--size=big"], "--size='big' must be WIDTHxHEIGHT"),
        (["--size=0x8"], "--size='0x8' must be WIDTHxHEIGHT"),
        (["--seeds=5-3"], "--seeds='5-3' must be at most 100 seeds"),
        (["--seeds=0-1000"], "must be at most 100 seeds"),
        (["--seeds=a"], "must be int"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, capsys, words, error):
    assert draw("--prompt=a", *words) == 2
    shown = capsys.readouterr().err
    assert error in shown and shown.count("\n") == 1
