"""Families of pipelines: the config, the module and the weight tables, by the folder's index."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jaxtyping import PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.models.denoisers.flux import flux, flux2
from jaxft.models.denoisers.mmdit import mmdit
from jaxft.models.denoisers.zimage import zimage
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.flow import common
from jaxft.models.pipelines.flow import flux as flux_pipeline
from jaxft.models.pipelines.flow import klein as klein_pipeline
from jaxft.models.pipelines.flow import stable_diffusion_3 as sd3_pipeline
from jaxft.models.pipelines.flow import zimage as zimage_pipeline
from jaxft.models.pipelines.flow.common import FlowConfig
from jaxft.models.pipelines.flow.flux import Flux
from jaxft.models.pipelines.flow.klein import Klein
from jaxft.models.pipelines.flow.stable_diffusion_3 import StableDiffusion3
from jaxft.models.pipelines.flow.zimage import ZImage
from jaxft.models.pipelines.stable_diffusion import PipelineConfig, StableDiffusion
from jaxft.models.registry import Architecture
from jaxft.weights.folders.diffusers import Pipeline
from jaxft.weights.transfer import Part

AnyConfig = PipelineConfig | FlowConfig
AnyPipeline = StableDiffusion | StableDiffusion3 | Flux | Klein | ZImage


class FlowFamily(NamedTuple):
    """The reader of a pipeline's config, its module, and the architecture of its transformer."""

    read: Callable[[Pipeline], FlowConfig]
    module: Callable[..., Any]
    denoiser: Architecture


FLOW = {  # families that are trained by flow matching
    "sd3": FlowFamily(sd3_pipeline.read, StableDiffusion3, mmdit.ARCHITECTURE),
    "flux": FlowFamily(flux_pipeline.read, Flux, flux.ARCHITECTURE),
    "flux2": FlowFamily(klein_pipeline.read, Klein, flux2.ARCHITECTURE),
    "zimage": FlowFamily(zimage_pipeline.read, ZImage, zimage.ARCHITECTURE),
}


def read_config(pipeline: Pipeline, prediction: str = "", zero_snr: bool = False) -> AnyConfig:
    """Read every config.json of a pipeline.

    `prediction` and `zero_snr` replace settings of a folder with DDPM noise. Raises: UserError if
    the components do not fit each other, or the two settings the folder.
    """
    if pipeline.family not in FLOW:
        return PipelineConfig.of(pipeline, prediction, zero_snr)
    if prediction or zero_snr:
        key = f"prediction={prediction!r}" if prediction else "zero_snr=True"
        raise UserError(
            f"{key} is for DDPM noise, but {pipeline.name} is trained by flow matching; leave it"
            " out"
        )
    return FLOW[pipeline.family].read(pipeline)


def build(cfg: AnyConfig, key: PRNGKeyArray) -> AnyPipeline:
    """Return all networks of a pipeline with random parameters."""
    if isinstance(cfg, PipelineConfig):
        return StableDiffusion(cfg, key=key)
    return FLOW[cfg.family].module(cfg, key=key)


def parts(pipeline: Pipeline, cfg: AnyConfig) -> tuple[Part, ...]:
    """Return the parts of a pipeline, which fill its parameters and which an export writes."""
    if isinstance(cfg, PipelineConfig):
        return stable_diffusion.parts(pipeline, cfg)
    return common.parts(pipeline, cfg, FLOW[cfg.family].denoiser)
