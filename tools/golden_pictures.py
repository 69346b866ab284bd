"""A small Stable Diffusion pipeline and a VQ tokenizer with random weights, written by NumPy.

The configs are those of the demo pipeline with smaller sizes. Tensors have diffusers' names.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

ROOT = Path(__file__).resolve().parent.parent
WIDTHS, TIME, TEXT = (16, 32), 64, 32  # channels of the UNet's two levels, and its conditioning
SMALL, LARGE, LATENTS, CODES = 8, 16, 4, 32  # channels of an autoencoder's two levels

UNET = {
    "block_out_channels": list(WIDTHS),
    "cross_attention_dim": TEXT,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "norm_num_groups": 8,
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
}
AUTOENCODER = {
    "block_out_channels": [SMALL, LARGE],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "sample_size": 32,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
CLIP = {
    "hidden_size": TEXT,
    "intermediate_size": 2 * TEXT,
    "num_attention_heads": 4,
    "num_hidden_layers": 1,
    "projection_dim": TEXT,
}
VQ = {
    **AUTOENCODER,
    "_class_name": "VQModel",
    "latent_channels": LATENTS,
    "layers_per_block": 1,
    "num_vq_embeddings": CODES,
    "vq_embed_dim": LATENTS,
}


class Shapes(dict[str, tuple[int, ...]]):
    """Tensors' shapes by name, layer by layer."""

    def norm(self, name: str, width: int) -> None:
        self[f"{name}.weight"] = self[f"{name}.bias"] = (width,)

    def linear(self, name: str, width: int, out: int, bias: bool = True) -> None:
        self[f"{name}.weight"] = (out, width)
        if bias:
            self[f"{name}.bias"] = (out,)

    def conv(self, name: str, width: int, out: int, kernel: int = 3) -> None:
        self[f"{name}.weight"] = (out, width, kernel, kernel)
        self[f"{name}.bias"] = (out,)

    def resnet(self, name: str, width: int, out: int, time: int = 0) -> None:
        self.norm(f"{name}.norm1", width)
        self.conv(f"{name}.conv1", width, out)
        if time:
            self.linear(f"{name}.time_emb_proj", time, out)
        self.norm(f"{name}.norm2", out)
        self.conv(f"{name}.conv2", out, out)
        if width != out:
            self.conv(f"{name}.conv_shortcut", width, out, kernel=1)

    def transformer(self, name: str, width: int) -> None:
        """A UNet's attention block: to itself, to the text, and a gated feed-forward."""
        self.norm(f"{name}.norm", width)
        self.conv(f"{name}.proj_in", width, width, kernel=1)
        block = f"{name}.transformer_blocks.0"
        for i, source in ((1, width), (2, TEXT)):
            self.linear(f"{block}.attn{i}.to_q", width, width, bias=False)
            self.linear(f"{block}.attn{i}.to_k", source, width, bias=False)
            self.linear(f"{block}.attn{i}.to_v", source, width, bias=False)
            self.linear(f"{block}.attn{i}.to_out.0", width, width)
        for i in (1, 2, 3):
            self.norm(f"{block}.norm{i}", width)
        self.linear(f"{block}.ff.net.0.proj", width, 8 * width)
        self.linear(f"{block}.ff.net.2", 4 * width, width)
        self.conv(f"{name}.proj_out", width, width, kernel=1)

    def middle(self, name: str, width: int) -> None:
        """An autoencoder's middle block."""
        for i in (0, 1):
            self.resnet(f"{name}.resnets.{i}", width, width)
        self.norm(f"{name}.attentions.0.group_norm", width)
        for part in ("to_q", "to_k", "to_v", "to_out.0"):
            self.linear(f"{name}.attentions.0.{part}", width, width)


def write_pipeline(folder: Path) -> None:
    """Write a diffusers folder of all parts in fp32."""
    (source,) = (file.parent for file in ROOT.rglob("emoji-sd/model_index.json"))
    parts: dict[str, tuple[dict[str, Any], Shapes, str]] = {
        "unet": (UNET, _unet(), "diffusion_pytorch_model"),
        "vae": (AUTOENCODER, _autoencoder(2 * LATENTS), "diffusion_pytorch_model"),
        "text_encoder": (CLIP, _clip(), "model"),
    }
    for name, (changes, shapes, stem) in parts.items():
        config = json.loads((source / name / "config.json").read_text())
        _write_model(folder / name, {**config, **changes}, shapes, stem)
    for name in ("scheduler", "tokenizer"):
        shutil.copytree(source / name, folder / name)
    shutil.copy(source / "model_index.json", folder)


