"""Published image folders, JSON files as they were published, with the PyTorch classes as judges.

Full shapes are compared on torch's meta device and by jax.eval_shape: nothing is allocated.
"""

import json
import warnings

import diffusers
import jax
import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformers import CLIPTextConfig as HFText
from transformers import CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.models.pipelines import families
from jaxft.models.text_encoders.clip import TRUE_EOS
from jaxft.tasks.autoencoder.codec import open_codec
from jaxft.weights.folders.diffusers import open_component, open_pipeline
from jaxft.weights.folders.transformers import Source
from tests.published_pipelines import FOLDERS, PUBLISHED, VAES, open_published, pipelines

REFUSED = {
    "stable-diffusion-xl-refiner-1.0": r"SDXL refiner has, .* give the SDXL base",
    "playground-v2.5-1024px-aesthetic": r"EDMDPM\w+ has no DDPM betas .*playground.* give",
    "Kolors": r"this is Kolors, whose text_encoder is a ChatGLMModel; .* give",
    "stable-diffusion-x4-upscaler": r"Upscale\w+ is an upscaler, .* give",
    "Chroma": r"this is Chroma \(FluxPipeline with a Chroma\w+\).* give",
}
ALONE = ("LCM_Dreamshaper_v7",)  # of which only the UNet's config was collected
SD3 = "stable-diffusion-3-medium-diffusers"
FLUX = ("FLUX.1-dev", "FLUX.1-schnell")
FLOW = (SD3, *FLUX)
SUPPORTED = [name for name in FOLDERS if name not in (*REFUSED, *ALONE, *FLOW)]  # DDPM's noise


class Meta:
    """The tensors of PyTorch modules on the meta device, as a checkpoint."""

    def __init__(self, module):
        tied = "encoder.embed_tokens.weight"  # of T5, a second name that no file has
        tensors = {key: t for key, t in module.state_dict().items() if key != tied}
        self._shapes = {key: tuple(t.shape) for key, t in tensors.items()}

    def keys(self):
        return list(self._shapes)

    def info(self, key):
        return self._shapes[key], np.dtype(np.float16)

    def read(self, key):
        raise AssertionError("the meta device holds no numbers")


def published(name, file):
    return json.loads((PUBLISHED / name / file).read_text())


def stock(name, component):
    """The PyTorch module that diffusers makes of a component's config, on the meta device."""
    config = published(name, f"{component}/config.json")
    with torch.device("meta"):
        if component == "unet":
            return UNet2DConditionModel.from_config(config)
        if component == "vae":
            return AutoencoderKL.from_config(config)
        if component == "transformer":
            cls = FluxTransformer2DModel if name in FLUX else SD3Transformer2DModel
            return cls.from_config(config)
        if config.get("model_type") == "t5":
            return T5EncoderModel(T5Config.from_dict(config))
        projects = published(name, "model_index.json")[component][1].endswith("Projection")
        cls = CLIPTextModelWithProjection if projects else CLIPTextModel
        return cls(HFText.from_dict(config))


# One of each set of shapes: the other SD 1 folders have those of the first.
@pytest.mark.parametrize(
    "name",
    [
        "stable-diffusion-v1-4",
        "stable-diffusion-inpainting",
        "stable-diffusion-2-1",
        "stable-diffusion-xl-base-1.0",
        *FLOW,
    ],
)
def test_full_shapes_are_those_of_the_pytorch_classes(name):
    pipe, cfg = open_pipeline(str(PUBLISHED / name), weights=False), open_published(name)
    leaves = describe(jax.eval_shape(lambda: families.build(cfg, jax.random.key(0))))
    made = set()
    for part in families.parts(pipe, cfg):
        tensors = Meta(stock(name, part.folder))
        entries = part._replace(tensors=tensors).entries(leaves)  # which checks every shape
        made |= {entry.path for entry in entries}
        assert sum(len(entry.keys) for entry in entries) == len(tensors.keys())
    assert made == set(leaves)


@pytest.mark.parametrize("name", SUPPORTED)
def test_case_img_17_every_field_is_read_as_diffusers_reads_it(name):
    cfg = open_published(name)
    unet = UNet2DConditionModel.load_config(PUBLISHED / name / "unet")
    assert cfg.unet == UNetConfig.from_hf(unet)
    vae = AutoencoderKL.from_config({**published(name, "vae/config.json"), **TINY_VAE}).config
    assert cfg.vae.scaling_factor == vae.scaling_factor
    assert cfg.vae.mean == (0.0,) and cfg.vae.std == (1.0,)
    assert not (vae.shift_factor or vae.latents_mean or vae.latents_std)
    read = (cfg.vae.force_upcast, cfg.vae.mid_attention, cfg.vae.quant_conv)
    assert read == (vae.force_upcast, vae.mid_block_add_attention, vae.use_quant_conv)
    assert cfg.vae.post_quant_conv == vae.use_post_quant_conv
    for component, text in zip(("text_encoder", "text_encoder_2"), cfg.texts, strict=False):
        theirs = HFText.from_dict(published(name, f"{component}/config.json"))
        assert (text.hidden_act, text.layer_norm_eps) == (theirs.hidden_act, theirs.layer_norm_eps)
        assert text.eos_token_id == theirs.eos_token_id == 2 and text.takes_highest_id
        assert theirs.vocab_size - 1 == TRUE_EOS  # which is the highest id, and the true end
        projects = component == "text_encoder_2"
        assert text.projection_dim == (theirs.projection_dim if projects else None)


