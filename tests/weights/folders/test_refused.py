"""Pipelines and single files of other models: each named in one line, with what to give instead."""

from pathlib import Path

import pytest

from jaxft.core.errors import UserError
from jaxft.weights.folders.refused import check_index, check_keys

CLIP = ["transformers", "CLIPTextModel"]
PROJECTED = ["transformers", "CLIPTextModelWithProjection"]
UNET, VAE, NONE = (
    ["diffusers", "UNet2DConditionModel"],
    ["diffusers", "AutoencoderKL"],
    [None, None],
)
WHOLE = {
    "_class_name": "StableDiffusionPipeline",
    "unet": UNET,
    "vae": VAE,
    "text_encoder": CLIP,
    "safety_checker": NONE,
}
T5 = ["transformers", "T5EncoderModel"]
FLUX = {
    "_class_name": "FluxPipeline",
    "transformer": ["diffusers", "FluxTransformer2DModel"],
    "vae": VAE,
    "text_encoder": CLIP,
    "text_encoder_2": T5,
}
ZIMAGE = {
    "_class_name": "ZImagePipeline",
    "transformer": ["diffusers", "ZImageTransformer2DModel"],
    "vae": VAE,
    "text_encoder": ["transformers", "Qwen3Model"],
}
KLEIN = {
    "_class_name": "Flux2KleinPipeline",
    "transformer": ["diffusers", "Flux2Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKLFlux2"],
    "text_encoder": ["transformers", "Qwen3ForCausalLM"],
}
XL = {**WHOLE, "_class_name": "StableDiffusionXLPipeline", "text_encoder_2": PROJECTED}


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({**WHOLE, "vae": NONE}, "names no vae .*null counts as none"),
        ({**WHOLE, "vae": None}, "names no vae"),
        ({**WHOLE, "text_encoder": NONE}, "names no text_encoder"),
        ({**XL, "text_encoder": NONE}, "only text_encoder_2, as the SDXL refiner has"),
        ({**XL, "text_encoder_2": NONE}, "only text_encoder, as the SDXL refiner has"),
        ({**WHOLE, "_class_name": "StableDiffusionDepth2ImgPipeline"}, "takes a depth map"),
        ({**WHOLE, "_class_name": "StableUnCLIPPipeline"}, "an unCLIP model"),
        ({**WHOLE, "text_encoder": ["x", "RobertaSeriesModel"]}, "only CLIP text encoders"),
        ({"_class_name": "PixArtPipeline", "transformer": ["d", "PixArt"]}, "this is PixArt"),
        (
            {**FLUX, "_class_name": "FluxKontextPipeline"},
            "other inputs than a caption",
        ),
        ({**FLUX, "text_encoder_2": CLIP}, "text_encoder_2 is a CLIPTextModel; .* a T5EncoderMod"),
        ({**FLUX, "text_encoder_2": NONE}, "names no text_encoder_2 .*with all of them"),
        ({**FLUX, "vae": NONE}, "names no vae"),
        ({**ZIMAGE, "_class_name": "ZImageOmniPipeline"}, "Z-Image .*give a ZImagePipeline"),
        ({**ZIMAGE, "text_encoder": T5}, "text_encoder is a T5.*; .* a Qwen3Model there"),
        ({**KLEIN, "_class_name": "Flux2Pipeline"}, "another text encoder.*a Flux2KleinPipeline"),
        ({**KLEIN, "vae": VAE}, "vae is a AutoencoderKL; .* a AutoencoderKLFlux2 there"),
        ({**KLEIN, "vae": NONE}, "names no vae"),
        ({**ZIMAGE, "text_encoder": NONE}, "names no text_encoder"),
        ({}, "names no text_encoder, unet, vae"),
    ],
)
def test_pipelines_that_cannot_be_trained(index, words):
    with pytest.raises(UserError, match=rf"^a/model_index\.json: .*{words}") as caught:
        check_index(index, Path("a/model_index.json"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("index", [WHOLE, XL, FLUX, KLEIN, ZIMAGE])
def test_pipelines_that_can(index):
    check_index(index, Path("a/model_index.json"))


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("distilled_guidance_layer.norms.0.scale", "Chroma"),
        ("control_layers.0.attention.qkv.weight", "ControlNet of Z-Image"),
        ("conditioner.embedders.0.model.ln_final.weight", "SDXL refiner.*SDXL base"),
        ("edm_mean", "playground"),
        ("edm_vpred.sigma_max", "CosXL"),
        ("model.diffusion_model.time_embed.cond_proj.weight", "latent consistency"),
        ("model.diffusion_model.scaled_fp8", "scaled or quantised"),
        ("model.diffusion_model.out.2.scale_weight", "scaled or quantised"),
        ("control_model.time_embed.0.weight", "ControlNet"),
        ("unet.down_blocks.0.attn1.to_q.lora_A.weight", "a LoRA"),
    ],
)
def test_single_files_that_cannot_be_trained(key, words):
    with pytest.raises(UserError, match=f"^a.safetensors: this is .*{words}"):
        check_keys([key, "first_stage_model.quant_conv.bias"], Path("a.safetensors"))
    check_keys(["model_ema.decay", "denoiser.sigmas", "v_pred"], Path("a.safetensors"))
