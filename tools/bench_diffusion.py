"""One training step of SD 1.5's UNet: jaxft beside PyTorch + diffusers, and what caching saves."""

import argparse
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benching import (
    ROOT,
    Contestant,
    compare,
    jaxft_contestants,
    machine,
    machine_line,
    open_run,
    report,
    start,
    steps_table,
    torch_adamw,
    torch_contestant,
)

TINY = "tiny"
FACTOR = 8  # pixels a side for one latent
CAPTION = "a photograph of an astronaut riding a horse, number"
CACHED, UNCACHED = "cached", "encoded every step"
TINY_UNET = {
    "block_out_channels": [32, 64],
    "layers_per_block": 1,
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
}
SMALL_VAE = {"block_out_channels": [32] * 4, "layers_per_block": 1}
SMALL_CLIP = {"num_hidden_layers": 1, "intermediate_size": 768, "vocab_size": 4096}


def width(text: str) -> float | str:
    """A share of SD 1.5's width, or "tiny": two levels, for tests."""
    if text == TINY:
        return text
    share = float(text)
    if any(round(channels * share) % 32 for channels in (320, 640, 1280)):
        raise argparse.ArgumentTypeError(f"{text} of 320 channels is no multiple of 32; take 0.5")
    return share


def bench_diffusion(args: argparse.Namespace) -> None:
    start(args.gpu)
    tolerance = 5e-2 if args.gpu else 1e-4
    with tempfile.TemporaryDirectory(prefix="jaxft-bench-") as name:
        work = Path(name)
        pictures = _make_pictures(work / "pictures", args.batch, args.side * FACTOR)
        _make_pipeline(work / "small", _narrowed(args.width), SMALL_VAE, SMALL_CLIP)
        step = _compare_steps(args, work / "small", pictures, tolerance)
        encoders = (SMALL_VAE, SMALL_CLIP) if args.width == TINY else ({}, {})
        _make_pipeline(work / "whole", _narrowed(args.width), *encoders)
        caching = _compare_caching(args, work / "whole", pictures, tolerance)
    shown = {key: getattr(args, key) for key in ("width", "side", "batch", "steps")}
    shown["dtype"] = "bfloat16" if args.gpu else "float32"
    results = {"step": step, "caching": caching}
    record = {"settings": shown, "machine": machine(), "results": results}
    report(f"diffusion-{'gpu' if args.gpu else 'cpu'}", record, _section(record), args.out)


def _make_pictures(folder: Path, count: int, side: int) -> str:
    """Random pictures with captions, as data.train names them."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"{CAPTION} {i}"}) + "\n")
    (folder / "metadata.jsonl").write_text("".join(rows))
    return f"folder:{folder}"


def _narrowed(share: float | str) -> dict[str, Any]:
    """What of the UNet's config.json differs from SD 1.5's."""
    from jaxft.weights.folders.known_configs import KNOWN_COMPONENTS

    if isinstance(share, str):
        return TINY_UNET
    whole = KNOWN_COMPONENTS["sd1"]["unet"]["block_out_channels"]
    return {"block_out_channels": [round(channels * share) for channels in whole]}


def _make_pipeline(
    folder: Path, unet: dict[str, Any], vae: dict[str, Any], clip: dict[str, Any]
) -> None:
    """SD 1.5 as diffusers saves it, with random weights and these changes of its configs."""
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    from jaxft.weights.folders.known_configs import (
        KNOWN_COMPONENTS,
        KNOWN_INDEXES,
        KNOWN_SCHEDULERS,
    )

    torch.manual_seed(0)
    configs = KNOWN_COMPONENTS["sd1"]
    models: dict[str, Any] = {
        "unet": UNet2DConditionModel.from_config({**configs["unet"], **unet}),
        "vae": AutoencoderKL.from_config({**configs["vae"], **vae}),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    text = CLIPTextModel(CLIPTextConfig(**{**configs["text_encoder"], **clip}))
    text.save_pretrained(folder / "text_encoder")
    shutil.copytree(ROOT / "jaxft" / "demo" / "tokenizer-clip-4k", folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(KNOWN_SCHEDULERS["sd1"]))
    (folder / "model_index.json").write_text(json.dumps(KNOWN_INDEXES["sd1"]))


def _open(
    args: argparse.Namespace, folder: Path, pictures: str
) -> tuple[Any, dict[str, Any], dict[str, dict]]:
    """The run that trains this pipeline's UNet, its parameters, and its first batch both ways."""
    import jax

    from jaxft.core.sharding import local_rows
    from tests import whole as runs

    changes = {
        "model": str(folder),
        "data.train": pictures,
        "resolution": args.side * FACTOR,
        "cache": str(folder / "cache"),
        "batch_size": args.batch,
        "caption_dropout": 0.0,
        "min_snr_gamma": 0.0,
    }
    run = open_run("diffusion", changes)
    rows = local_rows(run.mesh, args.batch)
    batches = {UNCACHED: next(run.train.batches(0, rows))}
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        run.encode(params, run.chosen)
    batches[CACHED] = next(run.train.batches(0, rows))
    return run, params, batches


