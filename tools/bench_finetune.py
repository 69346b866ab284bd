"""The whole job a user does: `python -m jaxft.train` beside TRL + PEFT."""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from bench_llm import RANK
from benching import ROOT, machine, machine_line, report, watch


def bench_finetune(args: argparse.Namespace) -> None:
    """jaxft first, then TRL + PEFT, each in a process of its own (this one stays small)."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    me = [sys.executable, str(ROOT / "tools" / "bench.py")]
    with tempfile.TemporaryDirectory(prefix="jaxft-bench-") as name:
        work, folder = Path(name) / "run", Path(name) / "model"
        subprocess.run([*me, "folder", args.model, str(folder)], check=True, cwd=ROOT)
        command = [sys.executable, "-m", "jaxft.train", "--config=configs/llm.py"]
        command += [f"--workdir={work}", f"--config.model={args.model}"]
        command += [f"--config.total={args.steps}_steps", f"--config.eval_examples={args.rows}"]
        ours, _ = watch(command)
        before = json.loads((work / "before.json").read_text())["metrics"]["accuracy"]
        records = map(json.loads, (work / "metrics.jsonl").read_text().splitlines())
        after = [row["eval_accuracy"] for row in records if "eval_accuracy" in row][-1]
        ours |= {"accuracy_before": before, "accuracy_after": after}
        theirs, last = watch(
            [sys.executable, "tools/trl_peer.py", str(folder), str(args.steps), str(args.rows)]
        )
        theirs |= json.loads(last)
    results = {"jaxft": ours, "TRL + PEFT": theirs}
    settings = {"model": args.model, "steps": args.steps, "rows": args.rows}
    record = {"settings": settings, "machine": machine(), "results": results}
    report("finetune-cpu", record, _section(record), args.out)


def _section(record: dict[str, Any]) -> str:
    s = record["settings"]
    lines = [
        f"{s['model']}, LoRA r={RANK} on q, k, v, o, lr 1e-3, batch 8, {s['steps']} steps, fp32,"
        f" loss on the label, accuracy on {s['rows']} random validation rows.",
        "",
        "| | accuracy before | after | CPU-s a step | wall s a step | peak RSS GB | whole run s |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in record["results"].items():
        lines.append(
            f"| {name} | {r['accuracy_before']:.1%} | {r['accuracy_after']:.1%} |"
            f" {r['cpu_s_per_step']:.2f} | {r['wall_s_per_step']:.2f} | {r['peak_rss_gb']:.2f} |"
            f" {r['total_s']:.0f} |"
        )
    return "\n".join([*lines, "", machine_line(record["machine"])])
