"""LoRA adapters in PEFT's layout, read and written by the weight table of the model."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.config import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE, Leaf
from jaxft.weights.adapters.peft_folder import (
    ADAPTER_STEM,
    BASE,
    FACTOR,
    GIVE_BASE,
    PEFT_PREFIX,
    PeftAdapter,
    base_name,
)
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.rules import Entry, to_jax, to_torch
from jaxft.weights.transfer import Part


class Slot(NamedTuple):
    """One adapted projection of one layer: torch module name, jaxft path, layouts of A and B."""

    module: str
    path: str
    layer: int | None
    layout_a: str
    layout_b: str

    def sides(self) -> tuple[tuple[str, str, str], ...]:
        """Return (PEFT's letter, jaxft's leaf name, layout) of both factors."""
        return ("A", "lora_a", self.layout_a), ("B", "lora_b", self.layout_b)


def slots(part: Part, leaves: Mapping[str, Leaf]) -> list[Slot]:
    """Return the adapted projections of a part, one a layer."""
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
    kind: str = "CAUSAL_LM",
) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT 0.18+ reads them.

    `arrays` holds the `….lora_a` / `….lora_b` parameters by path, and the trained modules of
    `part.whole`, which are PEFT's modules_to_save. A layer whose A is zero has no adapter and is
    left out. kind: PEFT's task_type.
    """
    tensors = _saved(part, leaves, arrays)
    adapted = [slot for slot in slots(part, leaves) if _factor(slot, "lora_a", arrays).any()]
    modules = {slot.module for slot in adapted}
    for slot in adapted:
        for letter, leaf, layout in slot.sides():
            key = f"{PEFT_PREFIX}{slot.module}.lora_{letter}.weight"
            tensors[key] = to_torch(_factor(slot, leaf, arrays), layout, part.sizes)
    for key in part.kept:
        assert part.tensors is not None
        module = key.removesuffix(".weight")
        inside = "base_layer." if module in modules else ""
        tensors[f"{PEFT_PREFIX}{module}.{inside}weight"] = part.tensors.read(key)
    infos = {key: (array.shape, array.dtype) for key, array in tensors.items()}
    write_sharded(folder, tensors.items(), infos, stem=ADAPTER_STEM)
    config = {
        "peft_type": "LORA",
        "task_type": kind,
        BASE: base_name(base),
        "r": cfg.rank,
        "lora_alpha": cfg.alpha,
        "lora_dropout": cfg.dropout,
        "use_rslora": cfg.rslora,
        "target_modules": _targets(part, leaves, modules),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": [name for name in part.whole if _has(arrays, leaves, name)] or None,
        "use_dora": False,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def _factor(slot: Slot, leaf: str, arrays: Mapping[str, Any]) -> np.ndarray:
    """Return one layer's A or B, fp32."""
    array = np.asarray(arrays[f"{slot.path}.{leaf}"], np.float32)
    return array if slot.layer is None else array[slot.layer]


def _saved(
    part: Part, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the tensors of `part`'s parameters in `arrays`, under PEFT's names."""
    tensors = {}
    for entry in part.entries(leaves):
        for i, key in enumerate(entry.keys if entry.path in arrays else ()):
            array = np.asarray(arrays[entry.path], np.float32)
            one = array[i] if entry.stacked else array
            tensors[f"{PEFT_PREFIX}{key}"] = to_torch(one, entry.layout, part.sizes)
    return tensors


def _has(arrays: Mapping[str, Any], leaves: Mapping[str, Leaf], module: str) -> bool:
    return any(path.startswith(f"{module}.") and not leaves[path].added for path in arrays)


def load(adapter: PeftAdapter, part: Part, leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """Return the arrays of an adapter by jaxft path. `fit` has named its tensors.

    A layer without factors gets zeros: the layer of the base does not change, and the gradients of
    both factors are zero.
    Raises: UserError for a tensor without a place, without the other factor, or of another shape.
    """
    arrays = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in leaves.items()
        if leaf.role == ADAPTER_ROLE
    }
    have = set(adapter.tensors.keys())
    wanted = {
        f"{slot.module}.lora_{letter}.weight": (slot, leaf, layout)
        for slot in slots(part, leaves)
        for letter, leaf, layout in slot.sides()
    }
    halves = {key for key in have if _other_half(key) not in have}
    if odd := sorted((have - wanted.keys()) | halves)[:8]:
        raise UserError(f"{adapter.name}: tensors without a place or without their pair: {odd}")
    for key in sorted(have):
        slot, leaf, layout = wanted[key]
        path, layer = f"{slot.path}.{leaf}", ... if slot.layer is None else slot.layer
        want, got = arrays[path][layer].shape, tuple(adapter.tensors.info(key)[0])
        if to_torch(np.broadcast_to(np.int8(0), want), layout, part.sizes).shape != got:
            raise UserError(
                f"{adapter.name}: tensor {key} {got} does not fit rank {adapter.lora.rank} on this"
                f" base model; {GIVE_BASE}"
            )
        arrays[path][layer] = to_jax(adapter.tensors.read(key), layout, part.sizes)
    return arrays


def load_whole(
    adapter: PeftAdapter, part: Part, leaves: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Return the parameters of modules that an adapter's file holds whole, by jaxft path, fp32.

    Tensors are named as PEFT saves them.
    Raises: UserError for a tensor that is not in `part.whole`, or of another shape.
    """
    keys = {key for key in adapter.tensors.keys() if not FACTOR.fullmatch(key)}  # noqa: SIM118
    arrays: dict[str, np.ndarray] = {}
    for entry in part.entries(leaves):
        if keys.issuperset(entry.keys) and entry.path.startswith(
            tuple(f"{w}." for w in part.whole)
        ):
            read = [adapter.tensors.read(key).astype(np.float32) for key in entry.keys]
            made = [to_jax(tensor, entry.layout, part.sizes) for tensor in read]
            arrays[entry.path] = np.stack(made) if entry.stacked else made[0]
            keys -= set(entry.keys)
            if arrays[entry.path].shape != leaves[entry.path].shape:
                raise UserError(f"{adapter.name}: {entry.keys[0]} is of another size; {GIVE_BASE}")
    if keys:
        raise UserError(f"{adapter.name}: tensor {min(keys)} has no place in {adapter.base}")
    return arrays


def _other_half(key: str) -> str:
    stem, _, letter = key.removesuffix(".weight").rpartition("_")
    return f"{stem}_{'B' if letter == 'A' else 'A'}.weight"


def _layouts(entry: Entry, leaf: Leaf) -> tuple[str, str]:
    """Split the kernel's layout "out in -> in out" into those of A [r, in] and B [out, r].

    The A of a convolution (4 dims in torch, 1x1 ones too) has the kernel's size, and its B is 1x1.
    """
    left, right = entry.layout.split("->")
    out_group, *in_groups = re.findall(r"\([^)]*\)|\S+", left)
    names, ones = right.split(), " 1 1" if len(in_groups) == 3 else ""
    ins, outs = names[: leaf.inputs], names[leaf.inputs :]
    layout_a = f"r {' '.join(in_groups)} -> {' '.join(ins)} r"
    return layout_a, f"{out_group} r{ones} -> r {' '.join(outs)}"


def _targets(part: Part, leaves: Mapping[str, Leaf], modules: set[str]) -> list[str]:
    """Return module names for PEFT: last parts, or full names where these match other modules.

    Other modules are all of the checkpoint, even those that fill no parameter here.
    """
    keys = [key for entry in part.entries(leaves) for key in entry.keys]
    keys += [] if part.tensors is None else list(part.tensors.keys())
    others = {key.removesuffix(".weight") for key in keys} - modules
    short = {module.rsplit(".", 1)[-1] for module in modules}
    clash = any(other.rsplit(".", 1)[-1] in short for other in others)
    return sorted(modules if clash else short)
