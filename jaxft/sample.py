"""Let a model write: `python -m jaxft.sample --workdir DIR --prompt TEXT [--temperature 0.7 …]`."""

import sys
from typing import TypeVar

from jaxft.core import config as configs
from jaxft.core import runtime
from jaxft.core.errors import UserError

Number = TypeVar("Number", int, float)
NUMBERS = {"temperature": 0.0, "top_p": 1.0}
COUNTS = {"max_new": 64, "top_k": 0, "seed": 0, "copies": 1}


def main(argv: list[str] | None = None) -> int:
    """Continue a prompt, or every line of a file of prompts in one batch."""
    return runtime.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    allowed = ("config", "workdir", "step", "prompt", "prompts", *NUMBERS, *COUNTS)
    arguments = configs.parse_arguments(argv, allowed)
    prompts = _prompts(arguments.options)
    number = {name: _number(arguments.options, name, NUMBERS[name], float) for name in NUMBERS}
    count = {name: _number(arguments.options, name, COUNTS[name], int) for name in COUNTS}
    import jax

    from jaxft.nn.sampling import Sampling
    from jaxft.run import open_any

    run, params, _ = open_any(arguments)
    how = Sampling(number["temperature"], count["top_k"], number["top_p"])
    repeated = [prompt for prompt in prompts for _ in range(count["copies"])]
    with jax.set_mesh(run.mesh):
        texts = run.task.complete(params, repeated, count["max_new"], how, count["seed"])
    for prompt, text in zip(repeated, texts, strict=True):
        print(f"{prompt}{text}")


def _prompts(options: dict[str, str]) -> list[str]:
    if "prompts" in options:
        try:
            with open(options["prompts"], encoding="utf-8") as file:
                lines = [line.rstrip("\n") for line in file if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompts={options['prompts']} cannot be read: {error}") from None
        if lines:
            return lines
    if not options.get("prompt"):
        raise UserError("no prompt: give --prompt=TEXT or --prompts=FILE with one a line")
    return [options["prompt"]]


def _number(options: dict[str, str], name: str, default: Number, kind: type[Number]) -> Number:
    try:
        return kind(options.get(name, default))
    except ValueError:
        raise UserError(f"--{name}={options[name]!r} must be {kind.__name__}") from None


if __name__ == "__main__":
    runtime.restart_with_huge_pages()
    sys.exit(main())
