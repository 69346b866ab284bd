"""Write docs/memory.md: the memory of a training step by model, method and length or size.

`python tools/memory_table.py [NAME …]` compiles the steps for a GPU that need not be here, and
writes the page. A name is a model, such as `SDXL`, or a row, such as `SDXL, LoRA`. It needs
`pip install ".[cuda-aot]"`, and half a minute a step. A step that takes longer than 9 minutes is
left, and the page says so. The models are config.json files of tests/published, or sizes given
here: no weights are read.
"""

import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from plan_table import ROOT, SIZES_70B, Case, plan

PAGE = ROOT / "docs" / "memory.md"
RESULTS = ROOT / "docs" / "performance" / "memory.json"
CARDS = (8, 16, 24, 80)
SECONDS = 540  # of a compile, at most
FREE = 0.1  # of a card's memory, for the driver and for fragments
BASE = {"total": "100_steps", "batch_size": 1, "remat": "full"}
LORA = {"lora.rank": 16, "param_dtype": "bfloat16"}
LINEAR = {**LORA, "lora.targets": "all-linear"}
METHODS = {
    "full": {"lora.rank": 0},
    "full, `adamw_8bit`": {"lora.rank": 0, "optim.name": "adamw_8bit"},
    "LoRA": LINEAR,
    "NF4 LoRA": {**LINEAR, "base": "nf4"},
}
UNET = {
    "full": {},
    "full, `adamw_8bit`": {"optim.name": "adamw_8bit"},
    "LoRA": LORA,
    "NF4 LoRA": {**LORA, "base": "nf4"},
}
LENGTHS = (2048, 8192)
L8 = "Llama-3.1-8B-Instruct"
# Sizes of published models without a config.json in tests/published, as changes of a neighbour's.
DERIVED = {
    "SmolLM2 360M": {
        "hidden_size": 960,
        "intermediate_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 15,
        "num_key_value_heads": 5,
    },
    "14B (40 x 128 heads, 48 layers)": {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "vocab_size": 152064,
    },
    "Llama 3.1 70B": SIZES_70B,
}
# Far above every card, or close to a neighbour.
LEFT_OUT = {
    "SmolLM2 135M": ("full, `adamw_8bit`",),
    "SmolLM2 360M": ("full, `adamw_8bit`",),
    "14B (40 x 128 heads, 48 layers)": ("full", "full, `adamw_8bit`"),
    "Llama 3.1 70B": ("full", "full, `adamw_8bit`"),
}
MODELS = {
    "SmolLM2 135M": "SmolLM2-135M",
    "SmolLM2 360M": "SmolLM2-135M",
    "Llama 3.2 1B": "Llama-3.2-1B-Instruct",
    "Llama 3.1 8B": L8,
    "14B (40 x 128 heads, 48 layers)": L8,
    "Llama 3.1 70B": L8,
}
PIPELINES = {
    "Stable Diffusion 1.5": ("stable-diffusion-v1-5", 512, ("full", "LoRA")),
    "SDXL": ("stable-diffusion-xl-base-1.0", 1024, tuple(UNET)[:3]),
    "Stable Diffusion 3 medium": ("stable-diffusion-3-medium-diffusers", 1024, ("LoRA",)),
    "FLUX.1-dev": ("FLUX.1-dev", 1024, ("LoRA", "NF4 LoRA")),
}


class Row(NamedTuple):
    """A line of a table: a model, a method, and lengths or a size in tokens or pixels."""

    model: str
    method: str
    config: str
    values: tuple[int, ...]
    folder: str
    keys: dict[str, Any]