def _compare_steps(
    args: argparse.Namespace, folder: Path, pictures: str, tolerance: float
) -> dict[str, Any]:
    run, params, batches = _open(args, folder, pictures)
    given = _first_draws(run, batches[CACHED])
    ours = jaxft_contestants(run, {"jaxft": batches[CACHED]}, params)
    del params
    return compare(ours, _torch_contestants(args, folder, given), args.steps, tolerance)


def _compare_caching(
    args: argparse.Namespace, folder: Path, pictures: str, tolerance: float
) -> dict[str, Any]:
    """jaxft's step on stored moments and embeddings, and on pixels and ids."""
    run, params, batches = _open(args, folder, pictures)
    without, within = jaxft_contestants(run, batches, params)
    return compare([within], [without], args.steps, tolerance)


def _first_draws(run: Any, batch: dict) -> dict[str, Any]:
    """Latents and noise (B, C, Y, X), timesteps and embeddings of jaxft's step 0, for torch."""
    import jax
    import numpy as np

    from jaxft.core.step import sample_keys
    from jaxft.models.autoencoders import vae
    from jaxft.objectives.denoising import LATENT, NOISE, TIME

    cfg, keys = run.opened.model_cfg, sample_keys(run.cfg.seed, 0, batch["sample_ids"])

    def stream(number: int) -> jax.Array:
        return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)

    drawn = vae.sample(vae.Moments(batch["mean"], batch["logvar"]), stream(LATENT))
    noise = jax.vmap(partial(jax.random.normal, shape=drawn.shape[1:]))(stream(NOISE))
    times = run.opened.process.draw_times(stream(TIME), drawn.shape[1:3])
    return {
        "latents": np.moveaxis(np.asarray(cfg.vae.scale(drawn)), -1, 1),
        "noise": np.moveaxis(np.asarray(noise), -1, 1),
        "timesteps": np.asarray(times).astype(np.int64),
        "context": np.asarray(batch["context"], np.float32),
    }


def _torch_contestants(
    args: argparse.Namespace, folder: Path, given: dict[str, Any]
) -> list[Contestant]:
    """The plain loop over diffusers' UNet: as it is, and in channels_last eager and compiled."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    plain, optimizer = _torch_loss(args, folder, given, torch.contiguous_format)
    last, last_optimizer = _torch_loss(args, folder, given, torch.channels_last)
    made = [
        torch_contestant("torch eager", plain, optimizer, args.gpu),
        torch_contestant("torch eager, channels_last", last, last_optimizer, args.gpu),
    ]
    if not args.no_compile:
        compiled = torch.compile(last)
        made.append(
            torch_contestant("torch compile, channels_last", compiled, last_optimizer, args.gpu)
        )
    return made


def _torch_loss(
    args: argparse.Namespace, folder: Path, given: dict[str, Any], layout: Any
) -> tuple[Callable[[], Any], Any]:
    """The loss of the UNet in a memory format, and the optimiser of its weights."""
    import torch
    from diffusers import DDPMScheduler, UNet2DConditionModel

    from jaxft.weights.folders.known_configs import KNOWN_SCHEDULERS

    device = "cuda" if args.gpu else "cpu"
    unet: Any = UNet2DConditionModel.from_pretrained(folder / "unet")
    unet.to(device, memory_format=layout).train()
    scheduler: Any = DDPMScheduler.from_config(KNOWN_SCHEDULERS["sd1"])
    tensors = {name: torch.tensor(array, device=device) for name, array in given.items()}
    latents, noise = (tensors[key].to(memory_format=layout) for key in ("latents", "noise"))
    timesteps, context = tensors["timesteps"], tensors["context"]

    def loss_of() -> Any:
        noisy = scheduler.add_noise(latents, noise, timesteps)
        with torch.autocast(device, torch.bfloat16, enabled=args.gpu):
            made = unet(noisy, timesteps, context).sample
        return torch.nn.functional.mse_loss(made.float(), noise)

    return loss_of, torch_adamw(unet)


def _section(record: dict[str, Any]) -> str:
    s, results = record["settings"], record["results"]
    caching, pixels = results["caching"], s["side"] * FACTOR
    with_cache, without = (caching["steps"][name]["median_s"] for name in (CACHED, UNCACHED))
    unet = "a tiny UNet" if s["width"] == TINY else f"SD 1.5's UNet at {s['width']} of its width"
    lines = [
        f"One training step of {unet}, batch {s['batch']} x"
        f" {s['side']}x{s['side']} latents, {s['dtype']}, AdamW (torch: fused), moments and"
        f" embeddings stored, median of {s['steps']} interleaved rounds, before each an untimed"
        " one. Ratio: the best torch / jaxft; above 1 jaxft is faster.",
        "",
        *steps_table({"UNet": results["step"]}),
        "",
        f"Caching: a step of {without:.2f} s with SD 1.5's VAE on {pixels}x{pixels} pixels and its"
        f" CLIP in it takes {with_cache:.2f} s on stored moments and embeddings:"
        f" {caching['ratio_median_s']:.2f} times as fast.",
    ]
    return "\n".join([*lines, "", machine_line(record["machine"])])
