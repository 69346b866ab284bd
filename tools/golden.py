"""Golden figures: what five steps of every task give, written once and compared bit for bit.

    python tools/golden.py write [CASE …]      # all, or these, into tests/golden/figures.json
    python tools/golden.py compare [CASE …]    # print what differs; 1 if anything does

A refactoring of the package must change no figure, so this file reaches it by what survives one:
the three commands, `configs/*.py`, and the formats of metrics.jsonl, safetensors and PNG.
`tests/test_golden.py` compares them. Set GOLDEN_KEEP to an empty folder to look at
the runs afterwards.
"""

import contextlib
import importlib.metadata
import io
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from golden_figures import differences, folder_figures, losses, sample_figures
from golden_material import write_material

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "tests" / "golden" / "figures.json"
PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "pillow", "tokenizers", "transformers")
PROCESSOR = ("model name", "cpu family", "model", "CPU implementer", "CPU part")
# Compiling takes a third of the time so. A refactoring that leaves the program as it is leaves
# these bits too.
QUICK = {
    "XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}
COMMON = {
    "total": "5_steps",
    "batch_size": 8,
    "data.eval": "",
    "optim.warmup": "2_steps",
    "every.save": "0_steps",
}
TEXTS = {"seq_len": 48, "data.train": "jsonl:{folder}/labelled.jsonl", "lora.rank": 0}
LORA = {"lora.rank": 4, "optim.lr": 1e-2}
TOKEN_LORA = {**LORA, "lora.targets": r".*self_attn\.[qkvo]_proj"}
MESH = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2}
EMOJI = {"data.train": "demo:emoji/valid"}
PICTURES = {"data.train": "folder:{folder}/pictures", "resolution": 32}
DRAWN = {"cache": "{cache}", "sample.prompts": "['stone river']"}
DEMO_SD = {**EMOJI, **DRAWN, "sample.steps": 4}
TINY_SD = {
    **PICTURES,
    **DRAWN,
    "model": "{folder}/pipeline",
    "resolution": 16,
    "sample.steps": 2,
    "optim.lr": 1e-3,
}
TOKENS = {**PICTURES, **DRAWN, "resolution": 64, "batch_size": 4}
TOKEN_MESH = {"mesh.data": 4, "mesh.fsdp": 2}  # its 5 heads divide by no tensor axis
VAE = {**PICTURES, "trainable": ".*", "loss.perceptual": 0.0, "optim.lr": 1e-3}
ADVERSARIAL = {"loss.adversarial": 0.5, "loss.adversarial_start": "2_steps"}


@dataclass(frozen=True)
class Case:
    """One run of five steps, what is exported of it beside its own export, and what is sampled."""

    config: str
    changes: Mapping[str, Any]
    devices: int = 1
    kinds: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()
    slow: bool = False
    optimised: bool = False  # compile as the commands do by themselves, not `QUICK`


def _text(model: str, changes: Mapping[str, Any] = {}, **settings: Any) -> Case:
    return Case("llm", {"model": f"{{folder}}/{model}", **TEXTS, **changes}, **settings)