def write_vq(folder: Path) -> None:
    """Write the folder of a VQModel in fp32."""
    shapes = _autoencoder(LATENTS)
    shapes["quantize.embedding.weight"] = (CODES, LATENTS)
    _write_model(folder, VQ, shapes, "diffusion_pytorch_model")


def _unet() -> Shapes:
    shapes, (low, high) = Shapes(), WIDTHS
    shapes.conv("conv_in", LATENTS, low)
    shapes.linear("time_embedding.linear_1", low, TIME)
    shapes.linear("time_embedding.linear_2", TIME, TIME)
    shapes.resnet("down_blocks.0.resnets.0", low, low, TIME)
    shapes.conv("down_blocks.0.downsamplers.0.conv", low, low)
    shapes.resnet("down_blocks.1.resnets.0", low, high, TIME)
    shapes.transformer("down_blocks.1.attentions.0", high)
    for i in (0, 1):
        shapes.resnet(f"mid_block.resnets.{i}", high, high, TIME)
    shapes.transformer("mid_block.attentions.0", high)
    for i, skip in enumerate((high, low)):
        shapes.resnet(f"up_blocks.0.resnets.{i}", high + skip, high, TIME)
        shapes.transformer(f"up_blocks.0.attentions.{i}", high)
    shapes.conv("up_blocks.0.upsamplers.0.conv", high, high)
    shapes.resnet("up_blocks.1.resnets.0", high + low, low, TIME)
    shapes.resnet("up_blocks.1.resnets.1", low + low, low, TIME)
    shapes.norm("conv_norm_out", low)
    shapes.conv("conv_out", low, LATENTS)
    return shapes


def _autoencoder(moments: int) -> Shapes:
    """moments: channels that the encoder gives, 2 x latents of a VAE."""
    shapes = Shapes()
    shapes.conv("encoder.conv_in", 3, SMALL)
    shapes.resnet("encoder.down_blocks.0.resnets.0", SMALL, SMALL)
    shapes.conv("encoder.down_blocks.0.downsamplers.0.conv", SMALL, SMALL)
    shapes.resnet("encoder.down_blocks.1.resnets.0", SMALL, LARGE)
    shapes.middle("encoder.mid_block", LARGE)
    shapes.norm("encoder.conv_norm_out", LARGE)
    shapes.conv("encoder.conv_out", LARGE, moments)
    shapes.conv("quant_conv", moments, moments, kernel=1)
    shapes.conv("post_quant_conv", LATENTS, LATENTS, kernel=1)
    shapes.conv("decoder.conv_in", LATENTS, LARGE)
    shapes.middle("decoder.mid_block", LARGE)
    for i in (0, 1):
        shapes.resnet(f"decoder.up_blocks.0.resnets.{i}", LARGE, LARGE)
        shapes.resnet(f"decoder.up_blocks.1.resnets.{i}", SMALL if i else LARGE, SMALL)
    shapes.conv("decoder.up_blocks.0.upsamplers.0.conv", LARGE, LARGE)
    shapes.norm("decoder.conv_norm_out", SMALL)
    shapes.conv("decoder.conv_out", SMALL, 3)
    return shapes


def _clip() -> Shapes:
    shapes = Shapes()
    shapes["text_model.embeddings.token_embedding.weight"] = (4096, TEXT)
    shapes["text_model.embeddings.position_embedding.weight"] = (24, TEXT)
    layer = "text_model.encoder.layers.0"
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        shapes.linear(f"{layer}.self_attn.{name}", TEXT, TEXT)
    shapes.linear(f"{layer}.mlp.fc1", TEXT, 2 * TEXT)
    shapes.linear(f"{layer}.mlp.fc2", 2 * TEXT, TEXT)
    for name in (f"{layer}.layer_norm1", f"{layer}.layer_norm2", "text_model.final_layer_norm"):
        shapes.norm(name, TEXT)
    return shapes


def _write_model(folder: Path, config: Mapping[str, Any], shapes: Shapes, stem: str) -> None:
    folder.mkdir(parents=True)
    write_json(folder / "config.json", config)
    rng = np.random.default_rng(3)
    tensors = {name: _draw(rng, name, shape) for name, shape in sorted(shapes.items())}
    save_file(tensors, folder / f"{stem}.safetensors", {"format": "pt"})


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Return normal numbers, by 1 / sqrt(fan-in) where there is one; a norm's scale is near 1."""
    drawn = rng.standard_normal(shape)
    if len(shape) == 1:
        return (0.1 * drawn + float("norm" in name and name.endswith("weight"))).astype(np.float32)
    fan_in = 1.0 if "embed" in name and len(shape) == 2 else np.prod(shape[1:])
    return (drawn / np.sqrt(fan_in)).astype(np.float32)


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a readable JSON file."""
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
