"""LoRA adapters in PEFT's layout, read and written by the weight table of the model."""

import json
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE, SCALE_ROLE, Leaf
from jaxft.weights.adapters.peft_folder import (
    ADAPTER_STEM,
    BASE,
    FACTOR,
    GIVE_BASE,
    MAGNITUDES,
    MERGE,
    PEFT_PREFIX,
    TOKEN_DELTA,
    PeftAdapter,
    base_name,
)
from jaxft.weights.adapters.ranks import AdapterSize, parse_layers, scales, sizes
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders.transformers import HEAD
from jaxft.weights.rules import Entry, to_jax, to_torch
from jaxft.weights.transfer import Part

TABLE_KEY = ".embed_tokens.weight"  # end of the key of an input table
TABLE_END, TOKENS = ".embedding", ".tokens.embedding"  # ends of paths: a table, its trained rows
LAYER_NUMBER = re.compile(
    r".*?\.[^.]*\.(\d+)\."
)  # PEFT's search for the number of a module's layer


class Slot(NamedTuple):
    """One adapted projection of one layer: torch module name, jaxft path, layouts of A and B."""

    module: str
    path: str
    layer: int | None
    layout_a: str
    layout_b: str
    layout_m: str = ""  # of DoRA's magnitudes, if there are any
    layers: int = 0  # of its stack
    layout_k: str = ""  # of W1 of LoKr, if there is one

    def sides(self) -> tuple[tuple[str, str, str], ...]:
        """Return (PEFT's name behind "lora_", jaxft's leaf name, layout) of all factors."""
        factors = ("A", "lora_a", self.layout_a), ("B", "lora_b", self.layout_b)
        magnitudes = ((MAGNITUDES, "lora_m", self.layout_m),) if self.layout_m else ()
        blocks = (("K", "lora_k", self.layout_k),) if self.layout_k else ()
        return (*factors, *magnitudes, *blocks)


def slots(part: Part, leaves: Mapping[str, Leaf]) -> list[Slot]:
    """Return the adapted projections of a part, one a layer."""
    found = []
    for entry in part.entries(leaves):
        linear = entry.path.removesuffix(".kernel")
        if linear + ".lora_a" not in leaves:
            continue
        layout_a, layout_b, layout_m = _layouts(entry, leaves[entry.path])
        layout_m = layout_m if linear + ".lora_m" in leaves else ""
        layout_k = "p q -> q p" if linear + ".lora_k" in leaves else ""
        for i, key in enumerate(entry.keys):
            layer = i if entry.stacked else None
            layers = len(entry.keys) if entry.stacked else 0
            module = part.named(key).removesuffix(".weight")
            layouts = layout_a, layout_b, layout_m
            found.append(Slot(module, linear, layer, *layouts, layers, layout_k))
    return found


