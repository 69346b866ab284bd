"""Exports in another generation of packages, in its own environment: the same images as here."""

import json
import subprocess
import sys

import numpy as np
import pytest

from jaxft.weights.folders.diffusers import open_pipeline
from tests.tasks.diffusion.test_exports import (
    CASES,
    GUIDANCE,
    PROMPTS,
    SIDE,
    STEPS,
    draw_torch,
    noise,
    train_case,
)
from tests.weights.folders.test_diffusers import exported

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("quick")]
OLD = [
    "diffusers==0.31.0",
    "transformers==4.46.3",
    "peft==0.17.1",
    "accelerate",
    "safetensors",
    "numpy<2.3",
]
DRAW = """
import json, sys
import diffusers, numpy, torch, transformers

asked = json.load(sys.stdin)
assert (diffusers.__version__, transformers.__version__) == ("0.31.0", "4.46.3")
for job in asked["jobs"]:
    pipe = getattr(diffusers, asked["cls"]).from_pretrained(job["folder"])
    if job["lora"]:
        pipe.load_lora_weights(job["loras"], weight_name=job["lora"])
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    made = pipe(latents=torch.tensor(numpy.load(asked["noise"])), output_type="np", **asked["how"])
    numpy.save(job["out"], made.images)
"""


@pytest.fixture(scope="module")
def old_python(tmp_path_factory):
    """An environment of its own; torch first, so that it is the build for CPUs."""
    place = tmp_path_factory.mktemp("old")
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    for packages in (["torch==2.13.0"], OLD):
        subprocess.run([place / "bin/python", "-m", "pip", "install", "-q", *packages], check=True)
    return place / "bin/python"


@pytest.mark.parametrize("case", CASES)
def test_the_older_generation_draws_the_same_images(old_python, case, tmp_path):
    """From the folder that the run exported, and from its source under the LoRA in both formats."""
    done = train_case(case, tmp_path)
    base = exported(open_pipeline(str(done.source)), tmp_path / "base")  # in the layout of old
    loras = sorted(path.name for path in done.out.glob("lora/*.safetensors"))
    assert len(loras) == (2 if "lora" in case else 0)
    made = draw_there(
        old_python, done, [(done.out, ""), *((base, name) for name in loras)], tmp_path
    )
    wanted = draw_torch(done.cls.from_pretrained(done.out))
    assert np.abs(wanted - draw_torch(done.cls.from_pretrained(base))).max() > 1e-2
    for images in made:
        assert np.abs(images - wanted).max() < 1e-3


def draw_there(python, done, pairs, place):
    """The images of every (folder, LoRA file or "") by the other environment's diffusers."""
    np.save(place / "noise.npy", noise())
    jobs = [
        {
            "folder": str(folder),
            "loras": str(done.out / "lora"),
            "lora": name,
            "out": str(place / f"{number}.npy"),
        }
        for number, (folder, name) in enumerate(pairs)
    ]
    how = {
        "prompt": PROMPTS,
        "height": SIDE,
        "width": SIDE,
        "num_inference_steps": STEPS,
        "guidance_scale": GUIDANCE,
    }
    noise_file, cls = str(place / "noise.npy"), done.cls.__name__
    asked = {"jobs": jobs, "cls": cls, "noise": noise_file, "how": how}
    subprocess.run([python, "-c", DRAW], input=json.dumps(asked), text=True, check=True)
    return [np.load(job["out"]) for job in jobs]
