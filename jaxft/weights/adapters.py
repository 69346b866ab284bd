"""LoRA adapters in PEFT's layout, derived from the weight table, both ways."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.config import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import Leaf
from jaxft.weights.rules import Entry, to_jax, to_torch
from jaxft.weights.tensor_files import TensorFiles, write_sharded
from jaxft.weights.transfer import Part

BASE = "base_model_name_or_path"
PREFIX = "base_model.model."
STEM = "adapter_model"
UNSUPPORTED = (  # fields of PEFT's LoraConfig that make more of it than W + scale * A B
    "use_dora",
    "modules_to_save",
    "rank_pattern",
    "alpha_pattern",
    "bias",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")  # others change the base too


class Slot(NamedTuple):
    """One adapted projection of one layer: torch module name, jaxft paths, both layouts."""

    module: str
    path: str
    layer: int | None
    layout_a: str
    layout_b: str

    def sides(self) -> tuple[tuple[str, str, str], ...]:
        """(PEFT's letter, jaxft's leaf name, layout) of both factors."""
        return ("A", "lora_a", self.layout_a), ("B", "lora_b", self.layout_b)


def slots(part: Part, leaves: Mapping[str, Leaf]) -> list[Slot]:
    """Where each adapter of a model lives on both sides."""
    found = []
    for entry in part.entries(leaves):
        linear = entry.path.removesuffix(".kernel")
        if linear + ".lora_a" not in leaves:
            continue
        layout_a, layout_b = _layouts(entry, leaves[entry.path])
        for i, key in enumerate(entry.keys):
            layer = i if entry.stacked else None
            found.append(Slot(key.removesuffix(".weight"), linear, layer, layout_a, layout_b))
    return found


def write(
    folder: Path,
    part: Part,
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, Any],
    cfg: Lora,
    base: str,
) -> None:
    """adapter_model.safetensors and adapter_config.json as PEFT 0.18+ reads them.

    `arrays` holds the `….lora_a` / `….lora_b` parameters by path, and what trained beside them of
    `part.whole`: PEFT's modules_to_save.
    """
    tensors = _saved(part, leaves, arrays)
    for slot in slots(part, leaves):
        for letter, leaf, layout in slot.sides():
            array = np.asarray(arrays[f"{slot.path}.{leaf}"])
            array = array if slot.layer is None else array[slot.layer]
            key = f"{PREFIX}{slot.module}.lora_{letter}.weight"
            tensors[key] = to_torch(array.astype(np.float32), layout, part.sizes)
    infos = {key: (array.shape, array.dtype) for key, array in tensors.items()}
    write_sharded(folder, tensors.items(), infos, stem=STEM)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        BASE: base,
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rslora,
        "target_modules": _targets(part, leaves),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": [name for name in part.whole if _has(arrays, name)] or None,
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _saved(
    part: Part, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """The tensors of modules that are given whole, under their own names."""
    tensors = {}
    for entry in part.entries(leaves):
        for i, key in enumerate(entry.keys if entry.path in arrays else ()):
            array = np.asarray(arrays[entry.path], np.float32)
            one = array[i] if entry.stacked else array
            tensors[f"{PREFIX}{key}"] = to_torch(one, entry.layout, part.sizes)
    return tensors


def _has(arrays: Mapping[str, Any], module: str) -> bool:
    return any(path.startswith(f"{module}.") and ".lora_" not in path for path in arrays)


class PeftAdapter(NamedTuple):
    """A PEFT folder as read: its LoRA settings, its base model, its tensors."""

    name: str
    base: str
    lora: Lora
    tensors: TensorFiles


def find(spec: str, targets: str) -> PeftAdapter | None:
    """The adapter, if `spec` is a PEFT folder; `targets` is its modules said as jaxft's regex."""
    folder = Path(spec).expanduser()
    return read(folder, targets) if (folder / "adapter_config.json").is_file() else None