def size(slot: Slot, cfg: Lora) -> AdapterSize:
    """Return rank and alpha of one adapted projection."""
    return sizes(cfg, slot.path, slot.layers)[slot.layer or 0]


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
    `part.whole`, which are PEFT's modules_to_save. A layer without an adapter is left out. kind:
    PEFT's task_type.
    """
    tensors = _saved(part, leaves, arrays)
    found = {slot.module: size(slot, cfg) for slot in slots(part, leaves)}
    adapted = {module: one for module, one in found.items() if one.rank}
    for name, tensor in factors(part, leaves, arrays, cfg):
        # PEFT leaves out the end of this one name.
        saved = name.removesuffix(".weight") if f".lora_{MAGNITUDES}." in name else name
        tensors[PEFT_PREFIX + saved] = tensor
    inner = dict.fromkeys(adapted, "base_layer.")
    for entry, path in token_rows(part, leaves):
        module = part.named(entry.keys[0]).removesuffix(".weight")
        tensors[f"{PEFT_PREFIX}{module}{TOKEN_DELTA}"] = np.asarray(arrays[path], np.float32)
        inner[module] = "token_adapter.base_layer."
    for key in part.kept:
        assert part.tensors is not None
        module, _, name = part.named(key).rpartition(".")
        if f"{PEFT_PREFIX}{module}.{name}" not in tensors:  # it may have been trained since
            tensors[f"{PEFT_PREFIX}{module}.{inner.get(module, '')}{name}"] = part.tensors.read(key)
    modules = _modules(part, leaves, arrays)
    if tied := "embed_tokens" in modules and _tied(leaves):  # PEFT requires the copy
        table = next(key for key in tensors if key.endswith(TABLE_KEY))
        tensors[PEFT_PREFIX + HEAD] = tensors[table]
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
        "target_modules": _targets(part, leaves, set(adapted), parse_layers(cfg.layers)),
        "rank_pattern": _pattern({name: one.rank for name, one in adapted.items()}, cfg.rank),
        "alpha_pattern": _pattern({name: one.alpha for name, one in adapted.items()}, cfg.alpha),
        "layers_to_transform": sorted(parse_layers(cfg.layers)) or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": modules or None,
        "ensure_weight_tying": tied,
        "use_dora": cfg.dora,
        "trainable_token_indices": list(part.rows) or None,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def token_rows(part: Part, leaves: Mapping[str, Leaf]) -> list[tuple[Entry, str]]:
    """Return tables with rows that train alone: the table's entry, and the path of the rows."""
    found = ((entry, entry.path.removesuffix(TABLE_END) + TOKENS) for entry in part.entries(leaves))
    return [(entry, path) for entry, path in found if path in leaves]


def factors(
    part: Part, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any], cfg: Lora
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield each factor of each adapted layer as MODULE.lora_A.weight, fp32 in torch's layout."""
    for slot in slots(part, leaves):
        rank = size(slot, cfg).rank
        for letter, leaf, layout in slot.sides() if rank else ():
            array = np.asarray(arrays[f"{slot.path}.{leaf}"], np.float32)
            one = array if slot.layer is None else array[slot.layer]
            tensor = to_torch(_used(one, leaf, rank), layout, part.sizes)
            yield f"{slot.module}.lora_{letter}.weight", tensor


def _used(factor: np.ndarray, leaf: str, rank: int) -> np.ndarray:
    """Return the columns of A, or the rows of B, that the rank of this layer has."""
    if leaf == "lora_a":
        return factor[..., :rank]
    return factor[:rank] if leaf == "lora_b" else factor


def _pattern(values: Mapping[str, float], default: float) -> dict[str, float]:
    """Return what PEFT's rank_pattern or alpha_pattern holds: the values other than the default.

    They are by the last part of a module's name, or by the full name where these parts disagree.
    """
    by_end: dict[str, set[float]] = {}
    for module, value in values.items():
        by_end.setdefault(module.rsplit(".", 1)[-1], set()).add(value)
    named = {end: found.pop() for end, found in by_end.items() if len(found) == 1}
    full = {name: x for name, x in values.items() if name.rsplit(".", 1)[-1] not in named}
    return {name: value for name, value in (named | full).items() if value != default}


def _saved(
    part: Part, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any]
) -> dict[str, np.ndarray]:
    """Return the tensors of `part`'s parameters in `arrays`, under PEFT's names."""
    tensors = {}
    for entry in part.entries(leaves):
        for i, key in enumerate(entry.keys if entry.path in arrays else ()):
            array = np.asarray(arrays[entry.path], np.float32)
            one = array[entry.place(i)]
            tensors[f"{PEFT_PREFIX}{part.named(key)}"] = to_torch(one, entry.layout, part.sizes)
    return tensors


