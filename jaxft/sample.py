"""Let a model write or draw: `python -m jaxft.sample --workdir DIR --prompt TEXT [--seed 1 …]`."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

from jaxft.core import config as configs
from jaxft.core import runtime
from jaxft.core.errors import UserError
from jaxft.core.pictures import grid

NUMBERS = {"temperature": float, "top_p": float, "guidance": float}
COUNTS = {"max_new": int, "top_k": int, "steps": int, "seed": int, "copies": int}


def main(argv: list[str] | None = None) -> int:
    """Continue or draw a prompt, or every line of a file of prompts in one batch.

    Pictures go to `--out` (a folder; samples/ of the run unless given), and all of them to a grid.
    """
    return runtime.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    plain = ("config", "workdir", "step", "prompt", "prompts", "out", "sampler")
    arguments = configs.parse_arguments(argv, (*plain, *NUMBERS, *COUNTS))
    options = arguments.options
    prompts = _prompts(options)
    kinds = {**NUMBERS, **COUNTS}
    asked: dict = {n: _number(options, n, kind) for n, kind in kinds.items() if n in options}
    repeated = [prompt for prompt in prompts for _ in range(asked.pop("copies", 1))]
    import jax

    from jaxft.run import open_any
    from jaxft.tasks import Request

    request = Request(sampler=options.get("sampler"))._replace(**asked)
    run, params, _ = open_any(arguments)
    with jax.set_mesh(run.mesh):
        made = run.task.complete(params, repeated, request)
    out = Path(options.get("out", Path(options.get("workdir", ".")) / "samples"))
    for text in filter(None, (look.text for look in made)):
        print(text)
    _save([picture for look in made for picture in look.pictures.values()], out)


def _save(pictures: list[np.ndarray], out: Path) -> None:
    if not pictures:
        return
    out.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(pictures):
        Image.fromarray(picture).save(out / f"sample-{i:03}.png")
    across = min(len(pictures), 8)
    rows = [pictures[i : i + across] for i in range(0, len(pictures), across)]
    Image.fromarray(grid(rows)).save(out / "grid.png")
    print(f"{len(pictures)} pictures and grid.png in {out}")


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


def _number(options: dict[str, str], name: str, kind: type) -> int | float:
    try:
        return kind(options[name])
    except ValueError:
        raise UserError(f"--{name}={options[name]!r} must be {kind.__name__}") from None


if __name__ == "__main__":
    runtime.restart_with_huge_pages()
    sys.exit(main())
