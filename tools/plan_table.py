"""Write docs/performance/plan.md: steps of published models, planned for accelerators.

`python tools/plan_table.py [NAME …]` compiles the cases (or those named) for devices that need not
be here, and writes the tables. It needs `pip install ".[cuda-aot,tpu]"`, and minutes a case. A
search that takes longer than SECONDS is left, and the page says so. The models are config.json
files of tests/published, or sizes given here: no weights are read.
"""

import json
import subprocess
import sys
import tempfile
import textwrap
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
SEARCH_HEAD = """
## Meshes that fit

`jaxft.plan --search N` compiles the first N settings of mesh, micro-batches and remat that may fit.
These rows are the fastest that did, of one, or of two where the first does not fit. The mesh is
data x fsdp x tensor. Rows of language models have 4096 tokens. LoRA has rank 16, all linear layers
as targets, and `param_dtype=bfloat16`.

| step | devices | batch | mesh | micro-batches | remat | GiB | ms at least | MFU up to |
|---|---|---|---|---|---|---|---|---|
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
JANUS, JANUS_7B = "janus-1b", "janus-7b"  # made here: no published config is at hand
L70 = "llama-70b"  # made here, by the published sizes
SIZES_70B = {
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
}
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
LORA_70B = {**LORA, "lora.targets": "all-linear", "param_dtype": "bfloat16"}
SEARCHES = {
    "Llama 8B full, TPU v5e-16": llm("v5e:4x4", L8, 16, **FULL),
    "Llama 8B full, TPU v6e-16": llm("v6e:4x4", L8, 16, **FULL),
    "Llama 8B full, TPU v5p-128": llm("v5p:4x4x4", L8, 64, **FULL),
    "Llama 70B LoRA, TPU v5e-16": llm("v5e:4x4", L70, 16, **LORA_70B),
    "Llama 70B LoRA on an NF4 base, TPU v5e-16": llm("v5e:4x4", L70, 16, **LORA_70B, base="nf4"),
    "Llama 70B LoRA, TPU v6e-16": llm("v6e:4x4", L70, 16, **LORA_70B),
    "Llama 70B LoRA, TPU v5p-128": llm("v5p:4x4x4", L70, 64, **LORA_70B),
    "Llama 70B LoRA, 8 H100": llm("h100:8", L70, 8, **LORA_70B),
    "SDXL UNet full at 1024, one H100": Case(
        "h100:1", "diffusion", XL, {"resolution": 1024, "batch_size": 8, "total": "100_steps"}
    ),
    "Janus 7B full, 8 H100": Case(
        "h100:8", "image_tokens", JANUS_7B, {**PICTURES, **FULL, "batch_size": 64}
    ),
}
# The first setting, with remat=dots, does not fit.
TWICE = ("Llama 8B full, TPU v5e-16", *(name for name in SEARCHES if name.startswith("Llama 70B")))
HARD, MANY = ("Llama 70B LoRA, TPU v5e-16",), 10  # settings, of which none may fit
NOTHING_FITS = "no setting of mesh, micro_batches and remat fits"  # the error of such a search
SECONDS = 1800  # of a search, at most


def plan(case: Case, seconds: int | None = None, words: tuple[str, ...] = ()) -> Any:
    """Return the record of `jaxft.plan` for a case. It may take `seconds`.

    words: further words of the command. With --search they give a list of records.
    """
    with tempfile.TemporaryDirectory() as folder:
        file, model = Path(folder) / "plan.json", ROOT / "tests" / "published" / case.model
        if case.model in (JANUS, JANUS_7B):
            model = _janus(Path(folder), case.model)
        if case.model == L70:
            config = json.loads((model.parent / L8 / "config.json").read_text())
            model = Path(folder)
            (model / "config.json").write_text(json.dumps({**config, **SIZES_70B}))
        keys = {"model": model, "data.train": "", "data.eval": "", **case.keys}
        keyed = [f"--config.{key}={value}" for key, value in keys.items()]
        command = [sys.executable, "-m", "jaxft.plan", "--config", f"configs/{case.config}.py"]
        command += ["--topology", case.topology, "--json", str(file), *words, *keyed]
        run = subprocess.run(command, cwd=ROOT, timeout=seconds, stderr=subprocess.PIPE, text=True)
        print(run.stderr, file=sys.stderr)
        run.check_returncode()
        found = json.loads(file.read_text())
    for one in found if isinstance(found, list) else [found]:
        del one["model"]  # a path of this machine
    return found


def _janus(folder: Path, model: str) -> Path:
    """Write the config of a Janus-Pro with the test suite's tokenizer. Returns the folder."""
    sys.path.insert(0, str(ROOT))
    from tests.tiny_janus import PRO_1B, PRO_7B, make_tokenizer, published

    published(*(PRO_1B if model == JANUS else PRO_7B)).save_pretrained(folder)
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


def searched(name: str) -> dict[str, Any]:
    """Return the best setting that fits, or the count that did not, or the seconds of a search."""
    tries = MANY if name in HARD else 2 if name in TWICE else 1
    try:
        return plan(SEARCHES[name], SECONDS, ("--search", str(tries)))[0]
    except subprocess.CalledProcessError as error:
        if NOTHING_FITS not in error.stderr:
            raise
        return {"refused": tries}
    except subprocess.TimeoutExpired:
        return {"left_after": SECONDS}


def search_row(name: str, found: dict[str, Any]) -> str:
    """Return the line of the table of searches."""
    mesh = " x ".join(str(found["mesh"][axis]) for axis in ("data", "fsdp", "tensor"))
    cells = (
        name,
        found["devices"],
        found["batch_size"],
        mesh,
        found["micro_batches"],
        found["remat"],
        f"{found['memory']['total'] / 2**30:.1f} of {found['memory']['limit'] / 2**30:.0f}",
        f"{1e3 * found['step_seconds']:.0f}",
        f"{found['mfu']:.0%}",
    )
    return "| " + " | ".join(map(str, cells)) + " |\n"


def page(results: dict[str, dict[str, Any]]) -> str:
    """Return the page from the figures that there are."""
    planned = "".join(row(name, results[name]) for name in CASES if name in results)
    ended = [name for name in SEARCHES if "mesh" in results.get(name, {})]
    found = "".join(search_row(name, results[name]) for name in ended)
    left: dict[str, list[str]] = {}
    for name in SEARCHES:
        if seconds := results.get(name, {}).get("left_after"):
            left.setdefault(f"Not ended within {seconds // 60} minutes", []).append(name)
        elif count := results.get(name, {}).get("refused"):
            left.setdefault(f"None of {count} settings fits", []).append(name)
        elif name not in results:
            left.setdefault("Not searched yet", []).append(name)
    missing = " ".join(f"{text}: {'; '.join(names)}." for text, names in left.items())
    end = f"\n{textwrap.fill(missing, 100)}\n" if missing else ""
    return HEAD + planned + TAIL + SEARCH_HEAD + found + end


def main(names: list[str]) -> None:
    """Plan the named cases, all by default, and write the page with the results so far."""
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for name in names or [*CASES, *SEARCHES]:
        results[name] = plan(CASES[name]) if name in CASES else searched(name)
        ordered = {name: results[name] for name in [*CASES, *SEARCHES] if name in results}
        RESULTS.write_text(json.dumps(ordered, indent=1) + "\n")
        PAGE.write_text(page(ordered))


if __name__ == "__main__":
    main(sys.argv[1:])