def _modules(part: Part, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any]) -> list[str]:
    """Return PEFT's modules_to_save: names that end those of the trained modules and no others."""
    modules: dict[bool, set[str]] = {True: set(), False: set()}
    if part.class_names and part.tensors is not None:  # modules of pictures have the same names
        modules[False] = {part.named(key).rpartition(".")[0] for key in part.tensors.keys()}  # noqa: SIM118
        modules[False] -= {
            key.rpartition(".")[0] for entry in part.class_entries(leaves) for key in entry.keys
        }
    for entry in part.class_entries(leaves):
        modules[entry.path in arrays] |= {key.rpartition(".")[0] for key in entry.keys}
    found = set()
    for module in modules[True]:
        names = [name for name in part.whole if f".{name}." in f".{module}."]
        names += [module.rsplit(".", 1)[-1], module]
        found.add(next(one for one in names if not any(_hits(one, x) for x in modules[False])))
    return sorted(found, key=lambda name: (name not in part.whole, (*part.whole, name).index(name)))


def _hits(name: str, module: str) -> bool:
    """Return True if PEFT saves a module, or one around it, because of a name."""
    return module.endswith(name) or f"{name}." in module


def _tied(leaves: Mapping[str, Leaf]) -> bool:
    return not any(path.endswith(("lm_head.kernel", "score.kernel")) for path in leaves)


def saved_paths(adapter: PeftAdapter, part: Part, leaves: Mapping[str, Leaf]) -> list[str]:
    """Return the parameters of the modules that an adapter's config says to save, which train.

    Raises: UserError for modules without a place, some layers of a stack, and half of a tied pair.
    """
    entries, found = part.class_entries(leaves), []
    hits = {
        name: {
            entry.path: [_hits(name, key.rpartition(".")[0]) for key in entry.keys]
            for entry in entries
        }
        for name in adapter.saved
    }
    some_of = {name: [p for p, layers in hit.items() if any(layers)] for name, hit in hits.items()}
    for name, hit in hits.items():
        some = some_of[name]
        held = any(_hits(name, key.rpartition(".")[0]) for key in adapter.tensors.keys())  # noqa: SIM118
        if not some and not held and any(some_of.values()):
            continue  # PEFT names "classifier" and "score" for every classifier
        if not some or not all(layer for path in some for layer in hit[path]):
            what = "is in some layers of a stack alone" if some else "is not in the base"
            raise UserError(
                f"{adapter.name}: modules_to_save={list(adapter.saved)} is not supported: {name}"
                f" {what}; {MERGE}"
            )
        if _tied(leaves) and not adapter.ties and any("embed_tokens" in path for path in some):
            raise UserError(
                f"{adapter.name}: modules_to_save={list(adapter.saved)} trains half of a tied pair,"
                f" without ensure_weight_tying, which is not supported; {MERGE}"
            )
        found += some
    return sorted(set(found))


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
    for path, leaf in leaves.items():
        if leaf.role == SCALE_ROLE:
            linear, layers = path.removesuffix(".lora_s"), leaf.shape[0] if leaf.shape else 0
            found = np.array(scales(adapter.lora, linear, layers), np.float32)
            arrays[path] = found.reshape(leaf.shape)
    have = set(adapter.tensors.keys())
    for entry, path in token_rows(part, leaves):
        key = part.named(entry.keys[0]).removesuffix(".weight") + TOKEN_DELTA
        if key not in have or tuple(adapter.tensors.info(key)[0]) != leaves[path].shape:
            raise UserError(
                f"{adapter.name}: tensor {key} is missing or not of the shape {leaves[path].shape}"
                f" of trainable_token_indices; {GIVE_BASE}"
            )
        arrays[path] = adapter.tensors.read(key).astype(np.float32)
        have.remove(key)
    wanted = {
        f"{slot.module}.lora_{letter}.weight": (slot, leaf, layout, size(slot, adapter.lora).rank)
        for slot in slots(part, leaves)
        for letter, leaf, layout in slot.sides()
    }
    begun = {key.rpartition(".lora_")[0] for key in have}
    halves = {key for key in wanted if key.rpartition(".lora_")[0] in begun and key not in have}
    if odd := sorted(have - wanted.keys())[:8]:
        raise UserError(f"{adapter.name}: tensors without a place: {odd}")
    if halves:
        raise UserError(f"{adapter.name}: {sorted(halves)[:8]} are missing beside their pair")
    for key in sorted(have):
        slot, leaf, layout, rank = wanted[key]
        layer = ... if slot.layer is None else slot.layer
        whole = _used(arrays[f"{slot.path}.{leaf}"][layer], leaf, rank)
        got = tuple(adapter.tensors.info(key)[0])
        if to_torch(np.broadcast_to(np.int8(0), whole.shape), layout, part.sizes).shape != got:
            raise UserError(
                f"{adapter.name}: tensor {key} {got} does not fit rank {rank} on this base model;"
                f" {GIVE_BASE}"
            )
        whole[...] = to_jax(adapter.tensors.read(key), layout, part.sizes)
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
    for entry in part.class_entries(leaves):
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


