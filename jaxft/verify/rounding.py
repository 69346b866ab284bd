"""The oracle's own rounding, which every bound is a multiple of.

A stock model answers in float32 and, the same weights widened, in float64. Their distance is what
float32 costs on this machine, for this model and these inputs. jaxft computes in float32 too, in
another order, so it lands at about that distance; a fault lands far outside. A fixed bound cannot
tell them apart: the same model is ten times as far from itself on one CPU as on another.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np

# Measured on small models of every kind: jaxft is 0.3 to 2.0 times that distance away from the
# oracle in float32. The planted faults of tests/test_verify_faults.py are 390 times and more in
# their logits.
MULTIPLE = 6.0
UNIT = 2.0**-23  # one rounding of float32; a model that is exact by luck is not asked for more


def bound(own: float, scale: float = 1.0) -> float:
    """Largest distance that rounding explains, for values up to `scale`."""
    return MULTIPLE * max(own, UNIT * scale)


def widened(model: Any) -> Any:
    """The stock model in float64, in place: its float32 weights are exact in it.

    A weight at a time, so that memory peaks at 8 bytes a parameter. Where the model's code asks
    for float32 (RMSNorm, rotary angles, time embeddings), it still gets it.
    """
    for parameter in model.parameters():
        parameter.grad = None
    return model.double()


def names_of(model: Any) -> dict[str, Any]:
    """Parameters of a stock model by the keys of its files; PEFT's wrapping is taken off."""
    return {_plain(key): parameter for key, parameter in model.named_parameters()}


def _plain(key: str) -> str:
    for inner in (".lora_A", ".lora_B"):
        if inner in key:
            return key.replace(f"{inner}.default.", f"{inner}.")
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def digests(model: Any) -> dict[str, str]:
    """A digest of each float32 weight as the stock library loaded it."""
    return {key: digest(one.detach().numpy()) for key, one in names_of(model).items()}


def digest(array: np.ndarray) -> str:
    """A digest of shape and values in float32."""
    content = np.ascontiguousarray(array, np.float32)
    return hashlib.blake2b(str(content.shape).encode() + content.tobytes()).hexdigest()


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    """Gradients by key of what has one."""
    parameters = names_of(model).items()
    return {key: one.grad.numpy() for key, one in parameters if one.grad is not None}


@contextmanager
def distances(model: Any, gradients: Mapping[str, np.ndarray]) -> Iterator[dict[str, float]]:
    """Norms of what a widened model's gradients differ by from `gradients`, by key.

    They are there when `backward()` inside the block returns. Each gradient is freed once it is
    measured, so that the widened model costs no more memory than the weights.
    """
    found: dict[str, float] = {}

    def hook(key: str) -> Callable[[Any], None]:
        def measure(parameter: Any) -> None:
            found[key] = float(np.linalg.norm(parameter.grad.numpy() - gradients[key]))
            parameter.grad = None

        return measure

    handles = [
        one.register_post_accumulate_grad_hook(hook(key))
        for key, one in names_of(model).items()
        if key in gradients and one.requires_grad
    ]
    yield found
    for handle in handles:
        handle.remove()


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Largest difference of two arrays."""
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    """KL(theirs || ours) of logits, summed over the vocabulary, the largest over positions."""
    p, q = log_softmax(theirs), log_softmax(ours)
    return (
        max(float((np.exp(p) * (p - q)).sum(-1).max()), 0.0) if not np.isnan(q).any() else math.nan
    )
