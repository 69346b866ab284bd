"""Rows of docs/compatibility.md for the published image folders of tests/published."""

import json
from pathlib import Path

from jaxft.core.errors import UserError
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.pipelines import families
from jaxft.models.pipelines.families import AnyConfig
from jaxft.models.pipelines.stable_diffusion import HOLE, SOURCE, PipelineConfig
from jaxft.tasks.diffusion.opened import check
from jaxft.weights.folders.diffusers import INDEX, open_component, open_pipeline
from tests.published import Row

PUBLISHED = Path(__file__).resolve().parent / "published"
FOLDERS = {
    "stable-diffusion-v1-4": "Stable Diffusion 1",
    "stable-diffusion-v1-5": "Stable Diffusion 1",
    "Counterfeit-V2.5": "Stable Diffusion 1",
    "realistic-vision-v51": "Stable Diffusion 1",
    "stable-diffusion-inpainting": "Stable Diffusion 1",
    "cartoonizer-pix2pix": "Stable Diffusion 1",
    "stable-diffusion-2-1-base": "Stable Diffusion 2",
    "stable-diffusion-2-1": "Stable Diffusion 2",
    "stable-diffusion-xl-base-1.0": "Stable Diffusion XL",
    "sdxl-turbo": "Stable Diffusion XL",
    "stable-diffusion-xl-refiner-1.0": "Stable Diffusion XL",
    "playground-v2.5-1024px-aesthetic": "Stable Diffusion XL",
    "Kolors": "Kolors",
    "LCM_Dreamshaper_v7": "latent consistency",
    "stable-diffusion-x4-upscaler": "upscaler",
    "stable-diffusion-3-medium-diffusers": "Stable Diffusion 3",
    "FLUX.1-dev": "FLUX.1",
    "FLUX.1-schnell": "FLUX.1",
    "Chroma": "Chroma",
}
# Folders that a test trains and exports with narrow widths, and the widths that they take.
RUN = {
    "stable-diffusion-v1-4": "sd1",
    "stable-diffusion-v1-5": "sd1",
    "stable-diffusion-inpainting": "sd1",
    "stable-diffusion-2-1": "sd2",
    "stable-diffusion-xl-base-1.0": "sdxl",
}
VAES = ("sd-vae-ft-mse", "sdxl-vae")


def open_published(name: str) -> AnyConfig:
    """Return the configs of a published pipeline folder, as the diffusion task opens it."""
    cfg = families.read_config(open_pipeline(str(PUBLISHED / name), weights=False))
    check(0.0, cfg)
    return cfg


def pipelines() -> list[Row]:
    """Return a row for each published image folder: what opens, or why it is refused."""
    rows = [_row(name, family) for name, family in FOLDERS.items()]
    for name in VAES:
        cfg = VAEConfig.from_hf(open_component(str(PUBLISHED / name), "vae", weights=False).config)
        note = f"task=autoencoder, scaling factor {cfg.scaling_factor:g}"
        rows.append(Row(name, "AutoencoderKL", "opens", note))
    return rows


def _row(name: str, family: str) -> Row:
    try:
        if not (PUBLISHED / name / INDEX).is_file():  # published here as a UNet alone
            UNetConfig.from_hf(json.loads((PUBLISHED / name / "unet/config.json").read_text()))
        cfg = open_published(name)
    except UserError as error:
        return Row(name, family, "refused", str(error).replace(f"{PUBLISHED / name}/", ""))
    kind = {HOLE: "inpainting", SOURCE: "InstructPix2Pix"}.get(cfg.conditioning, "text to image")
    works = "opens, trains, exports" if name in RUN else "opens"
    noise = cfg.schedule.prediction if isinstance(cfg, PipelineConfig) else "flow matching"
    return Row(name, family, works, f"{kind}, {noise}")