ROWS = [
    Row(model, method, "llm", LENGTHS, folder, {**keys, "pack": False})
    for model, folder in MODELS.items()
    for method, keys in METHODS.items()
    if method not in LEFT_OUT.get(model, ())
] + [
    Row(model, method, "diffusion", (size,), folder, UNET[method])
    for model, (folder, size, methods) in PIPELINES.items()
    for method in methods
]
HEAD = """# What fits on a card

Find the model, and the card that is enough to train it:

```bash
python -m jaxft.plan --config configs/llm.py --topology h100:1 --config.model=path/to/folder \\
    --config.batch_size=1 --config.remat=full --config.seq_len=2048
```

The command prints the memory of your own settings, without the card, weights or data.
`python tools/memory_table.py` ran it for the tables below. Every figure is that of a step compiled
for one H100 with `batch_size=1` (one row of the length above it, or one picture) and `remat=full`.
**No card has measured them.** A larger batch in as many `micro_batches` needs the memory of one
row, and for a full training the sum of its gradients. "Full" is float32 with AdamW
(`lora.rank=0`). LoRA has rank 16 and `param_dtype=bfloat16`, for language models
`lora.targets=all-linear`. NF4 is `base=nf4`.

GiB of a step, and the smallest card of 8, 16, 24 or 80 GB on which a tenth stays free. A dash is
more than 80 GB: divide the model over several devices ([scale.md](scale.md)).
"""
TAIL = """
The rows of pipelines count all networks, as without `cache` (T5 of SD 3 and FLUX.1 alone has 4.8 G
parameters). With it, the text encoders and the VAE are not in memory beside the denoiser: a step of
Stable Diffusion 3 medium needs 4.7 GiB then, and one of FLUX.1-dev with `base=nf4` 8.5. T5 lies
alone in memory before it ([diffusion.md](diffusion.md#what-is-in-memory)).

{missing}`python tools/memory_table.py "SDXL"` plans the rows of a model.
[adapters.md](adapters.md#a-quantised-base-qlora) has Llama 8B with a base in 8 and in 4 bits, and
[plan.md](performance/plan.md) all of SD 1.5 and SDXL in larger batches.

The first table has no row for all of a 14B or a 70B model. In float32 with AdamW each parameter
needs 16 bytes with its gradient, about 210 and 1050 GiB, which many devices share.

JAX takes three quarters of a GPU's memory by default. Give it nearly all with
`export XLA_PYTHON_CLIENT_MEM_FRACTION=0.92`.

A step that does not fit is refused before it runs, in one line that names the keys that need less:
[scale.md](scale.md#plan-a-run-before-you-have-the-devices). These keys cost the least, in this
order: `remat=full`, `micro_batches` equal to `batch_size`, `optim.name=adamw_8bit`, `lora.rank=16`,
`base=nf4`, and at last a shorter `seq_len` or a smaller `resolution`.
"""


def planned(row: Row, value: int) -> dict[str, Any]:
    """Return the bytes of a step, or the seconds after which its compile was left."""
    with tempfile.TemporaryDirectory() as folder:
        place = row.folder
        if row.model in DERIVED:
            config = json.loads((ROOT / "tests" / "published" / place / "config.json").read_text())
            text = json.dumps({**config, **DERIVED[row.model]})
            (Path(folder) / "config.json").write_text(text)
            place = folder
        key = "seq_len" if row.config == "llm" else "resolution"
        keys = {**BASE, **row.keys, key: value}
        try:
            return plan(Case("h100:1", row.config, place, keys), SECONDS)["memory"]
        except subprocess.TimeoutExpired:
            return {"seconds": SECONDS}


def card(size: float) -> str:
    """Return the smallest card that is enough for `size` bytes, such as `24 GB`."""
    enough = [one for one in CARDS if size <= (1 - FREE) * one * 2**30]
    return f"{enough[0]} GB" if enough else "–"


def texts(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of language models from the figures that there are."""
    heads = [head for x in LENGTHS for head in (f"{x} tokens, GiB", "card")]
    lines = [["model", "method", *heads], ["---"] * 6]
    for row in ROWS:
        found = [cells for x in row.values for cells in measured(row, x, results)]
        if row.config == "llm" and any(found):
            lines.append([row.model, row.method, *found])
    return joined(lines)


def pictures(results: dict[str, dict[str, Any]]) -> str:
    """Return the table of pipelines from the figures that there are."""
    lines = [["model", "method", "picture", "GiB", "card"], ["---"] * 5]
    for row in ROWS:
        (size, *_), found = row.values, measured(row, row.values[0], results)
        if row.config == "diffusion" and any(found):
            lines.append([row.model, row.method, f"{size} x {size}", *found])
    return joined(lines)


def measured(row: Row, value: int, results: dict[str, dict[str, Any]]) -> tuple[str, str]:
    found = results.get(name(row, value), {})
    if "seconds" in found:
        return f"not compiled in {found['seconds'] // 60} min", ""
    size = found.get("total")
    return (f"{size / 2**30:.1f}", card(size)) if size else ("", "")


def joined(lines: list[list[str]]) -> str:
    return "\n" + "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def name(row: Row, value: int) -> str:
    return f"{row.model}, {row.method}, {value}"


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return the page from the figures that there are."""
    return HEAD + texts(results) + pictures(results) + TAIL.format(missing=missing(results))


def missing(results: dict[str, dict[str, Any]]) -> str:
    """Return the lines about rows without all of their figures."""
    rows = [one for one in ROWS if any(name(one, x) not in results for x in one.values)]
    if not rows:
        return ""
    shown = ", ".join(f"{one.model} ({one.method})" for one in rows)
    return textwrap.fill(f"Not planned yet: {shown}.", 100) + "\n"


def main(names: list[str]) -> None:
    """Plan the steps of the models or rows named, all by default, and write the page."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    wanted = [
        one
        for one in ROWS
        if not names or one.model in names or f"{one.model}, {one.method}" in names
    ]
    for row, value in ((one, value) for one in wanted for value in one.values):
        results[name(row, value)] = planned(row, value)
        ordered = {key: results[key] for key in KEYS if key in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.write_text(page(ordered))


KEYS = [name(row, value) for row in ROWS for value in row.values]

if __name__ == "__main__":
    main(sys.argv[1:])
