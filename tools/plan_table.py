"""Write docs/performance/plan.md: steps of published models, planned for accelerators.

`python tools/plan_table.py [NAME …]` compiles the cases (or those named) for devices that need not
be here, and writes the table. It needs `pip install ".[cuda-aot,tpu]"`, and minutes a case. The
models are config.json files of tests/published: no weights are read.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance" / "plan.md"
RESULTS = ROOT / "docs" / "performance" / "plan.json"
FULL = {"lora.rank": 0, "lora.targets": "", "trainable": ""}
LORA = {"lora.rank": 16}
PICTURES = {"resolution": 384, "total": "100_steps"}
HEAD = """# Steps of published models, planned for accelerators

`python tools/plan_table.py` writes this page from `jaxft.plan`, on a machine without these devices.
Times and MFU are bounds that follow from the compiled program: each instruction takes as long as
its FLOPs at 75 % of the peak, or its bytes at 85 % of the memory's bandwidth. **No device has
measured them.** Memory (GiB of a device), traffic and collectives are exact.

| step | devices | batch | remat | GiB | fits | traffic GiB | ms at least | MFU up to | most of it |
|---|---|---|---|---|---|---|---|---|---|
"""
TAIL = """
**SDXL stays below 50 %.** 505 of its 751 GiB are elementwise work. Its gates (GEGLU) account for a
quarter of that time: in each of six blocks of ten layers, [8, 1024, 10240] is split, stored for the
backward pass in a stack of all layers, read from there, and computed again, at 3 to 4 GiB a pass.
**Llama 8B on 16 TPU v5e** does not fit with remat=dots, and `remat=auto` chooses full: a quarter of
the work is recomputation, which MFU does not count.
"""


class Case(NamedTuple):
    """A step to plan: devices, config file, model folder, and further keys."""

    topology: str
    config: str
    model: str
    keys: dict[str, Any]


def llm(topology: str, model: str, batch: int, **more: Any) -> Case:
    keys = {"seq_len": 4096, "batch_size": batch, "total": "100_steps"}
    return Case(topology, "llm", model, {**keys, **more})


L1, L8 = "Llama-3.2-1B-Instruct", "Llama-3.1-8B-Instruct"
SD, XL, VAE = "stable-diffusion-v1-5", "stable-diffusion-xl-base-1.0", "sd-vae-ft-mse"
JANUS = "janus-1b"  # made here: its config is not among the published ones
CASES = {
    "Llama 1B full, packed": llm("h200:1", L1, 8, **FULL),
    "Llama 1B full, one example a row": llm("h200:1", L1, 8, **FULL, pack=False),
    "Llama 1B LoRA, packed": llm("h200:1", L1, 8, **LORA),
    "Llama 8B full, packed": llm("h200:8", L8, 8, **FULL),
    "Llama 8B full, one example a row": llm("h200:8", L8, 8, **FULL, pack=False),
    "Llama 8B LoRA, packed": llm("h200:1", L8, 4, **LORA, param_dtype="bfloat16"),
    "SD 1.5 UNet at 512": Case(
        "h200:1", "diffusion", SD, {"resolution": 512, "batch_size": 16, "total": "100_steps"}
    ),
    "SDXL UNet at 1024": Case(
        "h200:1", "diffusion", XL, {"resolution": 1024, "batch_size": 8, "total": "100_steps"}
    ),
    "Janus 1B full": Case("h200:1", "image_tokens", JANUS, {**PICTURES, **FULL, "batch_size": 32}),
    "VAE decoder at 256": Case(
        "h200:1", "autoencoder", VAE, {"resolution": 256, "batch_size": 32, "total": "100_steps"}
    ),
    "Llama 8B full, packed, TPU v5e": llm("v5e:4x4", L8, 16, **FULL),
}


def plan(case: Case, seconds: int | None = None) -> dict[str, Any]:
    """Return the record of `jaxft.plan` for a case. It may take `seconds`."""
    with tempfile.TemporaryDirectory() as folder:
        file, model = Path(folder) / "plan.json", ROOT / "tests" / "published" / case.model
        if case.model == JANUS:
            model = _janus(Path(folder))
        keys = {"model": model, "data.train": "", "data.eval": "", **case.keys}
        words = [f"--config.{key}={value}" for key, value in keys.items()]
        command = [sys.executable, "-m", "jaxft.plan", "--config", f"configs/{case.config}.py"]
        command += ["--topology", case.topology, "--json", str(file), *words]
        subprocess.run(command, cwd=ROOT, check=True, timeout=seconds)
        return json.loads(file.read_text())


def _janus(folder: Path) -> Path:
    """Write the config of Janus-Pro 1B with the test suite's tokenizer. Returns the folder."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny_janus import PRO_1B, make_tokenizer, published

    published(*PRO_1B).save_pretrained(folder)
    make_tokenizer(folder)
    return folder


def row(name: str, found: dict[str, Any]) -> str:
    """Return the line of the table."""
    gib = 2**30
    most = (
        max(found["seconds"], key=lambda kind: found["seconds"][kind]) if found["seconds"] else ""
    )
    cells = (
        name,
        found["devices"],
        found["batch_size"],
        found["remat"],
        f"{found['memory']['total'] / gib:.1f}",
        "yes" if found["fits"] else "no",
        f"{sum(found['traffic'].values()) / gib:.0f}",
        f"{1e3 * found['step_seconds']:.0f}",
        f"{found['mfu']:.0%}",
        most.replace("_", " "),
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def main(names: list[str]) -> None:
    """Plan the named cases, all by default, and write the page with the results so far."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or CASES:
        results[name] = plan(CASES[name])
        ordered = {name: results[name] for name in CASES if name in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.write_text(HEAD + "".join(row(*one) for one in ordered.items()) + TAIL)


if __name__ == "__main__":
    main(sys.argv[1:])
