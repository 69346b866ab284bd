"""The card of an export, README.md: what it is made of, what was measured, how to load it."""

import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub

from jaxft.core.config import flatten_config
from jaxft.core.configs.schema import Config
from jaxft.core.errors import UserError
from jaxft.runs.opening import Run
from jaxft.runs.pages.records import read_history, read_json
from jaxft.weights.adapters.pipeline import LOKR_END
from jaxft.weights.locate import locate

CARD, BASE_CARD = "README.md", "BASE_README.md"
EXPORT_FOLDER = "path/of/this/folder"
_KEYS = (  # of the table of settings, where the task has them
    *("seed", "batch_size", "micro_batches", "seq_len", "resolution", "objective", "optim.name"),
    *("optim.lr", "optim.schedule", "optim.warmup", "optim.weight_decay", "optim.clip"),
    *("optim.ema", "lora.rank", "lora.alpha", "lora.dropout", "lora.targets", "trainable"),
    *("template", "caption_dropout", "min_snr_gamma", "compute_dtype", "param_dtype"),
)
_OFF = (0, 0.0, "", False, None)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def write_card(
    folder: Path, run: Run, name: str, workdir: Path | None, step: int, member: str = ""
) -> None:
    """Write README.md of an export in `folder`. The base's own is kept as BASE_README.md.

    workdir: the run folder with the measures of `step`, None if nothing was measured. member: its
    name in a sweep, whose measures are KEY/MEMBER.
    """
    if (folder / CARD).exists():
        (folder / CARD).replace(folder / BASE_CARD)
    licence = find_licence(run.cfg.model, folder / BASE_CARD)
    library, lines = loading(folder, run)
    tags = ["- jaxft", *(["- lora"] if _adapter(folder) else [])]
    head = [f"library_name: {library}", "tags:", *tags]
    if licence:
        head.append(f"license: {licence}")
    if _HUB_ID.fullmatch(run.cfg.model) and not Path(run.cfg.model).exists():
        head.append(f"base_model: {run.cfg.model}")
    parts = [
        "\n".join(["---", *head, "---"]),
        f"# {name}",
        f"Fine-tuned with jaxft{_version(workdir)} from `{_public(run.cfg.model)}`.",
        _table(("", ""), _facts(folder, run, licence, step)),
        "## How to load it",
        f"```python\n{lines}\n```",
        "## What was measured",
        _measured(run.cfg, workdir, step, member),
        "## Settings",
        _table(("key", "value"), _settings(run.cfg)),
    ]
    (folder / CARD).write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _facts(folder: Path, run: Run, licence: str, step: int) -> Iterator[tuple[str, str]]:
    cfg = run.cfg
    count = sum(math.prod(leaf.shape) for leaf in run.trained_leaves.values())
    whole = sum(math.prod(leaf.shape) for leaf in run.leaves.values())
    yield "base", f"`{_public(cfg.model)}` ({run.opened.describe()})"
    card = f", whose card is {BASE_CARD}" if (folder / BASE_CARD).exists() else ""
    yield "licence of the base", f"{licence}, as its card says{card}" if licence else "not stated"
    yield "training data", f"`{_public(cfg.data.train)}`"
    yield "steps", f"{step:,}"
    yield "trained parameters", f"{count:,} of {whole:,}"


def _version(workdir: Path | None) -> str:
    versions = read_json(workdir / "manifest.json").get("versions") if workdir else None
    return f" {versions['jaxft']}" if versions and versions.get("jaxft") else ""


def _measured(cfg: Config, workdir: Path | None, step: int, member: str) -> str:
    """Return the table of measures of this step, and on what they were taken."""
    now = read_history(workdir).measures(step) if workdir else {}
    if not now or workdir is None:
        return "Nothing was measured at this step."
    before = read_json(workdir / "before.json").get("metrics") or {}
    rows = [
        (name.removesuffix(f"/{member}"), _number(before.get(name)), _number(value))
        for name, value in now.items()
        if isinstance(value, int | float) and name.endswith(f"/{member}" if member else "")
    ]
    table = _table(("measure", "before training", f"step {step}"), rows)
    on = f"On `{_public(cfg.data.eval)}`, by the evaluation of the run. Nothing else was measured."
    return f"{on}\n\n{table}"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, int | float) else "–"


