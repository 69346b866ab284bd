"""A tiny text model, VQ tokenizer and captioned pictures, and the config of a small run."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.core.config import load_config

ROOT = Path(__file__).resolve().parents[1]
SIZE, FACTOR, CODES = 16, 2, 16
GRID = SIZE // FACTOR
WORDS = ("a red cat", "the blue house of a person", "water", "two small trees, and bread")


def make_pictures(folder, count=24):
    """Smooth colours of two layouts, a caption each, of very unequal lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        size = (SIZE, SIZE) if i % 5 else (SIZE, SIZE + 6)
        coarse = Image.fromarray(rng.integers(0, 256, (3, 3, 3), np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{i}.png")
        lines.append({"file_name": f"{i}.png", "text": f"{WORDS[i % 4]} {i}"})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def changes_of(model, pictures, cache, changes=()):
    """Flat keys of configs/image_tokens.py for a small run."""
    small = {
        "model": str(model),
        "data.train": f"folder:{pictures}",
        "data.eval": f"folder:{pictures}",
        "cache": str(cache),
        "resolution": SIZE,
        "total": "2_steps",
        "batch_size": 8,
        "max_caption_tokens": 24,
        "eval_examples": 8,
        "eval_generated": 0,
        "mesh.fsdp": 8,
    }
    return {**small, **dict(changes)}


def flags_of(model, pictures, cache, changes=()):
    """The command line of the run, without --workdir."""
    keys = changes_of(model, pictures, cache, changes)
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return ["--config", str(ROOT / "configs" / "image_tokens.py"), *flags]


def arguments(model, pictures, cache, workdir, changes=()):
    return [*flags_of(model, pictures, cache, changes), "--workdir", str(workdir)]


def make_config(model, pictures, cache, changes=()):
    from jaxft.tasks import OPTIONS

    keys = changes_of(model, pictures, cache, changes)
    overrides = [(key, str(value)) for key, value in keys.items()]
    return load_config(str(ROOT / "configs" / "image_tokens.py"), overrides, OPTIONS)
