"""Samples over time: pictures side by side under their caption, texts under their prompt."""

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxft.runs.pages.samples import BEFORE_COLUMN, SampleFile, kept_samples
from jaxft.tasks import NOW

SHOWN_STEPS = 5  # of one picture, the first and the last among them
SMALL_BYTES = 40_000  # a PNG in a record is a picture of few pixels, shown with sharp edges


def gallery(workdir: Path, before: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield (title, content) for the sheets and tables in `samples/` of a run."""
    by_name: dict[str, list[SampleFile]] = {}
    for one in kept_samples(workdir):
        by_name.setdefault(one.name, []).append(one)
    for name, kept in by_name.items():
        chosen = _spread(kept)
        records = [(one.step, record) for one in chosen if (record := _read(one.file))]
        if not records:
            continue
        if "captions" in records[-1][1]:
            yield f"Samples: {name}", _sheet(records)
        elif name == "predictions":
            of_sweep = records[-1][1].get("headers", ("",))[0] == "member"
            yield "Members" if of_sweep else "Predictions", _predictions(records, before)
        else:
            yield "Samples", _texts(records)


def _read(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if "captions" in record or "rows" in record else {}


def _spread(kept: Sequence[SampleFile]) -> list[SampleFile]:
    """Return SHOWN_STEPS of the records, equally far apart."""
    last = len(kept) - 1
    count = min(SHOWN_STEPS, len(kept))
    places = {round(i * last / max(count - 1, 1)) for i in range(count)}
    return [kept[i] for i in sorted(places)]


def _sheet(records: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """Return a card for each example: its fixed pictures, then those of every step."""
    _, last = records[-1]
    varying = {NOW, BEFORE_COLUMN}
    cards = []
    for i, caption in enumerate(last["captions"]):
        shots = [(n, x[i]) for n, x in last["columns"].items() if n not in varying]
        targets = shots[:2] if NOW in last["columns"] or BEFORE_COLUMN in last["columns"] else shots
        rest = shots[len(targets) :]
        for step, record in records:
            made = record["columns"].get(NOW) or record["columns"].get(BEFORE_COLUMN) or []
            if i < len(made):
                targets.append((f"step {step:,}" if step else "before", made[i]))
        pictures = "".join(_shot(name, uri) for name, uri in targets + rest)
        text = escape(caption) or "<small>no caption</small>"
        cards.append(f'<div class="card"><div class="shots">{pictures}</div><p>{text}</p></div>')
    wide = " wide" if len(records) + len(last["columns"]) > 5 else ""
    return f'<div class="cards{wide}">{"".join(cards)}</div>'


def _shot(name: str, uri: str) -> str:
    kind = ' class="small"' if uri.startswith("data:image/png") and len(uri) < SMALL_BYTES else ""
    label = escape(name)
    return (
        f'<figure><img{kind} alt="{label}" src="{escape(uri)}">'
        f"<figcaption>{label}</figcaption></figure>"
    )


def _texts(records: Sequence[tuple[int, dict[str, Any]]]) -> str:
    """Return a card for each prompt: the given texts, then the answers of the first and last."""
    shown = records if len(records) < 3 else [records[0], records[-1]]
    _, last = shown[-1]
    cards = []
    for i, row in enumerate(last["rows"]):
        lines = list(zip(last["headers"][:-1], row[:-1], strict=False))
        parts = [f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in lines]
        for step, record in shown:
            if i < len(record["rows"]) and record["rows"][i][:1] == row[:1]:
                name, kind = (f"step {step:,}", "made") if step else ("before", "was")
                text = escape(record["rows"][i][-1]) or "<small>empty</small>"
                label = f"{escape(last['headers'][-1])}, {name}"
                parts.append(f'<dt>{label}</dt><dd class="{kind}">{text}</dd>')
        cards.append(f'<div class="card"><dl>{"".join(parts)}</dl></div>')
    return f'<div class="cards">{"".join(cards)}</div>'


def _predictions(records: Sequence[tuple[int, dict[str, Any]]], before: Mapping[str, Any]) -> str:
    step, last = records[-1]
    earlier = {tuple(row[:-1]): row[-1] for row in before.get("rows") or []}
    head = [*last["headers"][:-1], "before", f"step {step:,}"]
    lines = []
    for row in last["rows"]:
        was = earlier.get(tuple(row[:-1]), "–")
        cells = "".join(f"<td>{escape(str(x))}</td>" for x in (*row[:-1], was, row[-1]))
        lines.append(f"<tr>{cells}</tr>")
    tops = "".join(f"<th>{escape(one)}</th>" for one in head)
    return f'<div class="scroll"><table class="texts"><tr>{tops}</tr>{"".join(lines)}</table></div>'