def _settings(cfg: Config) -> Iterator[tuple[str, str]]:
    leaves: Mapping[str, Any] = {**flatten_config(_plain(cfg)), **flatten_config(cfg.own)}
    for key in _KEYS:
        if leaves.get(key) not in _OFF:
            yield key, f"`{leaves[key]}`"


def _plain(cfg: Config) -> dict[str, Any]:
    own = {"optim": vars(cfg.optim), "lora": vars(cfg.lora)}
    return {**vars(cfg), **own, "own": {}}


def _table(heads: tuple[str, ...], rows: Any) -> str:
    lines = [heads, tuple("---" for _ in heads), *rows]
    cells = (" | ".join(str(c).replace("|", "\\|").replace("\n", "\\n") for c in r) for r in lines)
    return "\n".join(f"| {line} |" for line in cells)


def _public(spec: str) -> str:
    """Return a model or data spec, or a mixture, without the folders of this machine."""
    if _HUB_ID.fullmatch(spec):
        return spec
    return re.sub(r"(?:([a-z]+):)?([^\s+*]*/[^\s+*]+)", _without_folders, spec)


def _without_folders(found: re.Match[str]) -> str:
    """Return a name that is no path, such as demo:novel/train, whole, and of a path the end."""
    scheme, place = found[1], found[2]
    hub = scheme == "hf" and re.match(r"[\w.-]+/[\w.-]+(?=:|@|$)", place)
    if scheme in ("demo", "tfds") or (hub and not Path(hub[0]).is_dir()):
        return found[0]
    end = re.sub(r".*/(?=[^/])", "", place)
    return f"{scheme}:{end}" if scheme else end


def find_licence(model: str, card: Path) -> str:
    """Return the licence in the card of the base, "" if it states none.

    Nothing is fetched: of a model on the hub, the copy on this machine is read.
    """
    cards = [card]
    try:
        if model.startswith(("pip:", "demo:")) or Path(model).expanduser().is_dir():
            cards.append(locate(model, "config.json", False) / CARD)
        elif _HUB_ID.fullmatch(model):
            kept = huggingface_hub.snapshot_download(model, local_files_only=True)
            cards.append(Path(kept) / CARD)
    except (UserError, OSError, ValueError):
        pass
    for one in cards:
        text = one.read_text(encoding="utf-8", errors="replace") if one.is_file() else ""
        head = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        found = re.search(r"^license:\s*[\"']?([\w.+-]+)", head[1], re.MULTILINE) if head else None
        if found:
            return found[1]
    return ""


def _adapter(folder: Path) -> bool:
    names = ("adapter_config.json", "pytorch_lora_weights.safetensors")
    return any((folder / name).exists() for name in names) or any(folder.glob(f"*{LOKR_END}"))


