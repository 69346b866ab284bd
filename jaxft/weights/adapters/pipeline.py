"""LoRA of diffusion pipelines: diffusers' PEFT file and kohya's file, both ways."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf
from jaxft.weights.adapters.peft import Slot, slots
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders.diffusers import LEGACY, legacy_part
from jaxft.weights.folders.single_file import Layout, renamed
from jaxft.weights.rules import rearranged_shape, to_jax, to_torch
from jaxft.weights.transfer import Part

STEM = "pytorch_lora_weights"  # what diffusers' load_lora_weights looks for in a folder
SIDES = {
    "lora_a": (".lora_A.weight", ".lora_down.weight"),
    "lora_b": (".lora_B.weight", ".lora_up.weight"),
    "alpha": (".alpha",),
}
KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
# diffusers 0.42 does not find these again in one format or both.
UNREAD = ("unet.add_embedding.linear_1", "unet.add_embedding.linear_2")
UNREAD += ("text_encoder.text_projection", "text_encoder_2.text_projection")
VERSIONS = {"sd1": "sd_v1", "sd2": "sd_v2", "sdxl": "sdxl_base_v1-0"}


class Site(NamedTuple):
    """One adapted projection of one layer, in the component that it is part of."""

    component: str
    slot: Slot
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        """As diffusers' files begin its keys."""
        return f"{self.component}.{self.slot.module}"

    def factors(self, arrays: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
        """A [r, in, …] and B [out, r, …] in torch's layout, fp32."""
        made = []
        for _, leaf, layout in self.slot.sides():
            array = np.asarray(arrays[f"{self.slot.path}.{leaf}"], np.float32)
            array = array if self.slot.layer is None else array[self.slot.layer]
            made.append(to_torch(array, layout, self.sizes))
        return made[0], made[1]


def sites(parts: Sequence[Part], leaves: Mapping[str, Leaf]) -> list[Site]:
    """Every adapted projection of a pipeline, under the module names that all packages read."""
    return [
        Site(part.prefix.rstrip("."), slot, part.sizes)
        for part in map(legacy_part, parts)
        for slot in slots(part, leaves)
    ]


def check(parts: Sequence[Part], leaves: Mapping[str, Leaf]) -> None:
    """UserError where there is no adapter, or one that readers of LoRA files leave out."""
    found = sites(parts, leaves)
    if not found:
        raise UserError(
            "export.kind='lora' needs lora.rank > 0; use export.kind='folder' or 'single_file'"
        )
    if odd := sorted(site.name for site in found if site.name in UNREAD):
        raise UserError(
            f"lora.targets matches {', '.join(odd)}, which diffusers does not read from LoRA files;"
            " leave them out, as (?!.*(add_embedding|text_projection)).* does"
        )


def write_peft(
    folder: Path,
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, Any],
    scale: float,
) -> Path:
    """`pytorch_lora_weights.safetensors` with `scale` folded into B.

    diffusers takes alpha = rank from a file that states none: any other is the wrong strength.
    """
    tensors = {}
    for site in sites(parts, leaves):
        a, b = site.factors(arrays)
        tensors[f"{site.name}.lora_A.weight"] = a
        tensors[f"{site.name}.lora_B.weight"] = scale * b
    return _write(folder, STEM, tensors)


def write_kohya(
    folder: Path,
    name: str,
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, Any],
    scale: float,
    metadata: Mapping[str, str],
) -> Path:
    """`NAME.kohya.safetensors` under diffusers' block names, which all programs read.

    `metadata`: see `metadata` and `single_file.modelspec`.
    """
    sdxl = any(part.prefix == "text_encoder_2." for part in parts)
    tensors = {}
    for site in sites(parts, leaves):
        a, b = site.factors(arrays)
        prefix = KOHYA[site.component][-1 if sdxl else 0]
        stem = prefix + site.slot.module.replace(".", "_")
        tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = a, b
        tensors[f"{stem}.alpha"] = np.array(scale * len(a), np.float32)
    return _write(folder, f"{name}.kohya", tensors, metadata)


def metadata(kind: str, name: str, base: str, rank: int, alpha: float) -> dict[str, str]:
    """The ss_* keys by which UIs sort and describe a LoRA; `kind` as in `models.pipelines.ldm`."""
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps({"conv_dim": str(rank), "conv_alpha": str(alpha)}),
        "ss_base_model_version": VERSIONS[kind],
        "ss_v2": str(kind == "sd2"),
        "ss_sd_model_name": Path(base).name,
        "ss_output_name": name,
    }


