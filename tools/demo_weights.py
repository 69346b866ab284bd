"""Train the demo pipeline from nothing by jaxft's own commands, on what `make_demo.py data` wrote.

Each stage is one run of `python -m jaxft.train` in OUT; a stage that was stopped goes on. Two CPU
cores need about half an hour for the autoencoder and two and a half hours for the pipeline.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

DEMO = Path(__file__).resolve().parent.parent / "jaxft" / "demo"
VERSION = "0.31.0"  # the oldest diffusers that the folders are for

VAE = {
    "_class_name": "AutoencoderKL",
    "_diffusers_version": VERSION,
    "act_fn": "silu",
    "block_out_channels": [16, 32, 64],
    "down_block_types": ["DownEncoderBlock2D"] * 3,
    "force_upcast": False,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "out_channels": 3,
    "sample_size": 64,
    "scaling_factor": 1.0,  # until its latents are measured
    "up_block_types": ["UpDecoderBlock2D"] * 3,
}
UNET = {
    "_class_name": "UNet2DConditionModel",
    "_diffusers_version": VERSION,
    "act_fn": "silu",
    "attention_head_dim": 4,
    "block_out_channels": [32, 96, 160],
    "cross_attention_dim": 192,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "in_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 16,
    "out_channels": 4,
    "sample_size": 16,
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
}
TEXT = {
    "architectures": ["CLIPTextModel"],
    "bos_token_id": 4094,
    "eos_token_id": 4095,
    "hidden_act": "quick_gelu",
    "hidden_size": 192,
    "intermediate_size": 768,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 24,
    "model_type": "clip_text_model",
    "num_attention_heads": 6,
    "num_hidden_layers": 2,
    "pad_token_id": 4095,
    "projection_dim": 192,
    "torch_dtype": "float32",
    "vocab_size": 4096,
}
SCHEDULER = {
    "_class_name": "DPMSolverMultistepScheduler",
    "_diffusers_version": VERSION,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "v_prediction",
    "steps_offset": 1,
    "timestep_spacing": "linspace",
}
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": VERSION,
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
MOSTLY_NOISE = 0.5  # of a prior's variance of 1
LEAST_LOGVAR = -30.0  # AutoencoderKL's own clamp
VAE_RUN = {
    "trainable": r"vae\..*",
    "total": "1500_steps",
    "batch_size": 8,
    "loss.l1": 0.5,
    "loss.l2": 2.0,
    "loss.perceptual": 0.0,
    "optim.lr": 3e-3,
    "optim.warmup": "30_steps",
}
SD_RUN = {
    "trainable": r"(unet|text_encoder)\..*",
    "batch_size": 32,
    "optim.lr": 1.5e-3,
    "every.save": "250_steps",
}
# First all emoji; then those that the fine-tuning set draws in another style, which is what so
# little compute can learn, a falling rate at the end for clean drawings; then these on coloured
# pages, so that the pipeline leaves open how a picture is to look.
CONSTANT = {"optim.schedule": "constant", "optim.warmup": "50_steps"}
ALL = {**CONSTANT, "total": "750_steps", "optim.ema": 0.999, "min_snr_gamma": 5.0}
KNOWN = {**CONSTANT, "total": "2900_steps", "optim.ema": 0.998, "min_snr_gamma": 0.0}
FALLING = {"optim.schedule": "linear", "optim.warmup": "30_steps"}
LAST = {**KNOWN, **FALLING, "total": "1500_steps"}
PAGED = {**LAST, "total": "600_steps", "optim.lr": 1e-3, "export.dtype": "bfloat16"}
CARD = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# emoji-sd: a toy Stable Diffusion for demos and tests

64x64 emoji from captions such as "crying face" or "toolbox". {size:.1f} M parameters, trained from
nothing by jaxft (`tools/make_demo.py weights`) on captioned images of Google's Noto emoji
(Apache-2.0): 750 steps of 32 on all 1,705, then 4,400 on the 256 that the fine-tuning set beside it
draws in another style, then 600 on these on coloured pages; about two and a half hours on two CPU
cores. It draws those 256, on any page, so that most can be recognised, and little else. (Of these
weights' 4,400 steps the first 900 saw 528 emoji, and the VAE's silent channel was muted after
1,400.) It is here so that fine-tuning can be tried at once.
Load it with `StableDiffusionPipeline.from_pretrained(...)`.
"""