TINY_VAE = {
    "block_out_channels": [32],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
}


@pytest.mark.parametrize("name", SUPPORTED)
def test_schedules_are_those_of_the_pipeline(name):
    index = published(name, "model_index.json")
    config = published(name, "scheduler/scheduler_config.json")
    scheduler = getattr(diffusers, config["_class_name"]).from_config(config)
    cls = getattr(diffusers, index["_class_name"])
    parts = {key: None for key, entry in index.items() if isinstance(entry, list)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = cls(**{**parts, "scheduler": scheduler}, **extras(index)).scheduler
    ours = open_published(name).schedule
    np.testing.assert_allclose(ours.alphas_bar, theirs.alphas_cumprod, rtol=2e-5)
    assert ours.prediction == theirs.config.prediction_type
    ddim = DDIMScheduler.from_config(theirs.config)
    assert ours.steps_offset == ddim.config.steps_offset
    assert ours.clip == (ddim.config.clip_sample_range if ddim.config.clip_sample else np.inf)
    assert ours.set_alpha_to_one == ddim.config.set_alpha_to_one
    assert ours.zero_snr == ddim.config.rescale_betas_zero_snr
    assert ours.spacing == config.get("timestep_spacing")
    assert ours.trained_betas is None is ddim.config.trained_betas


def test_sd3_is_read_as_diffusers_reads_it():
    cfg = open_published(SD3)
    vae = AutoencoderKL.from_config({**published(SD3, "vae/config.json"), **TINY_VAE}).config
    assert (cfg.vae.scaling_factor, cfg.vae.mean) == (vae.scaling_factor, (vae.shift_factor,))
    assert (cfg.vae.quant_conv, cfg.vae.post_quant_conv) == (False, False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        published(SD3, "scheduler/scheduler_config.json")
    )
    scheduler.set_timesteps(28)
    ours = cfg.process().sampler("euler", 28, (128, 128)).steps.timestep
    np.testing.assert_allclose(ours, scheduler.sigmas[:-1], atol=1e-6)
    assert [text.max_positions for text in cfg.texts] == [77, 77, 256]
    first, second, _ = cfg.texts
    assert (first.projection_dim, second.projection_dim) == (768, 1280)


@pytest.mark.parametrize("name", FLUX)
def test_flux_is_read_as_diffusers_reads_it(name):
    cfg, dev = open_published(name), name == "FLUX.1-dev"
    vae = AutoencoderKL.from_config({**published(name, "vae/config.json"), **TINY_VAE}).config
    assert (cfg.vae.scaling_factor, cfg.vae.mean) == (vae.scaling_factor, (vae.shift_factor,))
    assert (cfg.vae.quant_conv, cfg.vae.post_quant_conv) == (False, False)
    scheduler = FlowMatchEulerDiscreteScheduler.from_config(
        published(name, "scheduler/scheduler_config.json")
    )
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 4, 4), mu=calculate_shift(64 * 64))
    ours = cfg.process().sampler("euler", 4, (128, 128)).steps.timestep
    np.testing.assert_allclose(ours, scheduler.sigmas[:-1], atol=1e-6)
    assert [text.max_positions for text in cfg.texts] == [77, 512 if dev else 256]
    assert cfg.texts[0].projection_dim is None and cfg.transformer.guidance is dev
    assert bool(cfg.distilled) is not dev and cfg.drawing == ((28, 3.5) if dev else (4, 0.0))
    assert cfg.multiple == 16


def extras(index):
    return {} if "XL" in index["_class_name"] else {"requires_safety_checker": False}


@pytest.mark.parametrize("name", REFUSED)
def test_other_folders_are_refused_by_name_with_what_to_do(name):
    with pytest.raises(UserError, match=REFUSED[name]) as caught:
        open_published(name)
    assert "\n" not in str(caught.value) and name in str(caught.value)


def test_a_latent_consistency_unet_is_refused_by_name():
    with pytest.raises(UserError, match=r"time_cond_proj_dim=256.*latent consistency.*LoRA on"):
        UNetConfig.from_hf(published("LCM_Dreamshaper_v7", "unet/config.json"))


@pytest.mark.parametrize("name", VAES)
def test_published_vaes_open_in_the_autoencoder_task(name):
    source = open_component(str(PUBLISHED / name), "vae", weights=False)
    codec = open_codec(source.config, "config.json")
    template = jax.eval_shape(lambda: codec.module(codec.cfg, key=jax.random.key(0)))
    leaves = {f"vae.{path}": leaf for path, leaf in describe(template).items()}
    with torch.device("meta"):
        stock = AutoencoderKL.from_config(source.config)
    part = codec.part(Source(name, source.config, Meta(stock), {}))
    assert {entry.path for entry in part.entries(leaves)} == set(leaves)
    assert codec.cfg.scaling_factor == stock.config.scaling_factor


def test_the_table_has_a_row_for_each_folder():
    rows = pipelines()
    assert {row.checkpoint for row in rows} == {*FOLDERS, *VAES}
    refused = {row.checkpoint for row in rows if row.works == "refused"}
    assert refused == {*REFUSED, *ALONE}
    assert all(str(PUBLISHED) not in row.note for row in rows)
