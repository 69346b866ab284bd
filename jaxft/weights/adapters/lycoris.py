"""LyCORIS files as plain LoRA with the same products: LoCon with a core, LoHa and LoKr.

Their updates of a weight are products, element by element or of Kronecker, of low-rank matrices.
Such an update is B A of a larger rank, and no number is lost. Norms of DoRA stay beside it.
Source: Yeh et al. 2023, arXiv:2309.14859, and the package lycoris-lora.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.views import InMemory, Overlaid, Renamed

METHODS = ("lora_mid.weight", "hada_w1_a", "lokr_w1", "lokr_w1_a")  # a piece that names the method

Pieces = Mapping[str, np.ndarray]


class Update(NamedTuple):
    """An update of a weight [out, in, …]: B [out, r] times A [r, in, …], without its alpha.

    rank: the divisor of alpha, None where alpha has no effect.
    """

    b: np.ndarray
    a: np.ndarray
    rank: int | None


def as_lora(file: str, tensors: Tensors, inputs: Mapping[str, tuple[int, ...]]) -> Tensors:
    """Return the tensors of a file, with lora_down, lora_up and alpha for each LyCORIS module.

    inputs: the shape (in, …) of the weights of each module, by the beginning of its keys. Modules
    without one are left as they are. Raises UserError for a module that is not whole or does not
    fit.
    """
    modules: dict[str, dict[str, str]] = {}
    for key in tensors.keys():  # noqa: SIM118 (a Tensors is no dict)
        stem, _, piece = key.partition(".")
        modules.setdefault(stem, {})[piece] = key
    made: dict[str, np.ndarray] = {}
    taken: set[str] = set()
    for stem, keys in modules.items():
        if stem not in inputs or keys.keys().isdisjoint(METHODS):
            continue
        arrays = {piece: tensors.read(key).astype(np.float32) for piece, key in keys.items()}
        try:
            update = _update(arrays, inputs[stem])
        except KeyError as gone:
            raise UserError(f"{file}: {stem} lacks {gone}; the file is not whole") from None
        except ValueError:
            raise UserError(
                f"{file}: the factors of {stem} do not fit each other, or its weights in this"
                " model; give the model that they were trained on by model=MODEL"
            ) from None
        scale = float(arrays["alpha"]) / update.rank if update.rank and "alpha" in arrays else 1.0
        kernel = (1,) * (len(inputs[stem]) - 1)
        made[f"{stem}.lora_down.weight"] = update.a
        made[f"{stem}.lora_up.weight"] = update.b.reshape(*update.b.shape, *kernel)
        made[f"{stem}.alpha"] = np.array(scale * len(update.a), np.float32)
        taken |= {key for piece, key in keys.items() if piece != "dora_scale"}
    kept = {key: key for key in tensors.keys() if key not in taken}  # noqa: SIM118
    return Overlaid(Renamed(tensors, kept), InMemory(made))


def _update(arrays: Pieces, inputs: tuple[int, ...]) -> Update:
    if "lora_mid.weight" in arrays:
        b, a = arrays["lora_up.weight"], arrays["lora_down.weight"]
        b, a = b.reshape(len(b), -1), a.reshape(len(a), -1)
        core = _times_core(arrays["lora_mid.weight"], a)
        return Update(b, core.reshape(len(core), *inputs), len(core))
    made = _hadamard(arrays) if "hada_w1_a" in arrays else _kronecker(arrays, inputs)
    b, a = made.b, made.a.reshape(made.a.shape[0], -1)  # [out, r], [r, in k]
    if len(a) > (least := min(len(b), a.shape[1])):  # a smaller rank has the same product
        whole, own = b @ a, np.eye(least, dtype=np.float32)
        b, a = (own, whole) if least == len(b) else (whole, own)
    return Update(b, a.reshape(len(a), *inputs), made.rank)


def _times_core(core: np.ndarray, low: np.ndarray) -> np.ndarray:
    """Return A [r, in, …] of a core [r, r, …] and factors [r, in] of Tucker's decomposition."""
    return np.einsum("ij...,jc->ic...", core, low)


def _hadamard(arrays: Pieces) -> Update:
    """LoHa: (B1 A1) * (B2 A2). Ranks are the pairs of ranks of both."""
    factors = []
    for i in ("1", "2"):
        b, a = arrays[f"hada_w{i}_a"], arrays[f"hada_w{i}_b"]
        if f"hada_t{i}" in arrays:
            b, a = b.T, _times_core(arrays[f"hada_t{i}"], a)
        factors.append((b, a.reshape(len(a), -1)))
    (b1, a1), (b2, a2) = factors
    b = np.einsum("oi,oj->oij", b1, b2).reshape(len(b1), -1)  # [out, r r]
    a = np.einsum("ic,jc->ijc", a1, a2).reshape(-1, a1.shape[1])  # [r r, in k]
    return Update(b, a, len(a1))


def _kronecker(arrays: Pieces, inputs: tuple[int, ...]) -> Update:
    """LoKr: W1 x W2 of Kronecker, where W2 = B2 A2 gives B = W1 x B2 and A = I x A2."""
    ranks = [len(arrays[name]) for name in ("lokr_w1_b", "lokr_w2_b") if name in arrays]
    w1 = arrays["lokr_w1"] if "lokr_w1" in arrays else arrays["lokr_w1_a"] @ arrays["lokr_w1_b"]
    if "lokr_w2" in arrays:
        b, a = np.eye(len(arrays["lokr_w2"]), dtype=np.float32), arrays["lokr_w2"]
    elif "lokr_t2" in arrays:
        b, a = arrays["lokr_w2_a"].T, _times_core(arrays["lokr_t2"], arrays["lokr_w2_b"])
    else:
        b, a = arrays["lokr_w2_a"], arrays["lokr_w2_b"]
    blocks = w1.shape[1]  # Q
    a = a.reshape(len(a), inputs[0] // blocks, -1)  # [r, in / Q, k]
    own = np.eye(blocks, dtype=np.float32)
    a = np.einsum("pq,rnk->prqnk", own, a).reshape(blocks * len(a), -1)  # [Q r, in k]
    return Update(np.kron(w1, b), a, ranks[0] if ranks else None)
