"""LoRA of a transformer under the names of single files, as kohya and ComfyUI have it.

A module of a single file may hold several of diffusers', such as q, k and v. Adapters of these
become one of their summed rank, whose B has blocks along its diagonal. All products A B are kept.
"""

from collections.abc import Collection, Mapping
from typing import NamedTuple

import numpy as np

from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.folders.single_file import LDMLayout
from jaxft.weights.views import InMemory, Overlaid, Renamed, RowSpan

MAGNITUDE_END, DORA_SCALE = ".lora_magnitude_vector", ".dora_scale"  # of diffusers and of LyCORIS
WHOLE_MODULE = RowSpan(0, 1, 1)
GENERIC = "diffusion_model."  # ComfyUI reads it before the names of single files, for every model
SIDES = {
    "lora_a": (".lora_A.weight", ".lora_down.weight"),
    "lora_b": (".lora_B.weight", ".lora_up.weight"),
    "lora_k": (".lokr_w1",),
    "lora_m": (MAGNITUDE_END, f"{MAGNITUDE_END}.weight", DORA_SCALE),
    "alpha": (".alpha",),
}


class Factors(NamedTuple):
    """A [r, in, …], B [out, r, …], and with DoRA the norms m [out] of the weights."""

    a: np.ndarray
    b: np.ndarray
    m: np.ndarray | None = None


def side_of(key: str) -> tuple[str, str]:
    """Return the factor that a key holds, and the module's name before it."""
    for side, ends in SIDES.items():
        for end in ends:
            if key.endswith(end):
                return side, key.removesuffix(end)
    return "", key


def _modules(layout: LDMLayout) -> dict[str, dict[str, RowSpan]]:
    """Return diffusers' modules, with their rows, by the module of a single file with them."""
    found = {theirs: {name: WHOLE_MODULE} for name, theirs in layout.names.items()}
    for name, (theirs, rows) in layout.rows.items():
        found.setdefault(theirs, {})[name] = rows
    return found


def unadapted(layout: LDMLayout, adapted: Collection[str]) -> set[str]:
    """Return diffusers' modules without an adapter that a single file holds beside adapted ones."""
    shared = (own for own in _modules(layout).values() if not own.keys().isdisjoint(adapted))
    return {name for own in shared for name in own if name not in adapted}


def fused(
    layout: LDMLayout, factors: Mapping[str, Factors], norms: Mapping[str, np.ndarray] = {}
) -> dict[str, Factors]:
    """Return the factors of each module of a single file, from those of diffusers' modules.

    Rows of a module without an adapter are zeros. norms: with DoRA, those of the rows of
    `unadapted` modules.
    """
    made = {}
    for theirs, modules in _modules(layout).items():
        own = {name: rows for name, rows in modules.items() if name in factors}
        if not own:
            continue
        low = np.concatenate([factors[name].a for name in own])  # [sum of r, in]
        name, rows = next(iter(own.items()))
        unit = len(factors[name].b) // (rows.stop - rows.start)
        kernel = factors[name].b.shape[2:]  # of a convolution
        up, column = np.zeros((unit * rows.of, len(low), *kernel), np.float32), 0
        m = None if factors[name].m is None else np.zeros(len(up), np.float32)
        for name, rows in modules.items():
            span = slice(rows.start * unit, rows.stop * unit)
            if m is not None:
                m[span] = factors[name].m if name in own else norms[name]
            if name in own:
                a = factors[name].a
                up[span, column : column + len(a)] = factors[name].b
                column += len(a)
        m = None if m is None else _swapped(layout, name, m)
        made[theirs] = Factors(low, _swapped(layout, name, up), m)
    return made


def under_diffusers_names(tensors: Tensors, layout: LDMLayout, component: str) -> Tensors:
    """Return a LoRA file whose keys of a transformer are those of diffusers' files.

    Modules may have diffusers' names after the prefix of single files, as ai-toolkit writes them.
    Ranks whose B is zero for a module are left out of it, and so is a module whose B is zero beside
    others that are not, unless DoRA scales it. Other keys are unchanged.
    """
    known = {name: {name: WHOLE_MODULE} for name in (*layout.names, *layout.rows)}
    theirs_only = _modules(layout).keys() - known.keys()
    known |= _modules(layout)
    stems = {f"{GENERIC}{theirs}": theirs for theirs in known}
    # The prefix of diffusers' files, before a name that is not diffusers'.
    stems |= {f"{component}.{theirs}": theirs for theirs in theirs_only}
    stems |= {f"lora_unet_{theirs.replace('.', '_')}": theirs for theirs in known}
    found: dict[str, dict[str, str]] = {}
    rest = []
    for key in tensors.keys():  # noqa: SIM118 (a Tensors is no dict)
        side, stem = side_of(key)
        if stem in stems and side not in found.get(stem, {}):
            found.setdefault(stem, {})[side] = key
        else:
            rest.append(key)
    made: dict[str, np.ndarray] = {}
    for stem, keys in found.items():
        if not {"lora_a", "lora_b"} <= keys.keys():
            rest += keys.values()  # not whole: the caller names it
            continue
        arrays = {side: tensors.read(key).astype(np.float32) for side, key in keys.items()}
        a, b, m = arrays["lora_a"], arrays["lora_b"], arrays.get("lora_m")
        for name, rows in known[stems[stem]].items():
            own = name == stems[stem]  # diffusers' name, under which nothing is exchanged
            up, unit = b if own else _swapped(layout, name, b), len(b) // rows.of
            up = up[rows.start * unit : rows.stop * unit]
            used = up.any(axis=(0, *range(2, up.ndim)))  # [r]
            if m is None and b.any() and not used.any():
                continue
            used |= not used.any()
            path = f"{component}.{name}"
            made[f"{path}.lora_A.weight"], made[f"{path}.lora_B.weight"] = a[used], up[:, used]
            if m is not None and len(m) == len(b):
                whole = m if own else _swapped(layout, name, m)
                made[f"{path}{DORA_SCALE}"] = whole[rows.start * unit : rows.stop * unit]
            elif m is not None:
                made[f"{path}{DORA_SCALE}"] = m  # of inputs: the caller names it
            if "alpha" in arrays:
                made[f"{path}.alpha"] = arrays["alpha"] * np.float32(used.mean())
    return Overlaid(Renamed(tensors, {key: key for key in rest}), InMemory(made))


def _swapped(layout: LDMLayout, name: str, up: np.ndarray) -> np.ndarray:
    """Return B with its halves exchanged, for a module whose halves a single file exchanges."""
    return np.roll(up, len(up) // 2, axis=0) if name in layout.swapped else up