def read(folder: Path, targets: str) -> PeftAdapter:
    """Open a PEFT folder. Raises UserError for what plain LoRA does not cover (DoRA, patterns)."""
    file = folder / "adapter_config.json"
    try:
        config = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{file} is not a readable PEFT adapter config: {error}") from None
    plain = (None, False, {}, [], "none")
    unsupported = [key for key in UNSUPPORTED if config.get(key) not in plain]
    if config.get("init_lora_weights") not in PLAIN_STARTS:
        unsupported.append(f"init_lora_weights={config['init_lora_weights']}")
    if config.get("peft_type") != "LORA" or unsupported:
        what = ", ".join(unsupported) or f"peft_type={config.get('peft_type')}"
        raise UserError(f"{file}: {what} is not supported; plain LoRA adapters are")
    if gone := [key for key in ("r", "lora_alpha", BASE) if not config.get(key)]:
        raise UserError(f"{file} does not say {', '.join(gone)}; add them to the file")
    lora = Lora(
        rank=config["r"],
        alpha=float(config["lora_alpha"]),
        targets=targets,
        rslora=bool(config.get("use_rslora", False)),
        dropout=float(config.get("lora_dropout", 0.0)),
    )
    tensors = TensorFiles.open(folder / f"{STEM}.safetensors")
    return PeftAdapter(str(folder), config[BASE], lora, tensors)


def load(adapter: PeftAdapter, part: Part, leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """The adapter's arrays by jaxft path; every tensor must have its place."""
    arrays = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in leaves.items()
        if path.endswith((".lora_a", ".lora_b"))
    }
    wanted = {
        f"{PREFIX}{slot.module}.lora_{letter}.weight": (slot, leaf, layout)
        for slot in slots(part, leaves)
        for letter, leaf, layout in slot.sides()
    }
    have = set(adapter.tensors.keys())
    if have != set(wanted):
        odd = sorted(have ^ set(wanted))[:8]
        raise UserError(f"{adapter.name} does not fit lora.targets; not on both sides: {odd}")
    for key, (slot, leaf, layout) in wanted.items():
        path, layer = f"{slot.path}.{leaf}", ... if slot.layer is None else slot.layer
        want, got = arrays[path][layer].shape, adapter.tensors.info(key)[0]
        if to_torch(np.broadcast_to(np.int8(0), want), layout, part.sizes).shape != got:
            raise UserError(
                f"{adapter.name}: tensor {key} {got} does not fit rank {adapter.lora.rank} on this"
                " base model; give the base that the adapter was trained on"
            )
        arrays[path][layer] = to_jax(adapter.tensors.read(key), layout, part.sizes)
    return arrays


def _layouts(entry: Entry, leaf: Leaf) -> tuple[str, str]:
    """The kernel's layout "out in -> in out" cut into those of A [r, in] and B [out, r].

    A convolution's kernel (4 dims in torch, 1x1 ones too) has an A of its own size, a 1x1 B.
    """
    left, right = entry.layout.split("->")
    out_group, *in_groups = re.findall(r"\([^)]*\)|\S+", left)
    names, ones = right.split(), " 1 1" if len(in_groups) == 3 else ""
    ins, outs = names[: leaf.inputs], names[leaf.inputs :]
    layout_a = f"r {' '.join(in_groups)} -> {' '.join(ins)} r"
    return layout_a, f"{out_group} r{ones} -> r {' '.join(outs)}"


def _targets(part: Part, leaves: Mapping[str, Leaf]) -> list[str]:
    """Module names for PEFT: short suffixes, or full names where a suffix would hit others.

    Others are all of the checkpoint, those that make no parameter here too.
    """
    modules = {slot.module for slot in slots(part, leaves)}
    keys = [key for entry in part.entries(leaves) for key in entry.keys]
    keys += [] if part.tensors is None else list(part.tensors.keys())
    others = {key.removesuffix(".weight") for key in keys} - modules
    short = {module.rsplit(".", 1)[-1] for module in modules}
    clash = any(other.rsplit(".", 1)[-1] in short for other in others)
    return sorted(modules if clash else short)