def loading(folder: Path, run: Run) -> tuple[str, str]:
    """Return the library that reads an export, and the lines that load it, by the files in it."""
    base = _public(run.cfg.model)
    if not _HUB_ID.fullmatch(base):
        base = f"path/of/the/base/{base}"
    index, config = read_json(folder / "model_index.json"), read_json(folder / "config.json")
    architecture = next(iter(config.get("architectures") or ()), "")
    names = {file.name for file in folder.iterdir()}
    if single := [name for name in sorted(names) if name.endswith(".gguf")]:
        call = f'model = jaxft.load("{EXPORT_FOLDER}/{single[0]}")'
        return "gguf", f"import jaxft\n\n{call}  # or llama.cpp, with the same file"
    if index:
        return "diffusers", _pipeline_lines(folder, index)
    pipeline = _lines("diffusers", "DiffusionPipeline", "pipeline", base)
    if "pytorch_lora_weights.safetensors" in names:
        call = f'"{EXPORT_FOLDER}", weight_name="pytorch_lora_weights.safetensors"'
        return "diffusers", f"{pipeline}\npipeline.load_lora_weights({call})"
    if any(name.endswith(LOKR_END) for name in names):
        flags = f"--config.model={base} --config.lora.from={EXPORT_FOLDER}"
        flags += f" --config.lora.lokr={run.cfg.lora.lokr}"
        return "jaxft", f"# python -m jaxft.train --config configs/diffusion.py {flags}"
    if "learned_embeds.safetensors" in names:
        return "diffusers", f'{pipeline}\npipeline.load_textual_inversion("{EXPORT_FOLDER}")'
    if run.cfg.task == "image_tokens" and "adapter_config.json" in names:
        flags = f"--config.model={base} --config.lora.from={EXPORT_FOLDER}"
        return "jaxft", f"# python -m jaxft.train --config configs/image_tokens.py {flags}"
    if "adapter_config.json" in names:
        return "peft", _adapter_lines(folder, run, base)
    if run.cfg.task == "autoencoder":
        kind = run.opened.codec.kind  # type: ignore[attr-defined]
        library = "transformers" if kind.startswith("Janus") else "diffusers"
        return library, _lines(library, kind, "vae", EXPORT_FOLDER)
    if "imagetoken.json" in names or architecture == "MultiModalityCausalLM":
        sample = 'pictures = model.sample(["a red apple"])'
        return "jaxft", f'import jaxft\n\nmodel = jaxft.load("{EXPORT_FOLDER}")\n{sample}'
    if architecture.endswith("ForSequenceClassification"):
        call = f'classify = pipeline("text-classification", "{EXPORT_FOLDER}")'
        return "transformers", f"from transformers import pipeline\n\n{call}"
    lines = _lines("transformers", architecture or "AutoModelForCausalLM", "model", EXPORT_FOLDER)
    if "tokenizer_config.json" in names:
        lines = lines.replace("import ", "import AutoTokenizer, ", 1)
        lines += f'\ntokenizer = AutoTokenizer.from_pretrained("{EXPORT_FOLDER}")'
    return "transformers", lines


def _lines(library: str, name: str, variable: str, place: str) -> str:
    call = f'{variable} = {name}.from_pretrained("{place}")'
    return f"from {library} import {name}\n\n{call}"


def _pipeline_lines(folder: Path, index: Mapping[str, Any]) -> str:
    name = index.get("_class_name", "DiffusionPipeline")
    single = [x.name for x in sorted(folder.glob("*.safetensors")) if "embeds" not in x.name]
    if not single or any(folder.glob("*/diffusion_pytorch_model*.safetensors")):
        lines = _lines("diffusers", name, "pipeline", EXPORT_FOLDER)
        if index.get("text_encoder_3") == [None, None]:  # SD 3 without T5: diffusers must be told
            lines = f"{lines.removesuffix(')')}, text_encoder_3=None, tokenizer_3=None)"
        return lines
    call = f'{name}.from_single_file("{EXPORT_FOLDER}/{single[0]}", config="{EXPORT_FOLDER}")'
    return f"from diffusers import {name}\n\npipeline = {call}"


def _adapter_lines(folder: Path, run: Run, base: str) -> str:
    opened: Any = run.opened
    name, more = next(iter(opened.source.config.get("architectures") or ()), ""), ""
    name = name or "AutoModelForCausalLM"
    if opened.labels:
        name = "AutoModelForSequenceClassification"
        more = f", num_labels={len(opened.labels)}, pad_token_id={opened.pad_id}"
    return (
        f"from peft import PeftModel\nfrom transformers import {name}\n\n"
        f'base = {name}.from_pretrained("{base}"{more})\n'
        f'model = PeftModel.from_pretrained(base, "{EXPORT_FOLDER}")'
    )
