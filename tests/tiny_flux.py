"""Tiny random pipelines of FLUX.1 as diffusers saves them: dev and schnell."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from tests.tiny_pipelines import make_tokenizer, shaken, text_encoder
from tests.tiny_sd3 import make_flow_vae, make_t5, make_t5_tokenizer, sharpened

TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 48,
    "pooled_projection_dim": 16,
    "axes_dims_rope": (4, 2, 2),
}
SCHEDULERS = {
    "dev": {"use_dynamic_shifting": True, "shift": 3.0},
    "schnell": {"use_dynamic_shifting": False, "shift": 1.0},
}
# The length of a caption for T5 that FLUX.1-schnell was trained with; the pipeline's is 512.
LENGTHS = {"dev": 512, "schnell": 256}


def make_flux(work, kind="dev", **transformer):
    """A FluxPipeline; saves nothing but a tokenizer's files."""
    torch.manual_seed(0)
    tokenizer, vocab = make_tokenizer(work / "tokens")
    second, words = make_t5_tokenizer()
    config = {**TRANSFORMER, "guidance_embeds": kind == "dev", **transformer}
    return FluxPipeline(
        transformer=sharpened(shaken(FluxTransformer2DModel(**config))),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULERS[kind]),
        vae=shaken(make_flow_vae(0.3611, 0.1159)),
        text_encoder=text_encoder(vocab),
        tokenizer=tokenizer,
        text_encoder_2=make_t5(words),
        tokenizer_2=second,
    )
