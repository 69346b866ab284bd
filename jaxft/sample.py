"""Sample texts or pictures: `python -m jaxft.sample --workdir DIR --prompt TEXT [--seed 1 …]`."""

import re
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.cli.live import status
from jaxft.core.configs.schema import AT_MOST
from jaxft.core.errors import UserError
from jaxft.tasks import OPTIONS
from jaxft.tasks.common.pictures import grid

NUMBERS = {"temperature": float, "top_p": float, "guidance": float, "image_guidance": float}
COUNTS = {"max_new": int, "top_k": int, "steps": int, "seed": int, "copies": int}
LOWEST = {"temperature": 0, "top_k": 0, "seed": 0, "copies": 1, "steps": 1, "max_new": 1}
ACROSS = 8  # pictures in a row of the grid
MOST_SEEDS = 100  # of --seeds
SWEEP_CELL = 96  # least pixels a side of a picture in a sweep's grid


def main(argv: list[str] | None = None) -> int:
    """Sample from one prompt, or from each line of a file of prompts in one batch.

    Texts are printed. Pictures are written to the folder `--out` (by default samples/ of the run),
    each by itself and all in a grid. `--guidance=1,3,5 --temperature=0.7,1` samples every pair of
    values, as rows and columns of the grid. An inpainting model fills the white area of `--mask`
    in `--image`. InstructPix2Pix edits `--image`. `--negative` is what a picture should not show,
    `--size` is its WIDTHxHEIGHT, and `--seeds 0-3` draws four of each prompt. Files of earlier
    calls stay, as new ones get the next numbers. A language model gets the prompt in the chat
    format or template of its training, so that it answers. `--raw` continues the prompt instead.
    """
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    texts = ("sampler", "image", "mask", "negative")
    arguments = parse("sample", argv, OPTIONS)
    options = arguments.options
    kinds = {**NUMBERS, **COUNTS}
    if "seeds" in options:
        options["seed"] = _seeds(options["seeds"])
    asked = {n: _numbers(options, n, kind) for n, kind in kinds.items() if n in options}
    copies = int(asked.pop("copies", [1])[0])
    prompts = [prompt for prompt in _prompts(options) for _ in range(copies)]
    down, across = _sides(asked)
    status("loading jax")
    import jax

    from jaxft.runs.opening import preview
    from jaxft.runs.restoring import facts, open_any
    from jaxft.tasks import Data, Request

    fixed: dict = {name: values[0] for name, values in asked.items()}
    fixed |= {name: options[name] for name in texts if name in options}
    request = Request(raw="raw" in options, size=_size(options.get("size")))._replace(**fixed)
    run, params, _ = open_any(arguments)
    out = Path(options.get("out", Path(options.get("workdir", ".")) / "samples"))
    rows: list[list[list[np.ndarray]]] = []  # by row and column, the pictures of all prompts
    with jax.set_mesh(run.mesh):
        data = Data(facts=facts(options.get("workdir")))  # a prompt needs no rows
        looks = preview(run, data)
        for row in down:
            rows.append([])
            for column in across:
                if row or column:
                    print(_label({**row, **column}))
                status("sampling")
                made = looks.complete(params, prompts, request._replace(**row, **column))
                for text in filter(None, (look.text for look in made)):
                    print(text)
                rows[-1].append([one for look in made for one in look.pictures.values()])
    status("")
    if jax.process_index() == 0:
        _save(rows, prompts, down, across, out)


def _sides(asked: dict[str, list]) -> tuple[list[dict], list[dict]]:
    """Return the changes of options from row to row and from column to column of the grid.

    Raises UserError for more than two options with several values.
    """
    swept = [name for name, values in asked.items() if len(values) > 1]
    if len(swept) > 2:
        names = ", ".join(f"--{name}" for name in swept)
        raise UserError(f"{names} have several values each; a grid has two sides, so give two")
    sides = [[{name: value} for value in asked[name]] for name in swept]
    return (sides[0] if sides else [{}]), (sides[1] if sides[1:] else [{}])


