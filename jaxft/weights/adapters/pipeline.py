"""Writing of LoRA files of diffusion pipelines: diffusers' PEFT file and kohya's file."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf
from jaxft.weights.adapters.lokr import W1, W2_A, W2_B
from jaxft.weights.adapters.original_names import (
    DORA_SCALE,
    GENERIC,
    MAGNITUDE_END,
    Factors,
    fused,
    unadapted,
)
from jaxft.weights.adapters.peft import Slot, slots
from jaxft.weights.files.tensor_files import write_sharded
from jaxft.weights.folders.diffusers import legacy_part
from jaxft.weights.folders.single_file import LDMLayout
from jaxft.weights.rules import to_torch
from jaxft.weights.transfer import Part, to_host

DOWN_UP = "lora_down", "lora_up"  # kohya's names of A and B
LOKR_END = ".lycoris.safetensors"
LORA_STEM = "pytorch_lora_weights"  # the name that diffusers' load_lora_weights expects
KOHYA = {
    "unet": ("lora_unet_",),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
}
# diffusers 0.42 does not load adapters of these modules from one format or both.
UNREAD = ("unet.add_embedding.linear_1", "unet.add_embedding.linear_2")
UNREAD += ("text_encoder.text_projection", "text_encoder_2.text_projection")
UNREAD_BLOCKS = ("encoder.block.", "model.layers.")  # of T5 and of Qwen
VERSIONS = {
    "sd1": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
    "sd3": "sd3",
    "flux": "flux1",
    "flux2": "flux2",
    "zimage": "zimage",
}
NETWORKS = {
    "sd3": "networks.lora_sd3",
    "flux": "networks.lora_flux",
    "flux2": "networks.lora_flux_2",
    "zimage": "networks.lora_zimage",
}


class Site(NamedTuple):
    """One adapted projection of one layer, with the name of its component."""

    component: str
    slot: Slot
    sizes: Mapping[str, int]

    @property
    def name(self) -> str:
        """The beginning of its keys in diffusers' files."""
        return f"{self.component}.{self.slot.module}"

    def factors(self, arrays: Mapping[str, Any]) -> Factors:
        """Return the factors in torch's layout, fp32, without W1 of a LoKr."""
        names = [leaf for _, leaf, _ in self.slot.sides() if leaf != "lora_k"]
        return Factors(*(self.factor(arrays, leaf) for leaf in names))

    def factor(self, arrays: Mapping[str, Any], name: str) -> np.ndarray:
        """Return one factor by its leaf in torch's layout, fp32."""
        (layout,) = (layout for _, leaf, layout in self.slot.sides() if leaf == name)
        array = np.asarray(arrays[f"{self.slot.path}.{name}"], np.float32)
        array = array if self.slot.layer is None else array[self.slot.layer]
        return to_torch(array, layout, self.sizes)


def sites(parts: Sequence[Part], leaves: Mapping[str, Leaf]) -> list[Site]:
    """Return every adapted projection of a pipeline, under module names that all packages read."""
    return [
        Site(part.prefix.rstrip("."), slot, part.sizes)
        for part in map(legacy_part, parts)
        for slot in slots(part, leaves)
    ]


def check(parts: Sequence[Part], leaves: Mapping[str, Leaf]) -> None:
    """Raise UserError if there is no adapter, or one that diffusers does not read from a file."""
    found = sites(parts, leaves)
    if not found:
        raise UserError(
            "export.kind='lora' needs lora.rank > 0; use export.kind='folder' or 'single_file'"
        )
    unread = (
        one for one in found if one.name in UNREAD or one.slot.module.startswith(UNREAD_BLOCKS)
    )
    if odd := sorted(site.name for site in unread):
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
    """Write `pytorch_lora_weights.safetensors`, with `scale` multiplied into B.

    The file has no alpha, so that diffusers uses alpha = rank, which is a scale of 1. A layer whose
    A is zero has no adapter and is left out.
    """
    tensors = {}
    for site in sites(parts, leaves):
        a, b, m = site.factors(arrays)
        if not a.any():
            continue
        tensors[f"{site.name}.lora_A.weight"] = a
        tensors[f"{site.name}.lora_B.weight"] = scale * b
        if m is not None:
            # PEFT has [out] beside a linear layer and [1, out, 1, 1] beside a convolution. Its own
            # keys end here, but transformers 5 finds those of text encoders with an end alone.
            end = ".weight" if site.component.startswith("text_encoder") else ""
            shape = m.shape if b.ndim == 2 else (1, -1, 1, 1)
            tensors[f"{site.name}{MAGNITUDE_END}{end}"] = m.reshape(shape)
    return _write(folder, LORA_STEM, tensors)


def write_kohya(
    folder: Path,
    name: str,
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, Any],
    scale: float,
    metadata: Mapping[str, str],
    layouts: Mapping[str, LDMLayout],
) -> Path:
    """Write `NAME.kohya.safetensors` under diffusers' block names, which all programs read.

    A component of `layouts` has the names of single files instead, and the scale in its weights.
    `metadata`: see `metadata` and `single_file.modelspec`. A layer whose A is zero is left out.
    """
    second = any(part.prefix == "text_encoder_2." for part in parts)
    tensors: dict[str, np.ndarray] = {}
    for site in sites(parts, leaves):
        own = site.factors(arrays)
        if site.component in layouts or not own.a.any():
            continue
        tensors |= _named(_stem(site, second), DOWN_UP, own, scale * len(own.a))
    for module, own in _of_single_file(parts, leaves, arrays, scale, layouts).items():
        stem = f"lora_unet_{module.replace('.', '_')}"
        tensors |= _named(stem, DOWN_UP, own, len(own.a))
    return _write(folder, f"{name}.kohya", tensors, metadata)


