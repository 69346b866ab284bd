"""The oracle's own rounding, which every bound is a multiple of.

A stock model answers in float32 and, the same weights widened, in float64. Their distance is what
float32 costs on this machine, for this model and these inputs. jaxft computes in float32 too, in
another order, so it lands at about that distance; a fault lands far outside. A fixed bound cannot
tell them apart: the same model is ten times as far from itself on one CPU as on another.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

# Measured on small models of every kind: jaxft is 0.3 to 2.0 times that distance away from the
# oracle in float32. The planted faults of tests/verify/test_verify_faults.py are 390 times and
# more in their logits.
MULTIPLE = 6.0
DRAWS = 2
LARGE = 2_000_000_000  # parameters: 16 GB in float64
FLOAT32_UNIT = (
    2.0**-23
)  # one rounding of float32; a model that is exact by luck is not asked for more


def bound(own: float, scale: float = 1.0) -> float:
    """Largest distance that rounding explains, for values up to `scale`."""
    return MULTIPLE * max(own, FLOAT32_UNIT * scale)


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


def variants(
    model: Any, gradients: Mapping[str, np.ndarray], distances: dict[str, float]
) -> Iterator[None]:
    """Turn a stock model into one that rounds otherwise, again and again: run it in each turn.

    DRAWS times it stays in float32 and draws its roundings anew, then it is in float64, where it
    remains. `distances` receives the largest norm of what a turn's gradients differ by from
    `gradients`, by key. Each gradient is freed once it is measured, so that a turn costs no more
    memory than the weights: 8 bytes a parameter in float64. A model of more than LARGE parameters
    stays in float32.
    """
    for seed in range(DRAWS):
        with _redrawn(model, seed), _measured(model, gradients, distances):
            yield
    if sum(one.numel() for one in model.parameters()) <= LARGE:
        with _measured(_widened(model), gradients, distances):
            yield


def _widened(model: Any) -> Any:
    """The model in float64, in place: its float32 weights are exact in it.

    Where its code asks for float32 (RMSNorm, rotary angles, time embeddings), it still gets it.
    """
    for parameter in model.parameters():
        parameter.grad = None
    return model.double()


@contextmanager
def _redrawn(model: Any, seed: int) -> Iterator[None]:
    """Move each output of a layer by one rounding towards 0 or not at all, at random.

    All that follows rounds otherwise then. One run in float32 is but one draw: where an attention
    score of 600 decides between two tokens, it may be exact by luck, and another one not. Towards
    0, because a value that is clamped at a limit then stays within, and keeps its gradient.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def move(_: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        step = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8)
        return output * (1 - FLOAT32_UNIT * step.to(output.dtype))

    layers = [one for one in model.modules() if next(one.children(), None) is None]
    handles = [one.register_forward_hook(move) for one in layers]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _measured(
    model: Any, gradients: Mapping[str, np.ndarray], distances: dict[str, float]
) -> Iterator[None]:
    def hook(key: str) -> Callable[[Any], None]:
        def measure(parameter: Any) -> None:
            apart = float(np.linalg.norm(parameter.grad.numpy() - gradients[key]))
            distances[key] = max(distances.get(key, 0.0), apart)
            parameter.grad = None

        return measure

    parameters = names_of(model)
    for parameter in parameters.values():
        parameter.grad = None
    handles = [
        one.register_post_accumulate_grad_hook(hook(key))
        for key, one in parameters.items()
        if key in gradients and one.requires_grad
    ]
    yield
    for handle in handles:
        handle.remove()


def farthest(theirs: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Largest difference of an output from the same one rounded otherwise."""
    return max(apart(one, theirs) for one in others)


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
