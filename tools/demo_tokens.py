"""Train the demo image-token model from nothing by jaxft's own commands: its VQ, then its language.

Each stage is one run of `python -m jaxft.train` in OUT; a stage that was stopped goes on. Two CPU
cores need about three quarters of an hour for the VQ tokenizer, half an hour for the language.
"""

import json
import shutil
from pathlib import Path

from demo_weights import DEMO, train

VQ = {
    "architectures": ["JanusVQVAE"],
    "base_channels": 32,
    "channel_multiplier": [1, 2, 2],
    "double_latent": False,
    "dropout": 0.0,
    "embed_dim": 8,
    "in_channels": 3,
    "initializer_range": 0.02,
    "latent_channels": 64,
    "model_type": "janus_vqgan",
    "num_embeddings": 512,
    "num_patches": 16,
    "num_res_blocks": 1,
    "out_channels": 3,
    "torch_dtype": "float32",
}
LANGUAGE = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 4094,
    "eos_token_id": 4095,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 160,
    "intermediate_size": 416,
    "max_position_embeddings": 288,
    "model_type": "llama",
    "num_attention_heads": 5,
    "num_hidden_layers": 4,
    "num_key_value_heads": 5,
    "pad_token_id": 4095,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "vocab_size": 4096,
}
VQ_RUN = {
    "trainable": r"vae\..*",
    "total": "700_steps",
    "batch_size": 8,
    "loss.l1": 0.5,
    "loss.l2": 2.0,
    "loss.perceptual": 0.0,
    "optim.lr": 3e-3,
    "optim.warmup": "30_steps",
}
# The first run leaves a quarter of the codes unused: the second pulls them back.
AGAIN = {**VQ_RUN, "total": "1000_steps", "optim.lr": 2e-3, "loss.revive": 1.0}
# The language model's runs, one after another, by the pictures that they see.
TOKENS_RUNS = {
    "places": {"total": "1600_steps", "optim.lr": 2e-3, "optim.warmup": "50_steps"},
    "styles": {"total": "1200_steps", "optim.lr": 1.5e-3, "optim.warmup": "50_steps"},
    "still": {"total": "320_steps", "optim.lr": 1.5e-3, "optim.warmup": "20_steps"},
    "said": {"total": "1200_steps", "optim.lr": 1e-3, "optim.warmup": "20_steps"},
}
FRESH = {"init": "random", "max_caption_tokens": 20}
EVERY = {"batch_size": 16, "optim.weight_decay": 0.05, "data.eval": "", "export.dtype": "bfloat16"}
CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-to-image
---

# emoji-tokens: a toy image-token model (DALL-E style) for demos and tests

64x64 emoji from captions such as "crying face" or "toolbox", as 256 codes of a VQ tokenizer
(`vq/`, {vq:.1f} M parameters) that a Llama ({language:.1f} M parameters) writes one after another.
Trained from nothing by jaxft (`tools/make_demo.py tokens`): the tokenizer on 1,705 captioned images
of Google's Noto emoji (Apache-2.0), the language model on 256 of them and on the same 256 in
Microsoft's Fluent flat style (MIT), first in several places and sizes, then as they are, at last
under twelve captions each ("crying face", "a picture of crying face", ...). At temperature 0 and
guidance 1 it draws those 256 so that nearly all can be recognised, and nothing else. It is here so
that fine-tuning can be tried at once.
"""


def write_tokens(data: Path, out: Path, demo: Path = DEMO) -> None:
    """All stages, into `out`; the model then replaces `demo`/emoji-tokens, in bfloat16."""
    sets = {"data.train": f"folder:{data / 'train'}", "data.eval": f"folder:{data / 'valid'}"}
    fresh = {"init": "random", "model": _blank(out / "blank-vq", VQ)}
    first = train("autoencoder", out / "vq", {**sets, **VQ_RUN, **fresh})
    codec = train("autoencoder", out / "vq-again", {**sets, **AGAIN, "model": first})
    done, more = _blank(out / "blank-language", LANGUAGE), {**FRESH, "graft": codec}
    for name, run in TOKENS_RUNS.items():
        keys = {"model": done, "data.train": f"folder:{data / name}", "cache": out / "cache"}
        done, more = train("image_tokens", out / name, {**EVERY, **run, **more, **keys}), {}
    shutil.rmtree(demo / "emoji-tokens", ignore_errors=True)
    shutil.copytree(done, demo / "emoji-tokens")
    sizes = [(done / name / "model.safetensors").stat().st_size for name in ("vq", "")]
    card = CARD.format(vq=sizes[0] / 4e6, language=sizes[1] / 2e6)
    (demo / "emoji-tokens" / "README.md").write_text(card)


def _blank(folder: Path, config: dict) -> Path:
    """A model's folder without weights, a tokenizer beside it."""
    shutil.copytree(DEMO / "tokenizer-clip-4k", folder, dirs_exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return folder
