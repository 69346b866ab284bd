"""Tiny random pipelines of FLUX.2 klein as diffusers saves them: the base and the distilled."""

import torch
from diffusers import (
    AutoencoderKLFlux2,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
)
from transformers import Qwen3Config, Qwen3ForCausalLM

from tests.tiny_pipelines import shaken
from tests.tiny_zimage import QWEN, make_qwen_tokenizer

TRANSFORMER = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
VAE = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "sample_size": 16,
}


def make_flux2_vae():
    """A random VAE whose statistics are off zero and one."""
    torch.manual_seed(3)
    made = shaken(AutoencoderKLFlux2(**VAE))
    made.bn.running_mean.copy_(0.3 * torch.randn(16))
    made.bn.running_var.copy_(0.5 + torch.rand(16))
    made.bn.num_batches_tracked.fill_(7)
    return made.eval()


def calmed(denoiser):
    """Modulations of all blocks are one, so that shaken weights would change all of a picture."""
    with torch.no_grad():
        for name, tensor in denoiser.named_parameters():
            tensor.mul_(0.2 if "modulation" in name or "timestep_embedder" in name else 1.0)
    return denoiser


def make_klein(kind="base", dynamic=True, **transformer):
    """A Flux2KleinPipeline with a Qwen 3 of 28 narrow layers; saves nothing."""
    torch.manual_seed(0)
    tokenizer, words = make_qwen_tokenizer()
    qwen = {**QWEN, "vocab_size": words, "num_hidden_layers": 28}
    qwen |= {"hidden_size": 8, "intermediate_size": 8, "head_dim": 4}
    return Flux2KleinPipeline(
        transformer=calmed(shaken(Flux2Transformer2DModel(**{**TRANSFORMER, **transformer}))),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        vae=make_flux2_vae(),
        text_encoder=shaken(Qwen3ForCausalLM(Qwen3Config(**qwen))),
        tokenizer=tokenizer,
        is_distilled=kind == "distilled",
    )