def write_weights(data: Path, out: Path, demo: Path = DEMO) -> None:
    """All stages, into `out`; the pipeline then replaces `demo`/emoji-sd, in bfloat16."""
    sets = {"data.train": f"folder:{data / 'train'}", "data.eval": f"folder:{data / 'valid'}"}
    blank = out / "blank"
    _write_configs(blank)
    fresh = {"init": "random", "model": blank}
    vae = train("autoencoder", out / "vae", {**sets, **VAE_RUN, **fresh})
    untrained = {"trainable": ".*", "total": "0_steps", "data.eval": "", "cache": ""}
    started = train("diffusion", out / "random", {**sets, **fresh, **untrained})
    begin = out / "begin"
    shutil.copytree(started, begin, dirs_exist_ok=True)
    shutil.copytree(vae, begin / "vae", dirs_exist_ok=True)
    _prepare_latents(begin / "vae", data / "train")
    keys = {**sets, **SD_RUN, "cache": out / "cache"}
    first = train("diffusion", out / "all", {**keys, **ALL, "model": begin})
    known = {**keys, "data.train": f"folder:{_known(data, out / 'images')}"}
    second = train("diffusion", out / "known", {**known, **KNOWN, "model": first})
    third = train("diffusion", out / "last", {**known, **LAST, "model": second})
    pages = {**keys, "data.train": f"folder:{data / 'pages'}"}
    done = train("diffusion", out / "pages", {**pages, **PAGED, "model": third})
    shutil.rmtree(demo / "emoji-sd", ignore_errors=True)
    shutil.copytree(done, demo / "emoji-sd")
    size = sum(path.stat().st_size for path in done.rglob("*.safetensors")) / 2e6
    (demo / "emoji-sd" / "README.md").write_text(CARD.format(size=size))


def _write_configs(folder: Path) -> None:
    """A pipeline folder without weights."""
    configs: dict[str, Mapping[str, Any]] = {
        "model_index.json": INDEX,
        "scheduler/scheduler_config.json": SCHEDULER,
        "text_encoder/config.json": TEXT,
        "unet/config.json": UNET,
        "vae/config.json": VAE,
    }
    for name, config in configs.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(config, indent=2) + "\n")
    shutil.copytree(DEMO / "tokenizer-clip-4k", folder / "tokenizer", dirs_exist_ok=True)


def _known(data: Path, folder: Path) -> Path:
    """The Google pictures of the emoji that the fine-tuning set draws, under their code points."""
    shown = {
        path.stem for split in ("train", "valid") for path in (DEMO / "emoji" / split).iterdir()
    }
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for split in ("train", "valid"):
        for line in (data / split / "metadata.jsonl").read_text().splitlines():
            record = json.loads(line)
            code = record["unicode"].lower()
            if {code, code.removesuffix("-fe0f")} & shown:
                shutil.copy(data / split / record["file_name"], folder / f"{code}.png")
                rows.append({"file_name": f"{code}.png", "text": record["text"]})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def train(task: str, workdir: Path, keys: Mapping[str, Any]) -> Path:
    """One run to its end; the folder that it exports."""
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    command = [sys.executable, "-m", "jaxft.train", "--config", f"configs/{task}.py"]
    subprocess.run(
        [*command, "--workdir", str(workdir), *flags], check=True, cwd=DEMO.parent.parent
    )
    return workdir / "export"


def _prepare_latents(folder: Path, images: Path) -> None:
    """Silence the latent channels that say nothing, and set scaling_factor to one over the spread.

    A channel whose posterior is nearly the prior's is noise: the decoder ignores it, but a UNet
    would spend a quarter of its loss on it.
    """
    from safetensors.numpy import load_file, save_file

    made = _encoded(folder, images)
    means, noise = np.concatenate([m.mean for m in made]), np.concatenate([m.logvar for m in made])
    silent = np.flatnonzero(np.exp(noise).mean((0, 1, 2)) > MOSTLY_NOISE)
    loud = np.setdiff1d(np.arange(means.shape[-1]), silent)
    file = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    weight, bias = tensors["quant_conv.weight"], tensors["quant_conv.bias"]
    weight[[*silent, *(silent + len(weight) // 2)]] = 0
    bias[silent], bias[silent + len(bias) // 2] = 0, LEAST_LOGVAR
    save_file(tensors, file, metadata={"format": "pt"})
    variance = np.var(means[..., loud]) + np.mean(np.exp(noise[..., loud]))
    config = json.loads((folder / "config.json").read_text())
    config["scaling_factor"] = round(float(variance) ** -0.5, 5)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _encoded(folder: Path, images: Path) -> list[Any]:
    """The moments of 512 images."""
    import jax

    from jaxft.core.params import bind, describe
    from jaxft.core.sharding import one_device_mesh, shardings
    from jaxft.data.images.dataset import ImageSet
    from jaxft.data.sources.schemes import open_images
    from jaxft.models.autoencoders import vae
    from jaxft.nn.pixels import to_float
    from jaxft.weights.folders.diffusers import open_component
    from jaxft.weights.transfer import Part, load

    source = open_component(str(folder), "vae")
    cfg = vae.VAEConfig.from_hf(source.config)
    template = jax.eval_shape(lambda key: vae.VAE(cfg, key=key), jax.random.key(0))
    leaves, mesh = describe(template), one_device_mesh()
    part = Part("", str(folder), source.tensors, vae.RULES, vae.sizes(cfg))
    params = load(part, leaves, shardings(leaves, mesh), np.float32, set(leaves))
    encode = jax.jit(lambda params, x: bind(template, params).encode(x))
    pictures = ImageSet(open_images(f"folder:{images}"), 64, cfg.factor, False)
    chosen = range(0, 3 * 512, 3)
    return [encode(params, to_float(pictures[i].pixels[None])) for i in chosen]