def _write(
    folder: Path,
    stem: str,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> Path:
    infos = {key: (array.shape, array.dtype) for key, array in tensors.items()}
    return write_sharded(folder, tensors.items(), infos, stem=stem, metadata=metadata)[0]


# ---- reading ----------------------------------------------------------------------------------


class _Found(NamedTuple):
    """The tensors that a file has for one site."""

    site: Site
    keys: dict[str, str]


def read(
    spec: str,
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    scale: float,
    layouts: Mapping[str, Layout] | None = None,
) -> dict[str, np.ndarray]:
    """A LoRA file, or a folder with one, as arrays by path that act as it did at its own alpha.

    Reads PEFT keys and kohya's, under LDM's block names too where `layouts` (by component) are
    given. B is rescaled for this run's `scale`. Projections that the file lacks are absent.
    Raises UserError for tensors without a place, and for another rank.
    """
    file = _file(spec)
    tensors = TensorFiles.open(file)
    found = _match(file, tensors, sites(parts, leaves), layouts or {})
    stated = _stated_scales(file)
    arrays: dict[str, np.ndarray] = {}
    filled: dict[str, int] = {}
    for site, keys in found:
        rank = tensors.info(keys["lora_a"])[0][0]
        alpha = float(tensors.read(keys["alpha"])) if "alpha" in keys else None
        own = stated.get(site.component, 1.0) if alpha is None else alpha / rank
        for _, side, layout in site.slot.sides():
            path, layer = f"{site.slot.path}.{side}", site.slot.layer
            leaf = leaves[path]
            _check_shape(file, keys[side], tensors, layout, site, leaf)
            array = to_jax(tensors.read(keys[side]).astype(np.float32), layout, site.sizes)
            whole = arrays.setdefault(path, np.zeros(leaf.shape, np.float32))
            whole[... if layer is None else layer] = array * (own / scale if side[-1] == "b" else 1)
            filled[path] = filled.get(path, 0) + 1
    for path, count in filled.items():
        if leaves[path].stacked and count != leaves[path].shape[0]:
            layers = f"{count} of the {leaves[path].shape[0]} layers of {path}"
            raise UserError(f"{file} has {layers}; a LoRA to continue has to have all of them")
    return arrays


def _file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.is_dir():
        named = path / f"{STEM}.safetensors"
        others = sorted(path.glob("*.safetensors"))
        path = others[0] if len(others) == 1 else named
    if not path.is_file():
        raise UserError(f"LoRA {spec!r}: no such file; expected {STEM}.safetensors or kohya's file")
    return path


def _match(
    file: Path, tensors: TensorFiles, places: Sequence[Site], layouts: Mapping[str, Layout]
) -> list[_Found]:
    """Every tensor at its site; all that have none are listed in one error."""
    known = {name: site for site in places for name in _names(site, layouts)}
    found: dict[str, _Found] = {}
    odd = []
    for key in tensors.keys():  # noqa: SIM118 (a Tensors is no dict)
        side, stem = _side(key)
        site = known.get(stem)
        if site is None or side in found.setdefault(site.name, _Found(site, {})).keys:
            odd.append(key)
        else:
            found[site.name].keys[side] = key
    if odd:
        more = f" and {len(odd) - 8} more" if len(odd) > 8 else ""
        raise UserError(
            f"{file}: no place for {', '.join(sorted(odd)[:8])}{more}; widen lora.targets, or give "
            "the base model of this plain LoRA"
        )
    for name, one in found.items():
        if gone := {"lora_a", "lora_b"} - one.keys.keys():
            raise UserError(f"{file}: {name} lacks its {gone.pop()} factor; the file is not whole")
    return list(found.values())


def _side(key: str) -> tuple[str, str]:
    """Which factor a key is, and what stands before that."""
    for side, ends in SIDES.items():
        for end in ends:
            if key.endswith(end):
                return side, key.removesuffix(end)
    return "", key


def _names(site: Site, layouts: Mapping[str, Layout]) -> Iterator[str]:
    """All beginnings of keys that mean this site."""
    module = site.slot.module
    yield site.name
    yield f"{site.component}.{module.removeprefix(LEGACY)}"  # as transformers 5 has it
    modules = {module}
    if site.component in layouts:
        modules.add(renamed(module, layouts[site.component].names))
    for prefix in KOHYA.get(site.component, ()):
        yield from (prefix + one.replace(".", "_") for one in modules)


def _stated_scales(file: Path) -> dict[str, float]:
    """alpha / r by component, as diffusers 0.34+ states it in the header of a PEFT file."""
    with safe_open(file, "np") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    stated, scales = json.loads(text), {}
    for component in KOHYA:
        rank, alpha = (stated.get(f"{component}.{key}") for key in ("r", "lora_alpha"))
        if any(stated.get(f"{component}.{key}") for key in ("alpha_pattern", "rank_pattern")):
            raise UserError(f"{file}: {component} has ranks or alphas of several sizes; give one")
        if rank and alpha is not None:
            root = stated.get(f"{component}.use_rslora")
            scales[component] = alpha / (rank**0.5 if root else rank)
    return scales


def _check_shape(
    file: Path, key: str, tensors: TensorFiles, layout: str, site: Site, leaf: Leaf
) -> None:
    want, got = leaf.shape[1:] if leaf.stacked else leaf.shape, tensors.info(key)[0]
    try:
        fits = rearranged_shape(got, layout, site.sizes) == want
    except ValueError:
        fits = False
    if not fits:
        rank = want[-1] if leaf.axes[-1] == "lora" else want[0]
        raise UserError(
            f"{file}: {key} {got} does not fit lora.rank={rank} on this model; set the rank that "
            "the file has, or give the base model that it was trained on"
        )