def write_lokr(
    folder: Path,
    name: str,
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, Any],
    scale: float,
    metadata: Mapping[str, str],
) -> Path:
    """Write `NAME.lycoris.safetensors`, a LoKr in LyCORIS' layout under kohya's names."""
    tensors: dict[str, np.ndarray] = {}
    for site in sites(parts, leaves):
        a, b, _ = site.factors(arrays)
        w1 = site.factor(arrays, "lora_k")
        own = {W1: w1, W2_A: b.reshape(len(b), -1), W2_B: a.reshape(len(a), -1)}
        own["alpha"] = np.array(scale * len(a), np.float32)
        tensors |= {f"{_stem(site, False)}.{piece}": x for piece, x in own.items()}
    return _write(folder, f"{name}{LOKR_END}".removesuffix(".safetensors"), tensors, metadata)


def _stem(site: Site, second: bool) -> str:
    """Return the beginning of the keys of a site in kohya's files. second: of two text encoders."""
    return KOHYA[site.component][-1 if second else 0] + site.slot.module.replace(".", "_")


def write_original(
    folder: Path,
    name: str,
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, Any],
    scale: float,
    metadata: Mapping[str, str],
    layouts: Mapping[str, LDMLayout],
) -> Path:
    """Write `NAME.original.safetensors`: the adapters of `layouts` under their original names.

    The scale is in the weights, and alpha is the rank. Arguments are as in `write_kohya`.
    """
    tensors: dict[str, np.ndarray] = {}
    for module, own in _of_single_file(parts, leaves, arrays, scale, layouts).items():
        tensors |= _named(f"{GENERIC}{module}", ("lora_A", "lora_B"), own, len(own.a))
    return _write(folder, f"{name}.original", tensors, metadata)


def _of_single_file(
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    arrays: Mapping[str, Any],
    scale: float,
    layouts: Mapping[str, LDMLayout],
) -> dict[str, Factors]:
    """Return the factors of each adapted module of single files, with `scale` multiplied into B.

    Beside DoRA, `arrays` has the kernels of the modules that single files hold with adapted ones.
    """
    made: dict[str, Factors] = {}
    for part in map(legacy_part, parts):
        component = part.prefix.rstrip(".")
        if component not in layouts:
            continue
        own = {slot.module: Site(component, slot, part.sizes) for slot in slots(part, leaves)}
        factors = {module: site.factors(arrays) for module, site in own.items()}
        used = {module: x._replace(b=scale * x.b) for module, x in factors.items() if x.a.any()}
        beside = (
            unadapted(layouts[component], used)
            if any(s.slot.layout_m for s in own.values())
            else set()
        )
        made |= fused(layouts[component], used, _norms(part, leaves, arrays, beside))
    return made


def _norms(
    part: Part, leaves: Mapping[str, Leaf], arrays: Mapping[str, Any], modules: Collection[str]
) -> dict[str, np.ndarray]:
    """Return the norm of each row of the weights of these modules [out]."""
    made = {}
    for entry in part.entries(leaves):
        for i, key in enumerate(entry.keys):
            if (module := part.named(key).removesuffix(".weight")) in modules:
                kernel = to_host(arrays[entry.path]).astype(np.float32)
                weight = to_torch(kernel[i] if entry.stacked else kernel, entry.layout, part.sizes)
                made[module] = np.linalg.norm(weight.reshape(len(weight), -1), axis=1)
    return made


def _named(
    stem: str, sides: tuple[str, str], factors: Factors, alpha: float
) -> dict[str, np.ndarray]:
    """Return the tensors of a module in kohya's format, with LyCORIS' norms of DoRA [out, 1, …]."""
    a, b, m = factors
    made = {f"{stem}.{side}.weight": x for side, x in zip(sides, (a, b), strict=True)}
    made[f"{stem}.alpha"] = np.array(alpha, np.float32)
    if m is not None:
        made[f"{stem}{DORA_SCALE}"] = m.reshape(-1, *[1] * (b.ndim - 1))
    return made


def metadata(
    kind: str, name: str, base: str, rank: int, alpha: float, lokr: int = 0
) -> dict[str, str]:
    """Return the ss_* keys by which UIs sort and describe a LoRA.

    `kind` is a key of VERSIONS. lokr: the factor of a LoKr.
    """
    network = NETWORKS.get(kind, "networks.lora")
    arguments = {"conv_dim": str(rank), "conv_alpha": str(alpha)}
    if lokr:
        network, arguments = "lycoris.kohya", {"algo": "lokr", "factor": str(lokr), **arguments}
    return {
        "ss_network_module": network,
        "ss_network_dim": str(rank),
        "ss_network_alpha": str(alpha),
        "ss_network_args": json.dumps(arguments),
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
