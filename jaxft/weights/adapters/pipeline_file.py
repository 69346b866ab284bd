"""Reading of LoRA files of diffusion pipelines: those of jaxft, diffusers (PEFT) and kohya."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE, Leaf, named
from jaxft.weights.adapters.lokr import as_kronecker
from jaxft.weights.adapters.lycoris import as_lora
from jaxft.weights.adapters.original_names import DORA_SCALE, side_of, under_diffusers_names
from jaxft.weights.adapters.pipeline import KOHYA, LORA_STEM, Site, sites
from jaxft.weights.files.tensor_files import TensorFiles, Tensors
from jaxft.weights.folders.diffusers import COMPONENTS, LEGACY
from jaxft.weights.folders.single_file import LDMLayout, renamed
from jaxft.weights.rules import to_jax, to_torch
from jaxft.weights.transfer import Part

OTHER_METHODS = {  # a piece of a key, and the method that it belongs to
    ".oft_": "OFT",
    ".diff.": "full differences of weights",
    ".diff_b.": "full differences of weights",
    ".lora_B.bias.": "LoRA with biases",
}
GIVE_TRAINED_BASE = "give the model that the LoRA was trained on by model=MODEL"


class AdaptedSite(NamedTuple):
    """One projection that a file adapts: the keys of its factors, its rank, the scale of A B."""

    site: Site
    keys: Mapping[str, str]
    rank: int
    scale: float


class PipelineLora(NamedTuple):
    """A LoRA file. `lora` has its largest rank, its most common scale, and its targets."""

    lora: Lora
    tensors: Tensors
    adapted: tuple[AdaptedSite, ...]


def open_lora(
    spec: str,
    parts: Sequence[Part],
    leaves: Mapping[str, Leaf],
    layouts: Mapping[str, LDMLayout],
    lokr: int = 0,
) -> PipelineLora:
    """Open a LoRA file, or a folder with one, for the pipeline that it was trained on.

    `leaves` describes a model in which every projection has an adapter, of any rank. `layouts` are
    LDM's, by component, because kohya's files name the blocks of an SDXL UNet as LDM does, and
    those of FLUX.1 as Black Forest Labs. lokr: the factor of a LoKr that goes on as such, and that
    `leaves` has. Otherwise one becomes a plain LoRA.
    Raises: UserError for tensors without a place, of another shape, or of another method than LoRA.
    """
    file, places = _file(spec), sites(parts, leaves)
    inputs = {
        name: _shape(site, leaves, "lora_a")[1:]
        for site in places
        for name in _names(site, layouts)
    }
    if lokr:
        kernels = {name: shape[1:] for name, shape in inputs.items()}
        tensors = as_kronecker(f"{file}", TensorFiles.open(file), kernels)
    else:
        tensors = as_lora(f"{file}", TensorFiles.open(file), inputs)
    keys = list(tensors.keys())
    for piece, method in OTHER_METHODS.items():
        if found := sorted(key for key in keys if piece in f"{key}."):
            raise UserError(
                f"{file}: {found[0]} is of {method}, and plain LoRA alone is supported; merge the"
                " file into its base with the program that made it, and give that model"
            )
    if "transformer" in layouts:
        tensors = under_diffusers_names(tensors, layouts["transformer"], "transformer")
    matched, odd = _match(tensors.keys(), places, layouts)
    stated = _stated_scales(file)
    adapted = tuple(_adapted(file, tensors, one, leaves, stated) for one in matched)
    if odd:
        raise UserError(f"{file}: no place for {named(odd)} in this model; {GIVE_TRAINED_BASE}")
    if not adapted:
        raise UserError(f"{file} holds no tensors; give the file of a LoRA by lora.from=FILE")
    plain = [one.site.name for one in adapted if "lora_m" not in one.keys]
    if 0 < len(plain) < len(adapted):
        raise UserError(
            f"{file}: {plain[0]} is of plain LoRA, and others are of DoRA; merge the file into its"
            " base with the program that made it, and give that model"
        )
    rank = max(one.rank for one in adapted)
    scale = Counter(one.scale for one in adapted).most_common(1)[0][0]
    paths = sorted({re.escape(one.site.slot.path) for one in adapted})
    own = Lora(rank, scale * rank, "|".join(paths), dora=not plain, lokr=lokr)
    return PipelineLora(own, tensors, adapted)


def load(found: PipelineLora, leaves: Mapping[str, Leaf]) -> dict[str, np.ndarray]:
    """Return the arrays of a LoRA by path, fp32, for a model built with `found.lora`.

    The model has one scale. A projection of another scale has its B multiplied by the quotient. A
    smaller rank is filled up with zeros, and so are layers of a stack that the file lacks. These
    zeros do not change the product A B, and their gradients are zero.
    """
    arrays = {
        path: np.zeros(leaf.shape, np.float32)
        for path, leaf in leaves.items()
        if leaf.role == ADAPTER_ROLE
    }
    common = found.lora.alpha / found.lora.rank
    for one in found.adapted:
        slot, sizes = one.site.slot, one.site.sizes
        layer = ... if slot.layer is None else slot.layer
        for _, side, layout in slot.sides():
            if side not in one.keys:  # plain LoRA
                continue
            tensor = found.tensors.read(one.keys[side]).astype(np.float32)
            tensor = tensor.ravel() if side == "lora_m" else tensor
            factor = to_jax(tensor, layout, sizes)
            whole = arrays[f"{slot.path}.{side}"][layer]
            if side in ("lora_m", "lora_k"):
                whole[...] = factor
            elif side == "lora_a":
                whole[..., : one.rank] = factor
            else:
                whole[: one.rank] = factor * (one.scale / common)
    return arrays


def _file(spec: str) -> Path:
    path = Path(spec).expanduser()
    if path.is_dir():
        named = path / f"{LORA_STEM}.safetensors"
        others = sorted(path.glob("*.safetensors"))
        path = others[0] if len(others) == 1 else named
    if not path.is_file():
        raise UserError(
            f"lora.from={spec!r}: no such file; expected {LORA_STEM}.safetensors or a file of"
            " kohya's"
        )
    return path


def _match(
    keys: Sequence[str], places: Sequence[Site], layouts: Mapping[str, LDMLayout]
) -> tuple[list[tuple[Site, dict[str, str]]], list[str]]:
    """Return each site with its keys by side, and the keys that have no site."""
    known = {name: site for site in places for name in _names(site, layouts)}
    matched: dict[str, tuple[Site, dict[str, str]]] = {}
    odd = []
    for key in sorted(keys):
        side, stem = side_of(key)
        site = known.get(stem)
        if site is None or side in matched.setdefault(site.name, (site, {}))[1]:
            odd.append(key)
        else:
            matched[site.name][1][side] = key
    return list(matched.values()), odd


def _names(site: Site, layouts: Mapping[str, LDMLayout]) -> Iterator[str]:
    """Yield the beginnings of keys that name this site, in all formats."""
    module = site.slot.module
    yield site.name
    yield f"{site.component}.{module.removeprefix(LEGACY)}"  # the name in transformers 5
    modules = {module}
    if site.component in layouts:
        modules.add(renamed(module, layouts[site.component].names))
    for prefix in KOHYA.get(site.component, ()):
        yield from (prefix + one.replace(".", "_") for one in modules)


def _shape(site: Site, leaves: Mapping[str, Leaf], side: str) -> tuple[int, ...]:
    """Return the shape of a site's factor in torch's layout, with the rank of `leaves`."""
    (layout,) = (layout for _, one, layout in site.slot.sides() if one == side)
    leaf = leaves[f"{site.slot.path}.{side}"]
    shape = leaf.shape[1:] if leaf.stacked else leaf.shape
    return to_torch(np.broadcast_to(np.int8(0), shape), layout, site.sizes).shape


def _stated_scales(file: Path) -> dict[str, float]:
    """Return alpha / r by component, which diffusers 0.34+ writes to the header of a PEFT file."""
    with safe_open(file, "np") as opened:
        text = (opened.metadata() or {}).get("lora_adapter_metadata", "{}")
    stated, scales = json.loads(text), {}
    for component in COMPONENTS:
        rank, alpha = (stated.get(f"{component}.{key}") for key in ("r", "lora_alpha"))
        if any(stated.get(f"{component}.{key}") for key in ("alpha_pattern", "rank_pattern")):
            raise UserError(f"{file}: {component} has ranks or alphas of several sizes; give one")
        if rank and alpha is not None:
            root = stated.get(f"{component}.use_rslora")
            scales[component] = alpha / (rank**0.5 if root else rank)
    return scales


def _adapted(
    file: Path,
    tensors: Tensors,
    matched: tuple[Site, Mapping[str, str]],
    leaves: Mapping[str, Leaf],
    stated: Mapping[str, float],
) -> AdaptedSite:
    """Return a site with its rank and scale. Without an alpha the scale is 1, as in diffusers.

    Raises: UserError for factors that do not fit the site.
    """
    site, keys = matched
    wanted = {side for _, side, _ in site.slot.sides()} - {"lora_m"}
    if gone := sorted(wanted - keys.keys()):
        raise UserError(f"{file}: {site.name} lacks its {gone[0]} factor; the file is not whole")
    if "lora_k" in keys:
        _check_blocks(file, keys["lora_k"], tensors.info(keys["lora_k"])[0], site, leaves)
    ranks = []
    for axis, (_, side, _) in enumerate(site.slot.sides()[:2]):  # A [r, in, ...], B [out, r, ...]
        got = list(tensors.info(keys[side])[0])
        want: list[Any] = list(_shape(site, leaves, side))
        want[axis] = "rank"
        if len(got) != len(want) or [*got[:axis], "rank", *got[axis + 1 :]] != want:
            raise UserError(
                f"{file}: {keys[side]} {got} does not fit {site.name} of this model, which takes"
                f" [{', '.join(map(str, want))}]; {GIVE_TRAINED_BASE}"
            )
        ranks.append(got[axis])
    if ranks[0] != ranks[1]:
        raise UserError(f"{file}: the factors of {site.name} have ranks {ranks[0]} and {ranks[1]}")
    if "lora_m" in keys:
        _check_norms(file, keys["lora_m"], tensors.info(keys["lora_m"])[0], site, leaves)
    scale = stated.get(site.component, 1.0)
    if "alpha" in keys:
        scale = float(tensors.read(keys["alpha"]).item()) / ranks[0]
    if not scale:
        raise UserError(f"{file}: alpha of {site.name} is 0, which turns the LoRA off; correct it")
    return AdaptedSite(site, keys, ranks[0], scale)


def _check_blocks(
    file: Path, key: str, got: tuple[int, ...], site: Site, leaves: Mapping[str, Leaf]
) -> None:
    """Raise UserError for W1 of a LoKr with another factor than `lora.lokr`."""
    if got != (want := _shape(site, leaves, "lora_k")):
        raise UserError(
            f"{file}: {key} {list(got)} is not {list(want)}, which {site.name} has with this"
            " lora.lokr; give the factor that the LoKr was trained with"
        )


def _check_norms(
    file: Path, key: str, got: tuple[int, ...], site: Site, leaves: Mapping[str, Leaf]
) -> None:
    """Raise UserError for norms of DoRA that are not those of the outputs of a site."""
    outs, ins = _shape(site, leaves, "lora_b")[0], _shape(site, leaves, "lora_a")[1]
    first = got[0] if key.endswith(DORA_SCALE) else prod(got)  # [out, 1, …] or [1, out, 1, 1]
    if first == outs and prod(got) == outs:
        return
    if prod(got) == ins and got[0] == 1:
        raise UserError(
            f"{file}: {key} {list(got)} has the norms of the inputs (LyCORIS' wd_on_output=False),"
            " and jaxft trains those of the outputs; merge the file into its base with LyCORIS, and"
            " give that model"
        )
    raise UserError(
        f"{file}: {key} {list(got)} does not fit {site.name} of this model, which has {outs}"
        f" outputs; {GIVE_TRAINED_BASE}"
    )
