"""Conversations trained by `python -m jaxft.train` and by TRL's SFTTrainer: losses and costs."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benching import ROOT, machine, machine_line, report, watch

SUPERSENSE = ROOT / "jaxft" / "demo" / "supersense"
SEED, SHOWN = 0, 10  # of the order of rows, and lines of the table


def conversations(split: str, count: int) -> list[dict[str, Any]]:
    """Conversations of one to three rounds about definitions of WordNet, the last asks for one."""
    lines = (SUPERSENSE / f"{split}.jsonl").read_text().splitlines()
    facts = iter([json.loads(line) for line in lines])
    made = []
    for i in range(count):
        turns = []
        for _ in range(i % 3):
            fact = next(facts)
            turns.append({"role": "user", "content": f"What kind of thing is {fact['text']!r}?"})
            turns.append({"role": "assistant", "content": fact["label"]})
        fact = next(facts)
        turns.append(
            {"role": "user", "content": f"Describe something of the kind {fact['label']}."}
        )
        turns.append({"role": "assistant", "content": fact["text"]})
        made.append({"messages": turns})
    return made


def bench_chat(args: argparse.Namespace) -> None:
    """jaxft first, then TRL, each in a process of its own, on the same rows in the same order."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory(prefix="jaxft-bench-") as name:
        place = Path(name)
        folder, rows = place / "model", conversations("train", args.rows)
        command = [sys.executable, str(ROOT / "tools" / "bench.py"), "folder"]
        subprocess.run([*command, args.model, str(folder)], check=True, cwd=ROOT)
        _write(place / "train.jsonl", rows)
        _write(place / "valid.jsonl", conversations("valid", 100))
        _write(place / "drawn.jsonl", _drawn(rows, args.steps * args.batch))
        ours = _jaxft(args, place)
        peer = [sys.executable, "tools/trl_chat_peer.py", str(folder), str(place / "drawn.jsonl")]
        peer += [str(args.steps), str(args.batch), str(args.lr)]
        theirs, last = watch(peer + ([str(place / "adapter" / "export")] if args.rank else []))
        theirs["losses"] = json.loads(last)["losses"]
    first = ours["losses"][0] / theirs["losses"][0] - 1
    if abs(first) > 1e-5:
        raise SystemExit(f"not the same work: the loss of the first step differs by {first:.1e}")
    shown = {key: vars(args)[key] for key in ("model", "rows", "steps", "batch", "rank", "lr")}
    record = {"settings": shown, "machine": machine(), "results": {"jaxft": ours, "TRL": theirs}}
    name = "chat-cpu" if args.rank else "chat-full-cpu"
    report(name, record, _section(record), args.out)


def _write(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _drawn(rows: list[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """The rows of jaxft's steps, in their order."""
    from jaxft.data.loader import sample_order

    order = sample_order(len(rows), SEED)
    return [rows[int(order[i])] for i in range(count)]


def _jaxft(args: argparse.Namespace, place: Path) -> dict[str, Any]:
    """Figures and losses of the run, whose untrained adapters are written for TRL before it."""
    command = [sys.executable, "-m", "jaxft.train", "--config=configs/llm.py"]
    keys = {
        "model": args.model, "seed": SEED, "batch_size": args.batch, "seq_len": 256,
        "data.train": f"jsonl:{place}/train.jsonl", "lora.rank": args.rank, "lora.alpha": 16.0,
        "optim.lr": args.lr, "optim.schedule": "constant", "optim.warmup": "0_steps",
        "eval_examples": 0, "every.save": "0_steps",
    }  # fmt: skip
    if args.rank:
        nothing = {**keys, "total": "0_steps", "data.eval": "", "export.kind": "adapter"}
        subprocess.run([*command, *_flags(nothing, place / "adapter")], check=True, cwd=ROOT)
    keys |= {"total": f"{args.steps}_steps", "data.eval": f"jsonl:{place}/valid.jsonl"}
    ours, _ = watch([*command, *_flags({**keys, "export.kind": "none"}, place / "run")])
    records = list(map(json.loads, (place / "run/metrics.jsonl").read_text().splitlines()))
    held_out = [row["eval_loss"] for row in records if "eval_loss" in row]
    return ours | {
        "losses": [row["loss"] for row in records if "loss" in row],
        "held_out_before": held_out[0],
        "held_out_after": held_out[-1],
    }


def _flags(keys: dict[str, Any], work: Path) -> list[str]:
    return [f"--workdir={work}", *(f"--config.{key}={value}" for key, value in keys.items())]


def _section(record: dict[str, Any]) -> str:
    s, ours, theirs = record["settings"], *record["results"].values()
    kind = f"LoRA r={s['rank']} on q, k, v, o" if s["rank"] else "all parameters"
    pairs = list(zip(ours["losses"], theirs["losses"], strict=True))
    apart = max(abs(a / b - 1) for a, b in pairs)
    lines = [
        f"{s['model']}, {kind}, {s['rows']} conversations of one to three rounds, batch"
        f" {s['batch']}, AdamW at {s['lr']:g}, fp32, loss on the answers, the same rows in the same"
        f" order from the same {'adapters' if s['rank'] else 'weights'}. The loss of the first step"
        f" differs by {abs(pairs[0][0] / pairs[0][1] - 1):.1e} of itself, that of any of the"
        f" {s['steps']} steps by at most {apart:.1e}. Held-out loss in jaxft"
        f" {ours['held_out_before']:.3f}, afterwards {ours['held_out_after']:.3f}.",
        "",
        "| step | jaxft, loss | TRL, loss |",
        "|---|---|---|",
    ]
    steps = sorted({1, *range(SHOWN, len(pairs) + 1, max(len(pairs) // SHOWN, 1)), len(pairs)})
    lines += [f"| {k} | {pairs[k - 1][0]:.6f} | {pairs[k - 1][1]:.6f} |" for k in steps]
    lines += ["", "| | CPU-s a step | wall s a step | peak RSS GB |", "|---|---|---|---|"]
    lines += [
        f"| {name} | {r['cpu_s_per_step']:.2f} | {r['wall_s_per_step']:.2f} |"
        f" {r['peak_rss_gb']:.2f} |"
        for name, r in record["results"].items()
    ]
    note = "From the tenth step on, so that no compilation is counted."
    return "\n".join([*lines, "", f"{note} {machine_line(record['machine'])}"])
