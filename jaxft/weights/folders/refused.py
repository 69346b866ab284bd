"""Refusal of pipelines and single files that jaxft cannot train. The error names the model."""

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError

GIVE = "give a Stable Diffusion 1.x, 2.x, XL or 3.x model, FLUX.1, FLUX.2 klein or Z-Image"
# Models by the start of the class name of their transformer.
TRANSFORMERS = {"Chroma": "Chroma"}
# Pipelines with a UNet of another kind, by a part of their class name.
UNETS = {
    "Upscale": "an upscaler, whose UNet takes a low-resolution picture and its noise level",
    "Depth2Img": "a depth-to-image model, whose UNet takes a depth map",
    "UnCLIP": "an unCLIP model, whose UNet takes the embedding of a picture",
    "ImageVariation": "an image-variation model, which has no text encoder",
    "GLIGEN": "a GLIGEN model, whose UNet takes boxes",
}
# Text encoders of transformer pipelines, by their folders. A class may have several names.
SD3_TEXTS = {
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "text_encoder_3": ("T5EncoderModel",),
}
FLUX_TEXTS = {"text_encoder": ("CLIPTextModel",), "text_encoder_2": ("T5EncoderModel",)}
ZIMAGE_TEXTS = {"text_encoder": ("Qwen3Model", "Qwen3ForCausalLM")}
KLEIN_PARTS = {
    "text_encoder": ("Qwen3ForCausalLM", "Qwen3Model"),
    "vae": ("AutoencoderKLFlux2",),
}
# Pipelines of a caption alone, by the class of their transformer: model, class and other parts.
CAPTIONED = {
    "FluxTransformer2DModel": ("FLUX.1", "FluxPipeline", FLUX_TEXTS),
    "Flux2Transformer2DModel": ("FLUX.2", "Flux2KleinPipeline", KLEIN_PARTS),
    "ZImageTransformer2DModel": ("Z-Image", "ZImagePipeline", ZIMAGE_TEXTS),
}
# Single files of other kinds, by a key that only they have. The first match counts.
REFUSED_KEYS = {
    r".*(lora_(up|down|[AB])\b|lora_unet_|lora_te).*": "a LoRA; give the model that it lies on",
    r"(.*\.)?(scaled_fp8|scale_weight|weight_scale|comfy_quant)": "a checkpoint with scaled or"
    " quantised weights; give its fp16 or plain fp8 version",
    r"(.*\.)?distilled_guidance_layer\..*": "Chroma, a diffusion transformer that is not supported"
    f" yet; {GIVE}",
    r"(.*\.)?control_layers\..*": "a ControlNet of Z-Image; give the model that it steers",
    r"edm_(mean|std)": "playground-v2.5, whose EDM noise is not supported; " + GIVE,
    r"edm_vpred\..*": "a CosXL model, whose EDM noise is not supported; " + GIVE,
    r"control_model\..*": "a ControlNet; give the Stable Diffusion model that it steers",
    r"conditioner\.embedders\.0\.model\..*": "the SDXL refiner, which is not supported; give the"
    " SDXL base model",
    r"model\.diffusion_model\.time_embed\.cond_proj\..*": "a latent consistency model; train a"
    " LoRA on the model that it was distilled from",
}


def check_index(index: Mapping[str, Any], where: Path) -> None:
    """Raise UserError for a model_index.json of a pipeline that jaxft cannot train.

    The error names the model, the reason, and the model to give instead.
    """
    name = index.get("_class_name", "")
    pairs = {key: e for key, e in index.items() if isinstance(e, list) and len(e) == 2}
    classes = {key: cls for key, (_, cls) in pairs.items() if isinstance(cls, str)}
    if classes.get("transformer") == "SD3Transformer2DModel":
        _check_parts(classes, SD3_TEXTS, "text_encoder_3", name, where)
        return
    if classes.get("transformer", "") in CAPTIONED:
        model, wanted, parts = CAPTIONED[classes["transformer"]]
        if name != wanted:
            raise UserError(
                f"{where}: {name} is a {model} pipeline with other inputs than a caption, or with"
                f" another text encoder, which is not supported; give a {wanted}"
            )
        _check_parts(classes, parts, "", name, where)
        return
    if "unet" not in classes and (found := classes.get("transformer")):
        model = next((m for start, m in TRANSFORMERS.items() if found.startswith(start)), found)
        raise UserError(
            f"{where}: this is {model} ({name} with a {found}), a diffusion transformer, which is"
            f" not supported yet; {GIVE}"
        )
    if kind := next((text for part, text in UNETS.items() if part in name), None):
        raise UserError(f"{where}: {name} is {kind}, which is not supported; {GIVE}")
    for key in ("text_encoder", "text_encoder_2"):
        if (found := classes.get(key, "CLIP")) and not found.startswith("CLIP"):
            model = "Kolors" if found == "ChatGLMModel" else name
            raise UserError(
                f"{where}: this is {model}, whose {key} is a {found}; only CLIP text encoders are"
                f" supported, so {GIVE}"
            )
    encoders = {"text_encoder", "text_encoder_2"} & classes.keys()
    if "XL" in name and "unet" in classes and len(encoders) == 1:
        raise UserError(
            f"{where}: {name} has only {encoders.pop()}, as the SDXL refiner has, which is not"
            " supported; give the SDXL base model, which has two text encoders"
        )
    if missing := sorted({"unet", "vae", "text_encoder"} - classes.keys()):
        raise UserError(
            f"{where}: {name} names no {', '.join(missing)} (null counts as none); expected a"
            " StableDiffusionPipeline or StableDiffusionXLPipeline with all of them"
        )


def _check_parts(
    classes: Mapping[str, str],
    texts: Mapping[str, tuple[str, ...]],
    free: str,
    name: str,
    where: Path,
) -> None:
    """Raise UserError for a pipeline without its VAE and `texts`, of which `free` may be absent."""
    for key, known in texts.items():
        if (found := classes.get(key, known[0])) not in known:
            raise UserError(f"{where}: {key} is a {found}; {name} has a {known[0]} there")
    if missing := sorted({"vae", *texts} - classes.keys() - {free}):
        rest = f"; only {free} may be null" if free else "; give a folder with all of them"
        raise UserError(
            f"{where}: {name} names no {', '.join(missing)} (null counts as none){rest}"
        )


def check_keys(names: Collection[str], path: Path) -> None:
    """Raise UserError for a single file whose keys belong to a model that jaxft cannot train."""
    for pattern, kind in REFUSED_KEYS.items():
        if any(re.fullmatch(pattern, name) for name in names):
            raise UserError(f"{path}: this is {kind}")