WRITE = ("--prompt=stone river", "--raw", "--max_new=12")
DRAW = ("--prompt=stone river", "--seed=1")
CASES: dict[str, Case] = {
    "llm-full": _text("llama", {"pack": False}, sample=WRITE),
    "llm-packed": _text("mistral", {"pack": True}),
    "llm-micro-batches": _text("llama-tied", {"pack": False, "micro_batches": 2}),
    "llm-lora-dropout": _text("qwen3", {**TOKEN_LORA, "lora.dropout": 0.2}, kinds=("adapter",)),
    "llm-ema": _text("smollm3", {"optim.ema": 0.9}, sample=(*WRITE, "--temperature=1", "--seed=3")),
    "llm-window": _text("qwen2-alternating", {"data.train": "jsonl:{folder}/texts.jsonl"}),
    "llm-deep": _text("llama-deep"),
    "llm-8-devices": _text("llama", MESH, devices=8),
    "llm-window-8-devices": _text("qwen2-alternating", MESH, devices=8, slow=True),
    "llm-optimised": _text("llama", sample=WRITE, slow=True, optimised=True),
    "diffusion-ema": Case("diffusion", {**TINY_SD, "optim.ema": 0.9}),
    "diffusion-lora": Case("diffusion", {**TINY_SD, **LORA, "trainable": ""}, kinds=("all",)),
    "diffusion-micro-batches": Case(
        "diffusion", {**TINY_SD, "micro_batches": 2}, sample=DRAW, slow=True
    ),
    "diffusion-8-devices": Case("diffusion", TINY_SD, devices=8, slow=True),
    "image-tokens-full": Case("image_tokens", TOKENS, sample=DRAW),
    "image-tokens-lora": Case(
        "image_tokens", {**TOKENS, **TOKEN_LORA}, kinds=("adapter",), slow=True
    ),
    "image-tokens-8-devices": Case(
        "image_tokens", {**TOKENS, **TOKEN_MESH, "batch_size": 8}, devices=8, slow=True
    ),
    "autoencoder": Case("autoencoder", {"model": "{folder}/pipeline", **VAE}),
    "autoencoder-vq-adversarial": Case(
        "autoencoder",
        {"model": "{folder}/vq", **VAE, **ADVERSARIAL, "loss.revive": 0.1},
        slow=True,
    ),
    "demo-image-tokens": Case(
        "image_tokens", {**EMOJI, **DRAWN}, sample=DRAW, slow=True, optimised=True
    ),
    "demo-diffusion-ema": Case("diffusion", {**DEMO_SD, "optim.ema": 0.9}, sample=DRAW, slow=True),
    "demo-diffusion-micro-batches": Case("diffusion", {**DEMO_SD, "micro_batches": 2}, slow=True),
    "demo-diffusion-lora": Case(
        "diffusion",
        {**DEMO_SD, **LORA, "trainable": ""},
        kinds=("all",),
        sample=DRAW,
        slow=True,
    ),
    "demo-diffusion-8-devices": Case("diffusion", DEMO_SD, devices=8, slow=True),
    "demo-autoencoder": Case("autoencoder", EMOJI, slow=True, optimised=True),
}


# ---- one case, inside a process that has its devices --------------------------------------------


def serve(folder: Path) -> None:
    """Run the cases that standard input names, one a line, and answer each with a line of JSON."""
    answers = sys.stdout
    for line in sys.stdin:
        began = time.process_time()
        log = io.StringIO()
        try:
            with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
                answer: dict[str, Any] = {"figures": run_case(line.strip(), folder)}
        except Exception:
            answer = {"error": log.getvalue()[-4000:] + traceback.format_exc()}
        answer["cpu_s"] = time.process_time() - began
        print(json.dumps(answer), file=answers, flush=True)


def run_case(name: str, folder: Path) -> dict[str, Any]:
    """Train, export and sample one case; return its figures.

    folder: holds the material. The run's own folder is made beside it.
    """
    import jaxft.export
    import jaxft.sample
    import jaxft.train

    case = CASES[name]
    run = folder / "runs" / name
    places = {"folder": folder, "cache": folder / f"cache-{case.devices}"}
    changes = {**COMMON, **case.changes}
    flags = [f"--config.{key}={str(value).format(**places)}" for key, value in changes.items()]
    config = ROOT / "configs" / f"{case.config}.py"
    _command(jaxft.train.main, ["--config", str(config), "--workdir", str(run), *flags])
    exports = folder_figures(run / "export", folder)
    for kind in case.kinds:
        out = run / f"export-{kind}"
        _command(jaxft.export.main, ["--workdir", str(run), "--kind", kind, "--out", str(out)])
        exports |= {f"{kind}/{key}": value for key, value in folder_figures(out, folder).items()}
    samples: dict[str, Any] = {}
    if case.sample:
        text = _command(jaxft.sample.main, ["--workdir", str(run), *case.sample])
        samples["printed"] = text.replace(str(folder), "FOLDER")
    samples |= sample_figures(run / "samples")
    return {"losses": losses(run / "metrics.jsonl"), "exports": exports, "samples": samples}


