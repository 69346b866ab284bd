"""The report of a run, `report.html`: one file without scripts, made from the run's own files."""

import base64
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from jaxft.core.guards.best import BEST_FILE, direction
from jaxft.core.metrics import OF_MEMBERS, without_members
from jaxft.runs.pages.advice import advice
from jaxft.runs.pages.charts import Series, chart, short, smoothed
from jaxft.runs.pages.gallery import gallery
from jaxft.runs.pages.records import History, leaves, read_history, read_json
from jaxft.runs.pages.samples import replace_text
from jaxft.runs.pages.style import STYLE

REPORT = "report.html"
HEADLINES = ("accuracy", "macro_f1", "rewards/accuracies", "psnr", "kid-lite0", "perplexity")
CURVES = 6  # curves of measures
OF_LOSS = ("perplexity", "bits_per_byte")  # functions of the loss, whose curves say nothing more
PLAIN_BYTES = 2**21  # of a picture that is put into the page as it is


def write_report(workdir: Path) -> Path:
    """Write the report of a run folder, which may be running or finished. Return its path."""
    config, manifest = read_json(workdir / "config.json"), read_json(workdir / "manifest.json")
    before, history = read_json(workdir / "before.json"), read_history(workdir)
    best = read_json(workdir / BEST_FILE)
    first = before.get("metrics") or history.measures(0)
    tips = advice(config, manifest, first, history)
    parts = [
        _head(workdir, config, manifest, history),
        _tiles(manifest, first, history, best),
        _section("What to try next", _list(tips)) if tips else "",
        _section("Curves", _curves(history)),
        _section("Before and after", _measures(first, history, best)),
        *(_section(title, content) for title, content in gallery(workdir, before)),
        _section("Pictures of the evaluation", _plain(workdir)),
        _section("Data", _facts(leaves(manifest.get("data") or {}))),
        _section("This run", _run(config, manifest)),
    ]
    name = escape(workdir.resolve().name)
    page = (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{name} · jaxft</title><style>{STYLE}</style><main>{''.join(parts)}"
        f"<footer>Written by jaxft {escape(_version(manifest))} from the files of this run."
        " Nothing is loaded from elsewhere.</footer></main></html>\n"
    )
    replace_text(workdir / REPORT, page)
    return workdir / REPORT


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>" if content else ""


def _list(items: Sequence[str]) -> str:
    return f'<ul class="advice">{"".join(f"<li>{escape(one)}</li>" for one in items)}</ul>'


def _version(manifest: Mapping[str, Any]) -> str:
    return str((manifest.get("versions") or {}).get("jaxft") or "")


def _head(
    workdir: Path, config: Mapping[str, Any], manifest: Mapping[str, Any], history: History
) -> str:
    total, done = manifest.get("total_steps"), history.last
    of = f" of {total:,}" if isinstance(total, int) else ""
    state = "finished" if manifest.get("finished") else "so far"
    words = [str(config.get("task", "")), str(config.get("model", ""))]
    words += [f"{done:,}{of} steps, {state}"]
    name = escape(workdir.resolve().name)
    return f'<h1>{name}</h1><p class="soft">{escape(" · ".join(filter(None, words)))}</p>'


