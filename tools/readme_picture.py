"""Write docs/pictures/before-after.png: stickers before and after the demo run of image tokens.

`python tools/readme_picture.py [RUN]` trains configs/image_tokens.py as it ships (in RUN if given,
where a finished run is not trained again), and samples held-out captions from the demo model and
from the export of the run, at temperature 0 as the config does.
"""

import json
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import jaxft
from jaxft import train
from jaxft.demo import demo_path
from jaxft.tasks.common.lettering import LINE, draw_lines, wrap

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "pictures" / "before-after.png"
NAMES = ("cactus", "ice cream", "owl", "koala", "alien", "bathtub", "kiwi fruit", "green heart")
TILE, GAP, LABEL = 96, 8, 116  # pixels
GREEDY = {"temperature": 0.0, "guidance": 1.0}


def targets() -> list[Image.Image]:
    """Return the held-out pictures of NAMES."""
    folder = demo_path("demo:stickers/valid", "images")
    assert folder is not None
    lines = (folder / "metadata.jsonl").read_text(encoding="utf-8").splitlines()
    files = {row["text"]: row["file_name"] for row in map(json.loads, lines)}
    return [Image.open(folder / files[f"sticker of {name}"]).convert("RGB") for name in NAMES]


def sampled(model: str) -> list[Image.Image]:
    """Return a picture of each name, drawn as a sticker."""
    made = jaxft.load(model).sample([f"sticker of {name}" for name in NAMES], **GREEDY)
    return [Image.fromarray(np.asarray(one)) for one in made]


def sheet(rows: dict[str, list[Image.Image]]) -> Image.Image:
    """Return the rows, each behind its label, below a line of captions."""
    head = 2 * LINE + GAP
    size = LABEL + len(NAMES) * (TILE + GAP), head + len(rows) * (TILE + GAP)
    page = Image.new("RGB", size, "white")
    for x, name in enumerate(NAMES):
        text = wrap(f"sticker of {name}", TILE)
        draw_lines(page, text, LABEL + x * (TILE + GAP), GAP // 2, TILE)
    for y, (label, tiles) in enumerate(rows.items()):
        top = head + y * (TILE + GAP)
        draw_lines(page, wrap(label, LABEL - 2 * GAP), GAP, top + TILE // 3, LABEL - 2 * GAP)
        for x, tile in enumerate(tiles):
            large = tile.resize((TILE, TILE), Image.Resampling.LANCZOS)
            page.paste(large, (LABEL + x * (TILE + GAP), top))
    return page


def main(words: list[str]) -> None:
    """Train, sample, and write the picture."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(words[0] if words else Path(folder) / "run")
        flags = ["--config", str(ROOT / "configs" / "image_tokens.py"), "--workdir", str(work)]
        flags += [f"--config.cache={folder}/cache", "--config.eval_generated=0"]
        assert (work / "export").is_dir() or train.main(flags) == 0
        rows = {"before": sampled("demo:emoji-tokens"), "after 40 steps": sampled(f"{work}/export")}
    sheet({**rows, "target": targets()}).save(PICTURE, optimize=True)


if __name__ == "__main__":
    main(sys.argv[1:])
