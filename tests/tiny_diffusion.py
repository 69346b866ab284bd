"""Captioned pictures, and configs/diffusion.py pointed at them and at a tiny pipeline."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.core.config import load_config
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[1]
CONFIG = str(ROOT / "configs" / "diffusion.py")
WORDS = ("a red fish", "two birds", "a house by the sea", "the moon", "bread")
SMALL = {
    "total": "5_steps",
    "batch_size": 8,
    "resolution": 16,
    "cache": "",
    "eval_generated": 0,
    "sample.steps": 2,
    "optim.lr": 1e-3,
    "optim.warmup": "0_steps",
    "optim.schedule": "constant",
    "export.kind": "none",
}


def make_pictures(folder, count=24, sizes=((24, 20),), seed=0, word=""):
    """Random pictures of these (height, width) in turn, with a metadata.jsonl; their spec.

    `word` comes third in every caption.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        height, width = sizes[i % len(sizes)]
        pixels = rng.integers(0, 256, (height // 4, width // 4, 3), np.uint8)
        Image.fromarray(pixels).resize((width, height)).save(folder / f"{i:02}.png")
        words = f"{WORDS[i % 5]}, number {i}".split()
        text = " ".join([*words[:2], word, *words[2:]] if word else words)
        rows.append({"file_name": f"{i:02}.png", "text": text})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return f"folder:{folder}"


def changes_of(model, pictures, changes=None):
    """The keys of a small run, by dotted name."""
    data = {"model": str(model), "data.train": pictures, "data.eval": pictures}
    return {**SMALL, **data, **(changes or {})}


def make_config(model, pictures, changes=None):
    """configs/diffusion.py as a dict with these changes."""
    wanted = changes_of(model, pictures, changes)
    return load_config(CONFIG, [(key, str(value)) for key, value in wanted.items()], OPTIONS)


def flags_of(model, pictures, changes=None):
    """The command line of the same run, without --workdir."""
    wanted = changes_of(model, pictures, changes)
    return ["--config", CONFIG, *(f"--config.{key}={value}" for key, value in wanted.items())]