def _tiles(
    manifest: Mapping[str, Any],
    first: Mapping[str, float],
    history: History,
    best: Mapping[str, Any],
) -> str:
    """Return the few numbers to read first: measures before and now, rate, time, memory."""
    now, tiles = history.measures(), []
    watched = str(best.get("measure", ""))
    named = [one for one in (watched, "loss", "ce", *HEADLINES) if one in now]
    for name in list(dict.fromkeys(named))[:2]:
        was = f"{short(first[name])} → " if name in first else ""
        tiles.append((f"{was}{short(now[name])}", f"{name}, held out"))
    _, losses = history.curve("loss")
    if losses and not tiles:
        tiles.append((f"{short(losses[0])} → {short(losses[-1])}", "training loss"))
    if unit := _unit(history):
        rates = sorted(history.curve(unit)[1])
        tiles.append((short(rates[len(rates) // 2]), f"{unit.removesuffix('_per_s')} a second"))
    if isinstance(seconds := manifest.get("seconds"), int | float):
        tiles.append((_duration(seconds), "last start to end"))
    if isinstance(memory := manifest.get("peak_memory_bytes"), int):
        tiles.append((f"{memory / 2**30:.2f} GiB", f"peak memory of {manifest['memory_of']}"))
    if best.get("step") is not None:
        tiles.append((f"step {best['step']:,}", f"best {watched}, exported"))
    shown = "".join(f'<div class="tile"><b>{escape(b)}</b><span>{escape(s)}</span></div>'
                    for b, s in tiles)  # fmt: skip
    return f'<div class="tiles">{shown}</div>' if tiles else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def _unit(history: History) -> str:
    keys = history.train[-1] if history.train else {}
    return next((k for k in keys if k.endswith("_per_s") and k != "gflops_per_s"), "")


def _curves(history: History) -> str:
    evaluated = next((k for k in ("eval_loss", "eval_ce") if history.curve(k, True)[0]), "")
    main = smoothed("training", *history.curve("loss")) if history.train else []
    held_out = Series("held out", *history.curve(evaluated, True), "dots")
    main.insert(1, held_out)  # the second colour of the page
    made = [chart("Loss", main)]
    measures = history.measures()
    members = sorted((x, name) for name, x in measures.items() if name.startswith(OF_MEMBERS[0]))
    if members:
        ends = [Series(name.partition("/")[2], *history.curve(f"eval_{name}", True), "dots")
                for _, name in (members[0], members[-1])]  # fmt: skip
        made.append(chart("Best and worst member", ends))
    own = without_members(measures)
    names = [name for name in own if direction(name) and f"eval_{name}" != evaluated]
    drawn = [n for n in names if not n.startswith(("loss_t", "f1/")) and n not in OF_LOSS]
    for name in drawn[:CURVES]:
        made.append(chart(name, [Series("held out", *history.curve(f"eval_{name}", True), "dots")]))
    for title, key in (("Learning rate", "lr"), ("Gradient norm", "grad_norm")):
        if history.train:
            curve = history.curve(key)
            made.append(
                chart(title, smoothed(key, *curve) if key != "lr" else [Series("", *curve)])
            )
    if unit := _unit(history):
        rate = f"{unit.removesuffix('_per_s').capitalize()} a second"
        made.append(chart(rate, smoothed("rate", *history.curve(unit))))
    shown = "".join(made)
    return f'<div class="charts">{shown}</div>' if shown else ""


def _measures(first: Mapping[str, float], history: History, best: Mapping[str, Any]) -> str:
    """Return the table of measures, with an arrow and a word for better and worse."""
    now, at = history.measures(), best.get("step")
    kept = history.measures(at) if isinstance(at, int) and at != history.evals[-1]["step"] else {}
    if not now:
        return ""
    last = history.evals[-1]["step"]
    heads = [
        "measure",
        "before",
        *([f"step {at} (best)"] if kept else []),
        f"step {last}",
        "change",
    ]
    rows = []
    for name, value in without_members(now).items():
        words = escape(name).replace("_", "_<wbr>")  # a phone breaks a long name there
        cells = [words, _number(first.get(name))]
        cells += [_number(kept.get(name))] if kept else []
        cells += [_number(value), _change(name, first.get(name), value)]
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(one)}</th>" for one in heads)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _change(name: str, before: Any, now: Any) -> str:
    if not isinstance(before, int | float) or not isinstance(now, int | float) or before == now:
        return ""
    difference = now - before
    text = f"{difference / abs(before):+.1%}" if before else f"{difference:+.3g}"
    if before > 0 and now > 0 and not 0.001 < now / before < 10:  # no percentage tells that
        text = f"×{now / before:.3g}" if now > before else f"÷{before / now:.3g}"
    if not (way := direction(name)):
        return text
    good = difference * way > 0
    return (
        f'<span class="{"good" if good else "bad"}">{text} {"better" if good else "worse"}</span>'
    )


def _plain(workdir: Path) -> str:
    """Return the newest of each picture that is no sheet, such as the confusion of classes."""
    newest: dict[str, Path] = {}
    for file in sorted((workdir / "samples").glob("*-??????.png")):
        if not file.with_suffix(".json").exists():
            newest[file.stem.rpartition("-")[0]] = file
    parts = []
    for name, file in newest.items():
        if file.stat().st_size <= PLAIN_BYTES:
            data = base64.b64encode(file.read_bytes()).decode()
            title = escape(f"{name}, step {int(file.stem.rpartition('-')[2]):,}")
            parts.append(
                f'<h3>{title}</h3><img class="plain" alt="{title}"'
                f' src="data:image/png;base64,{data}">'
            )
    return "".join(parts)


def _facts(pairs: Iterator[tuple[str, str]]) -> str:
    rows = "".join(f"<tr><td>{escape(key)}</td><td>{escape(text)}</td></tr>" for key, text in pairs)
    return f'<div class="scroll"><table class="facts">{rows}</table></div>' if rows else ""


def _run(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    # A span is one word: a browser would break a line after the hyphens of an option.
    words = str(manifest.get("command") or "").split(" ")
    command = " ".join(f"<span>{escape(word)}</span>" for word in words)
    shown = f"<pre>{command}</pre><br>" if manifest.get("command") else ""
    versions = manifest.get("versions") or {}
    facts: dict[str, Any] = {
        "base model": config.get("model"),
        "weights at step 0": config.get("init"),
        "devices": manifest.get("devices"),
        "mesh": ", ".join(f"{k} {v}" for k, v in (manifest.get("mesh") or {}).items()),
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items() if v),
        "python": manifest.get("python"),
        "revision": manifest.get("revision"),
    }
    keys = _facts(leaves(config))
    more = f"<details><summary>All keys of its config</summary>{keys}</details>" if keys else ""
    return shown + _facts(leaves(facts)) + more