def _layouts(entry: Entry, leaf: Leaf) -> tuple[str, str, str]:
    """Split the kernel's layout "out in -> in out" into those of A [r, in], B [out, r] and m [out].

    The A of a convolution (4 dims in torch, 1x1 ones too) has the kernel's size, and its B is 1x1.
    """
    left, right = entry.layout.split("->")
    out_group, *in_groups = re.findall(r"\([^)]*\)|\S+", left)
    names, ones = right.split(), " 1 1" if len(in_groups) == 3 else ""
    ins, outs = names[: leaf.inputs], names[leaf.inputs :]
    layout_a = f"r {' '.join(in_groups)} -> {' '.join(ins)} r"
    layout_b = f"{out_group} r{ones} -> r {' '.join(outs)}"
    return layout_a, layout_b, f"{out_group} -> {' '.join(outs)}"


def start(
    part: Part, leaves: Mapping[str, Leaf], cfg: Lora, wanted: Collection[str]
) -> dict[str, np.ndarray]:
    """Return what a new adapter takes from the base's weights, by path.

    That is magnitudes, which are norms of the weights, and rows of the embedding. Only those in
    `wanted` are read. A layer without an adapter has magnitudes of zero.
    """
    made: dict[str, np.ndarray] = {}
    if part.tensors is None:
        return made
    for entry, path in token_rows(part, leaves):
        if path in wanted:
            made[path] = part.tensors.read(entry.keys[0])[list(part.rows)].astype(np.float32)
    for entry in part.entries(leaves):
        linear = entry.path.removesuffix(".kernel")
        path, inputs = f"{linear}.lora_m", leaves[entry.path].inputs
        if path not in wanted:
            continue
        norms, found = [], sizes(cfg, linear, len(entry.keys) if entry.stacked else 0)
        for key, one in zip(entry.keys, found, strict=True):
            kernel = to_jax(part.tensors.read(key).astype(np.float32), entry.layout, part.sizes)
            norm = np.sqrt(np.square(kernel).sum(tuple(range(inputs))))  # [*outs]
            norms.append(norm if one.rank else 0 * norm)
        made[path] = np.stack(norms) if entry.stacked else norms[0]
    return made


def _targets(
    part: Part, leaves: Mapping[str, Leaf], modules: set[str], layers: Collection[int] = ()
) -> list[str]:
    """Return module names for PEFT: last parts, or full names where these match other modules.

    Other modules are all of the checkpoint, even those that fill no parameter here. With `layers`,
    PEFT passes over the last parts outside of these layers.
    """
    keys = [key for entry in part.entries(leaves) for key in entry.keys]
    keys += [] if part.tensors is None else list(part.tensors.keys())
    others = {part.named(key).removesuffix(".weight") for key in keys} - modules
    if layers:
        numbers = {name: LAYER_NUMBER.match(name) for name in others}
        others = {name for name, found in numbers.items() if found and int(found[1]) in layers}
    short = {module.rsplit(".", 1)[-1] for module in modules}
    clash = any(other.rsplit(".", 1)[-1] in short for other in others)
    return sorted(modules if clash else short)
