"""Tiny random autoencoders as diffusers and transformers save them, images, and their config."""

from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from transformers import JanusVQVAE, JanusVQVAEConfig

from jaxft.core.config import load_config
from jaxft.tasks import OPTIONS
from tests.tiny_pipelines import shaken

CONFIG = str(Path(__file__).resolve().parents[1] / "configs" / "autoencoder.py")
SIZE = 32


def make_vae(folder):
    torch.manual_seed(0)
    vae = AutoencoderKL(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        sample_size=SIZE,
    )
    shaken(vae).save_pretrained(folder)
    (folder / "LICENSE").write_text("free\n")
    return folder


def make_vqmodel(folder, codes=16):
    torch.manual_seed(0)
    vq = VQModel(
        block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
        up_block_types=("AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
        num_vq_embeddings=codes,
        vq_embed_dim=4,
        latent_channels=4,
        sample_size=SIZE,
    )
    return _spread(vq, folder)


def make_janus(folder, codes=16):
    torch.manual_seed(0)
    config = JanusVQVAEConfig(
        embed_dim=4,
        num_embeddings=codes,
        latent_channels=8,
        base_channels=64,  # two a group: alone in its group a channel's bias has no gradient
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        num_patches=SIZE // 2,
        initializer_range=0.04,
    )
    return _spread(JanusVQVAE(config), folder)


def _spread(vq, folder):
    """Codes are so far apart that rounding chooses no other one."""
    shaken(vq)
    with torch.no_grad():
        vq.quantize.embedding.weight.normal_()
    vq.save_pretrained(folder)
    return folder


def make_images(folder, count=8, size=SIZE):
    """Smooth colours, each image another."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def changes_of(model, images, changes=()):
    """Flat keys of configs/autoencoder.py for a small run."""
    small = {
        "model": str(model),
        "data.train": f"folder:{images}",
        "data.eval": f"folder:{images}",
        "resolution": SIZE,
        "total": "5_steps",
        "batch_size": 8,
        "trainable": ".*",
        "loss.perceptual": 0.0,
        "mesh.fsdp": 1,
    }
    return {**small, **dict(changes)}


def make_config(model, images, changes=()):
    keys = changes_of(model, images, changes).items()
    return load_config(CONFIG, [(key, str(value)) for key, value in keys], OPTIONS)