def _label(change: dict) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in change.items())


def _save(
    rows: list[list[list[np.ndarray]]],
    prompts: list[str],
    down: list[dict],
    across: list[dict],
    out: Path,
) -> None:
    """Write each picture and a grid. The grid of a sweep repeats its rows for each prompt."""
    pictures = [one for row in rows for cell in row for one in cell]
    if not pictures:
        return
    out.mkdir(parents=True, exist_ok=True)
    first, last = _next(out), len(pictures) - 1
    for i, picture in enumerate(pictures, first):
        Image.fromarray(picture).save(out / f"sample-{i:03}.png")
    if len(down) * len(across) == 1:
        wide = min(len(pictures), ACROSS)
        sheet = grid([pictures[i : i + wide] for i in range(0, len(pictures), wide)])
    else:
        lines = [[cell[i] for cell in row] for i in range(len(prompts)) for row in rows]
        captions = [", ".join((prompt, _label(row))) for prompt in prompts for row in down]
        sheet = grid(lines, captions, [_label(column) for column in across], SWEEP_CELL)
    name = f"grid-{first:03}.png" if first else "grid.png"  # named after its first picture
    Image.fromarray(sheet).save(out / name)
    numbers = f" (sample-{first:03} to {first + last:03})" if first else ""
    print(f"{len(pictures)} pictures{numbers} and {name} in {out}")


def _next(out: Path) -> int:
    """Return the number after those of sample-NUMBER.png in a folder, so that none is replaced."""
    found = (re.fullmatch(r"sample-(\d+)\.png", file.name) for file in out.iterdir())
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _seeds(text: str) -> str:
    """Return "0-3" as "0,1,2,3". Other texts stay as they are."""
    match = re.fullmatch(r"(\d+)-(\d+)", text)
    if not match:
        return text
    first, last = int(match[1]), int(match[2])
    if not first <= last < first + MOST_SEEDS:
        raise UserError(f"--seeds={text!r} must be at most {MOST_SEEDS} seeds, such as 0-3 or 1,5")
    return ",".join(map(str, range(first, last + 1)))


def _size(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) of WIDTHxHEIGHT or of one number."""
    if text is None:
        return None
    match = re.fullmatch(r"([1-9]\d*)(?:[x×]([1-9]\d*))?", text)
    if not match:
        raise UserError(f"--size={text!r} must be WIDTHxHEIGHT in pixels, such as 512x768")
    return int(match[2] or match[1]), int(match[1])


def _prompts(options: dict[str, str]) -> list[str]:
    if "prompts" in options:
        try:
            with open(options["prompts"], encoding="utf-8") as file:
                lines = [line.rstrip("\n") for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts={options['prompts']} cannot be read: {error}") from None
        if not lines:
            raise UserError(f"--prompts={options['prompts']} is empty: write one prompt a line")
        return lines
    if not options.get("prompt"):
        raise UserError("no prompt: give --prompt=TEXT or --prompts=FILE with one a line")
    return [options["prompt"]]


def _numbers(options: dict[str, str], name: str, kind: type) -> list[int | float]:
    """Return the values of an option, which are separated by commas. `copies` has one value.

    Raises UserError for a value that is not of `kind`, or is too small or too large.
    """
    parts = options[name].split(",")
    try:
        if len(parts) > 1 and name == "copies":
            raise ValueError
        values = [kind(part) for part in parts]
    except ValueError:
        raise UserError(f"--{name}={options[name]!r} must be {kind.__name__}") from None
    for value in values:
        if value < LOWEST.get(name, value):
            raise UserError(f"--{name}={value} must be at least {LOWEST[name]}")
        if name == "top_p" and not 0 < value <= 1:
            raise UserError(f"--top_p={value} must be above 0 and at most 1")
        if value > AT_MOST.get(name, value):
            raise UserError(f"--{name}={value} must be at most {AT_MOST[name]}")
    return values


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())
