"""Show what a language model will train: `python -m jaxft.inspect_data --config configs/llm.py`.

Reads the tokenizer and the data, and no weights. Prints examples with their trained tokens marked,
counts and warnings. `--html FILE` writes the same as one page.
"""

from __future__ import annotations  # the records are needed in annotations alone

import html
import os
import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxft.core import config as configs
from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.errors import UserError
from jaxft.core.metrics import table
from jaxft.tasks import OPTIONS, check_task

if TYPE_CHECKING:
    from jaxft.tasks.llm.inspection import Inspection, Piece

SHOWN_EXAMPLES = 3  # the default of --rows
BAR = 40  # characters of the longest bar
LEGEND = "[[ ]] marks what is trained"
# ANSI codes by (trained, special).
ANSI_CODES = {
    (True, False): "32",  # green
    (True, True): "1;32",  # bold green
    (False, True): "36",  # cyan
    (False, False): "0",
}


def main(argv: list[str] | None = None) -> int:
    """Show the data of a run. Returns exit status 0, or 2 for a mistake in the config or data."""
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    options, overrides = parse("inspect-data", argv, OPTIONS)
    if "config" not in options:
        raise UserError("--config is missing: python -m jaxft.inspect_data --config configs/llm.py")
    shown = options.get("rows", str(SHOWN_EXAMPLES))
    if not shown.isdecimal():
        raise UserError(f"--rows={shown!r} must be a number of examples to show, such as 3")
    config = configs.load_config(options["config"], overrides, OPTIONS)
    check_task(config.get("task"))
    if config["task"] != "llm":
        raise UserError(
            f"inspect_data shows texts, but {options['config']} has task={config['task']!r}; give a"
            " config with task='llm', such as configs/llm.py"
        )
    import jax

    from jaxft.runs.opening import open_run
    from jaxft.tasks.llm.inspection import inspect

    run = open_run({**config, "init": "random"})
    opened: Any = run.opened  # OpenedDecoder, as the task is llm
    data, found = run.cfg.data, []
    with jax.sharding.use_abstract_mesh(run.mesh.abstract_mesh):  # it divides packed rows
        for key, spec in (("data.train", data.train), ("data.eval", data.eval)):
            if spec:
                rows = run.task.read(opened, spec, key == "data.train")
                found.append(inspect(opened, rows, key, int(shown)))
    colour = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    print("\n\n".join(describe(one, colour) for one in found))
    if "html" in options:
        _write(Path(options["html"]), page(run.cfg.model, found))


def _write(file: Path, text: str) -> None:
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--html={file} cannot be written: {reason}; give another file") from None
    print(f"\nwrote {file}")


def describe(found: Inspection, colour: bool) -> str:
    """Return an inspection as text. Without colour, trained tokens are in [[ ]]."""
    parts = [f"{found.key}: {found.title}"]
    legend = "green is trained, cyan and bold green are special tokens" if colour else LEGEND
    parts += [legend] if found.examples else []
    for heading, texts in found.examples:
        text = "".join(map(_coloured, texts)) if colour else _bracketed(texts)
        parts.append("\n| ".join([heading, *text.split("\n")]))
    parts.append(table(found.counts, (found.key, "")))
    parts.append(table(found.tokens, ("token", "id", "count", "trained")))
    most = max(number for *_, number in found.lengths)
    lines = ["   tokens  examples"]
    for first, last, number in found.lengths:
        lines.append(f"{first:>4}-{last:<4} {number:>8}  {'#' * -(-BAR * number // most)}".rstrip())
    parts.append("\n".join(lines))
    parts += [f"warning: {warning}" for warning in found.warnings]
    return "\n\n".join(parts)


def _coloured(piece: Piece) -> str:
    """Return a piece in its colour. Each line ends with a reset."""
    code = ANSI_CODES[piece.trained, piece.special]
    lines = piece.text.split("\n")
    return "\n".join(f"\x1b[{code}m{line}\x1b[0m" if line else "" for line in lines)


def _bracketed(texts: list[Piece]) -> str:
    runs = groupby(texts, key=lambda piece: piece.trained)
    joined = [(trained, "".join(piece.text for piece in run)) for trained, run in runs]
    return "".join(f"[[{text}]]" if trained else text for trained, text in joined)


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark; --line: #8884; --trained: #b7e4c0; --special: #0969da }}
@media (prefers-color-scheme: dark) {{ :root {{ --trained: #1f5a31; --special: #79b8ff }} }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 52rem; margin: auto; padding: 1rem }}
h1 {{ font-size: 1.4rem }} h2 {{ margin-top: 2.5rem; font-size: 1.2rem }}
h1, h2, h3, p, td, th {{ overflow-wrap: anywhere }} h3 {{ margin: 1.5rem 0 .3rem; font: inherit }}
pre {{ margin: 0; padding: .7rem; border: 1px solid var(--line); border-radius: .4rem;
  font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }}
mark {{ background: var(--trained); color: inherit; border-radius: .2rem }}
i {{ color: var(--special); font-style: normal }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100% }}
td, th {{ padding: .2rem .4rem; border-bottom: 1px solid var(--line); text-align: right }}
td:first-child, th:first-child {{ text-align: left }}
td.bar {{ width: 50%; text-align: left }} td.bar div {{ height: .8rem; background: var(--special) }}
.warning {{ padding: .5rem .7rem; border-left: .3rem solid #d29922 }}
</style>
<h1>{title}</h1>
<p><mark>Trained tokens</mark> have a background, <i>special tokens</i> another colour.</p>
{body}
</html>
"""


def page(model: str, found: Sequence[Inspection]) -> str:
    """Return inspections as a self-contained HTML page."""
    body = "\n".join(map(_section, found))
    return PAGE.format(title=html.escape(f"What {model} will train"), body=body)


def _section(found: Inspection) -> str:
    parts = [f"<h2>{html.escape(found.key)}</h2>", f"<p>{html.escape(found.title)}</p>"]
    parts += [f'<p class="warning">{html.escape(one)}</p>' for one in found.warnings]
    for heading, texts in found.examples:
        shown = "".join(map(_marked, texts))
        parts.append(f"<h3>{html.escape(heading)}</h3>\n<pre>{shown}</pre>")
    parts.append(_html_table((), found.counts))
    parts.append(_html_table(("token", "id", "count", "trained"), found.tokens))
    most = max(number for *_, number in found.lengths)
    bars = [
        f"<tr><td>{first}-{last}</td><td>{number}</td>"
        f'<td class="bar"><div style="width:{100 * number / most:.1f}%"></div></td></tr>'
        for first, last, number in found.lengths
    ]
    head = "<tr><th>tokens</th><th>examples</th><th></th></tr>"
    return "\n".join([*parts, f"<table>{head}{''.join(bars)}</table>"])


def _html_table(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    head = "".join(f"<th>{html.escape(name)}</th>" for name in headers)
    cells = ["".join(f"<td>{html.escape(str(cell))}</td>" for cell in row) for row in rows]
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in [head, *cells] if row) + "</table>"


def _marked(piece: Piece) -> str:
    text = html.escape(piece.text)
    text = f"<i>{text}</i>" if piece.special else text
    return f"<mark>{text}</mark>" if piece.trained else text


if __name__ == "__main__":
    sys.exit(main())