def _command(main: Any, arguments: list[str]) -> str:
    """Run a command and return what it prints. Raises RuntimeError where it fails."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = main(arguments)
    print(printed.getvalue())
    if code:
        raise RuntimeError(f"exit code {code} of {' '.join(arguments)}")
    return printed.getvalue()


# ---- processes ----------------------------------------------------------------------------------


class Made(NamedTuple):
    """The figures of a case and the CPU time that they cost."""

    figures: dict[str, Any]
    cpu_s: float


@dataclass
class Workers:
    """Processes that run cases. One serves all cases of its devices, which share imports."""

    folder: Path
    running: dict[tuple[int, bool], subprocess.Popen] = field(default_factory=dict)

    def __enter__(self) -> "Workers":
        write_material(self.folder)
        return self

    def run(self, name: str) -> Made:
        """Run a case. Raises RuntimeError with the end of its output where it fails."""
        needs = CASES[name].devices, CASES[name].optimised
        if needs not in self.running:
            self.running[needs] = _start_worker(self.folder, *needs)
        worker = self.running[needs]
        assert worker.stdin and worker.stdout
        worker.stdin.write(name + "\n")
        worker.stdin.flush()
        line = worker.stdout.readline()
        if not line:
            del self.running[needs]
            log = (self.folder / "stderr.log").read_text()[-4000:]
            raise RuntimeError(f"{name}: the process ended with {worker.wait()}\n{log}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(f"{name}: {answer['error']}")
        return Made(answer["figures"], answer["cpu_s"])

    def __exit__(self, *_: object) -> None:
        for worker in self.running.values():
            assert worker.stdin
            worker.stdin.close()
            worker.wait()


def _start_worker(folder: Path, devices: int, optimised: bool) -> subprocess.Popen:
    """Start a process with so many virtual devices; of jax's own settings it inherits none."""
    quick = {} if optimised else QUICK
    flags = f"--xla_force_host_platform_device_count={devices} {quick.get('XLA_FLAGS', '')}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_")}
    environment |= {
        **quick,
        "XLA_FLAGS": flags.strip(),
        "JAX_PLATFORMS": "cpu",
        "HF_HUB_OFFLINE": "1",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": str(ROOT),
    }
    with (folder / "stderr.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, __file__, "serve", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
            cwd=folder,
        )


# ---- comparing ----------------------------------------------------------------------------------


def machine() -> dict[str, Any]:
    """Return what decides which bits XLA computes here: the processor, its cores, the packages."""
    known: dict[str, str] = {}
    with contextlib.suppress(OSError):
        pairs = (line.split(":", 1) for line in Path("/proc/cpuinfo").read_text().splitlines())
        known = {pair[0].strip(): pair[1].strip() for pair in pairs if len(pair) == 2}
    wide = ("avx", "fma", "amx", "sve")
    instructions = known.get("flags", known.get("Features", "")).split()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "processor": " ".join(known[key] for key in PROCESSOR if key in known),
        "architecture": platform.machine(),
        "instructions": " ".join(sorted(word for word in instructions if word.startswith(wide))),
        "cores": int(os.environ.get("NPROC", cores or 1)),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def read_figures() -> dict[str, Any]:
    return json.loads(FIGURES.read_text(encoding="utf-8"))


def main(arguments: list[str]) -> int:
    if len(arguments) == 2 and arguments[0] == "serve":
        serve(Path(arguments[1]))
        return 0
    unknown = set(arguments[1:]) - CASES.keys()
    if not arguments or arguments[0] not in ("write", "compare") or unknown:
        print(__doc__, *sorted(unknown), "cases:", *CASES, sep="\n")
        return 2
    writes, names = arguments[0] == "write", arguments[1:] or list(CASES)
    stored = read_figures() if FIGURES.exists() else {"machine": machine(), "cases": {}}
    exact = stored["machine"] == machine()
    if writes and not exact and set(names) != CASES.keys():
        print("the stored figures are of another kind of machine: write all of them")
        return 2
    print(f"comparing {'bit for bit' if exact else 'within tolerances: another kind of machine'}")
    made, found = _run_all(names, stored["cases"], exact)
    if writes:
        cases = {name: made.get(name, stored["cases"].get(name)) for name in CASES}
        kept = {name: figures for name, figures in cases.items() if figures is not None}
        content = json.dumps({"machine": machine(), "cases": kept}, indent=1, ensure_ascii=False)
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(content + "\n", encoding="utf-8")
    return int(found and not writes)


def _run_all(
    names: Iterable[str], stored: Mapping[str, Any], exact: bool
) -> tuple[dict[str, Any], bool]:
    """Run the cases and print a row for each, then what differs; return the figures."""
    made, found = {}, False
    with contextlib.ExitStack() as stack:
        folder = os.environ.get("GOLDEN_KEEP") or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="golden-")
        )
        workers = stack.enter_context(Workers(Path(folder)))
        for name in names:
            figures, seconds = workers.run(name)
            made[name] = figures
            lines = differences(stored.get(name, {}), figures, exact, name)
            verdict = f"{len(lines)} differences" if lines else "equal"
            print(
                f"{name:<30} {seconds:6.1f} CPU s  {verdict}", *lines[:20], sep="\n  ", flush=True
            )
            found = found or bool(lines)
    return made, found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
