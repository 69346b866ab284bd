"""Families of pipelines: the config, the module and the weight tables, by the folder's index."""

from jaxtyping import PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.flow import flux, stable_diffusion_3
from jaxft.models.pipelines.flow.flux import Flux, FluxPipelineConfig
from jaxft.models.pipelines.flow.stable_diffusion_3 import SD3Config, StableDiffusion3
from jaxft.models.pipelines.stable_diffusion import PipelineConfig, StableDiffusion
from jaxft.weights.folders.diffusers import Pipeline
from jaxft.weights.transfer import Part

AnyConfig = PipelineConfig | SD3Config | FluxPipelineConfig
AnyPipeline = StableDiffusion | StableDiffusion3 | Flux
FLOW = {"sd3": SD3Config, "flux": FluxPipelineConfig}  # families that are trained by flow matching


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
    return FLOW[pipeline.family].of(pipeline)


def build(cfg: AnyConfig, key: PRNGKeyArray) -> AnyPipeline:
    """Return all networks of a pipeline with random parameters."""
    if isinstance(cfg, SD3Config):
        return StableDiffusion3(cfg, key=key)
    if isinstance(cfg, FluxPipelineConfig):
        return Flux(cfg, key=key)
    return StableDiffusion(cfg, key=key)


def parts(pipeline: Pipeline, cfg: AnyConfig) -> tuple[Part, ...]:
    """Return the parts of a pipeline, which fill its parameters and which an export writes."""
    if isinstance(cfg, SD3Config):
        return stable_diffusion_3.parts(pipeline, cfg)
    if isinstance(cfg, FluxPipelineConfig):
        return flux.parts(pipeline, cfg)
    return stable_diffusion.parts(pipeline, cfg)
