"""Predict labels: `python -m jaxft.predict --workdir DIR --data SPEC [--out predictions.jsonl]`."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.cli.live import status
from jaxft.core.errors import UserError
from jaxft.tasks import OPTIONS


def main(argv: list[str] | None = None) -> int:
    """Write the label and the scores of every text of a file by a trained classifier.

    A record needs a text, and no label. Each line of `--out` has the record's id (or its number),
    its text, the label and the score of every label, and the true label if the record has one.
    `--out` is predictions.jsonl of the run by default.
    """
    return processes.command(_main, sys.argv[1:] if argv is None else argv)


def _main(argv: list[str]) -> None:
    arguments = parse("predict", argv, OPTIONS)
    options = arguments.options
    for name in ("workdir", "data"):
        if name not in options:
            raise UserError(
                f"--{name} is missing: python -m jaxft.predict --workdir DIR --data SPEC"
            )
    from jaxft.data.sources.schemes import open_records
    from jaxft.data.text.templates import text_field

    records = open_records(options["data"])  # a mistyped path fails before weights are read
    status("loading jax")
    import jax

    from jaxft.runs.restoring import facts, open_any
    from jaxft.tasks import Data
    from jaxft.tasks.llm.heads.preview import ScorePreview

    run, params, step = open_any(arguments)
    preview = run.task.preview(run.opened, Data(facts=facts(options["workdir"])))
    if not isinstance(preview, ScorePreview):
        raise UserError(
            f"{options['workdir']} is no classifier, but a run of task={run.cfg.task}; for texts or"
            " pictures use python -m jaxft.sample"
        )
    columns = str(run.cfg.own["columns"]).replace(" ", "")
    renamed = dict(pair.split("=", 1) for pair in columns.split(",") if pair)
    field = renamed.get("text", "text")
    places = [records.where(i) for i in range(len(records))]
    rows = [records[i] for i in range(len(records))]
    texts = [text_field(row, field, where) for row, where in zip(rows, places, strict=True)]
    if empty := [where for text, where in zip(texts, places, strict=True) if not text.strip()]:
        raise UserError(f"{empty[0]} has an empty text, which has no label; leave it out")
    status("predicting")
    with jax.set_mesh(run.mesh):
        found = preview.predict(params, texts, places)
    status("")
    out = Path(options.get("out", Path(options["workdir"]) / "predictions.jsonl"))
    if jax.process_index() == 0:
        temporary = out.with_name(f".{out.name}.{os.getpid()}")
        with temporary.open("w", encoding="utf-8") as file:
            for i, (row, text, one) in enumerate(zip(rows, texts, found, strict=True)):
                true = row.get(renamed.get("label", "label"))
                given = {} if true is None else {"true_label": true}
                record = {"id": row.get("id", i), "text": text, **one, **given}
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        os.replace(temporary, out)
        counts = Counter(one["label"] for one in found if "label" in one).most_common(10)
        shown = ": " + ", ".join(f"{name} {count}" for name, count in counts) if counts else ""
        print(f"{len(found)} texts by step {step}{shown}\nwritten to {out}")


if __name__ == "__main__":
    processes.restart_with_huge_pages()
    sys.exit(main())
