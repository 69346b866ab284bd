"""The oracle's own rounding, of which every bound is a multiple.

A stock model computes in float32 and, with the same weights widened, in float64. The distance of
the two results is the cost of float32 on this machine, for this model and these inputs. jaxft
computes in float32 too, in another order, so its distance is about the same. A fault causes a far
larger distance. A fixed bound cannot separate the two: the same model is ten times as far from
itself on one CPU as on another.
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
FLOAT32_UNIT = 2.0**-23  # one rounding of float32, the least that is assumed of any model
# Modules of diffusers that embed times in (0, 1), or such times and more. Their sinusoids' angles
# are up to 3500, and are rounded three times. No layer before them can show that.
EMBEDS_TIME = (
    "CombinedTimestepTextProjEmbeddings",
    "CombinedTimestepGuidanceTextProjEmbeddings",
    "Flux2TimestepGuidanceEmbeddings",
    "TimestepEmbedder",
)


def bound(own: float, scale: float = 1.0) -> float:
    """Return the largest distance that rounding explains, for values up to `scale`."""
    return MULTIPLE * max(own, FLOAT32_UNIT * scale)


def names_of(model: Any) -> dict[str, Any]:
    """Return the parameters of a stock model by the keys of its files, without PEFT's wrapping."""
    return {_plain(key): parameter for key, parameter in model.named_parameters()}


def _plain(key: str) -> str:
    for inner in (".lora_A", ".lora_B", ".lora_magnitude_vector", ".trainable_tokens_delta"):
        if inner in key:
            return key.replace(f"{inner}.default", inner)
    plain = key.removeprefix("base_model.model.").replace(".token_adapter.base_layer.", ".")
    return plain.replace(".base_layer.", ".")


# Names of experts in files: the start of a mixture's, then gate, up and down.
EXPERTS_IN_FILES = {
    "mixtral": ("block_sparse_moe.", ("w1", "w3", "w2")),
    "qwen3_moe": ("mlp.", ("gate_proj", "up_proj", "down_proj")),
}


def in_files(model: Any, key: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Return a parameter under the keys of its files. transformers 5 fuses experts in memory.

    array: the parameter or its gradient, [E, 2 F, D] or [E, D, F] for fused experts.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    layer, _, end = key.partition("mlp.")
    if kind not in EXPERTS_IN_FILES or not end:
        return {key: array}
    start, (*halves, down) = EXPERTS_IN_FILES[kind]
    fused = {
        "experts.gate_up_proj": lambda: zip(halves, np.split(array, 2, axis=1), strict=True),
        "experts.down_proj": lambda: [(down, array)],
    }
    if end not in fused:
        return {f"{layer}{start}{end}": array}
    return {
        f"{layer}{start}experts.{number}.{name}.weight": one
        for name, every in fused[end]()
        for number, one in enumerate(every)
    }


def digests(model: Any) -> dict[str, str]:
    """Return a digest of each float32 weight as the stock library loaded it."""
    every = ((key, one.detach().numpy()) for key, one in names_of(model).items())
    return {name: digest(one) for pair in every for name, one in in_files(model, *pair).items()}


def digest(array: np.ndarray) -> str:
    """Return a digest of shape and values in float32."""
    content = np.ascontiguousarray(array, np.float32)
    return hashlib.blake2b(str(content.shape).encode() + content.tobytes()).hexdigest()


def gradients_of(model: Any) -> dict[str, np.ndarray]:
    """Return the gradients by key, for the parameters that have one."""
    every = ((key, one.grad) for key, one in names_of(model).items() if one.grad is not None)
    pairs = ((key, grad.numpy()) for key, grad in every)
    return {name: one for pair in pairs for name, one in in_files(model, *pair).items()}


def variants(
    model: Any, gradients: Mapping[str, np.ndarray], distances: dict[str, float]
) -> Iterator[None]:
    """Change the rounding of a stock model, and yield after each change. Run the model each time.

    In the first DRAWS turns the model stays in float32 with new random roundings. In the last turn
    it is in float64, where it remains. A model of more than LARGE parameters stays in float32.
    `distances` receives, by key, the largest norm of the difference of a turn's gradients from
    `gradients`. Each gradient is freed once it is measured, so that a turn costs no more memory
    than the weights: 8 bytes a parameter in float64.
    """
    for seed in range(DRAWS):
        with _redrawn(model, seed), _measured(model, gradients, distances):
            yield
    if sum(one.numel() for one in model.parameters()) <= LARGE:
        for parameter in model.parameters():
            parameter.grad = None
        # The float32 weights are exact in float64. Code that casts to float32 (RMSNorm, rotary
        # angles, time embeddings) still does.
        with _measured(model.double(), gradients, distances):
            yield


@contextmanager
def _redrawn(model: Any, seed: int) -> Iterator[None]:
    """Move each output of a layer by one rounding towards 0 or not at all, at random.

    All later values then round otherwise. One run in float32 is only one sample: if an attention
    score of 600 decides between two tokens, one run may be exact by luck and another not. The move
    is towards 0, so that a value that is clamped at a limit stays within it and keeps its gradient.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)

    def move(_: Any, inputs: Any, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        step = torch.randint(0, 2, output.shape, generator=generator, dtype=torch.int8)
        return output * (1 - FLOAT32_UNIT * step.to(output.dtype))

    def moved(inputs: Any) -> Any:
        sign = 1 - 2 * (seed % 2)
        return tuple(one if one is None else one * (1 + sign * FLOAT32_UNIT) for one in inputs)

    layers = [one for one in model.modules() if next(one.children(), None) is None]
    handles = [one.register_forward_hook(move) for one in layers]
    timed = [one for one in model.modules() if type(one).__name__ in EMBEDS_TIME]
    handles += [one.register_forward_pre_hook(lambda _, x: moved(x)) for one in timed]
    yield
    for handle in handles:
        handle.remove()


@contextmanager
def _measured(
    model: Any, gradients: Mapping[str, np.ndarray], distances: dict[str, float]
) -> Iterator[None]:
    def hook(key: str) -> Callable[[Any], None]:
        def measure(parameter: Any) -> None:
            for name, grad in in_files(model, key, parameter.grad.numpy()).items():
                apart = float(np.linalg.norm(grad - gradients[name]))
                distances[name] = max(distances.get(name, 0.0), apart)
            parameter.grad = None

        return measure

    parameters = names_of(model)
    for parameter in parameters.values():
        parameter.grad = None
    handles = [
        one.register_post_accumulate_grad_hook(hook(key))
        for key, one in parameters.items()
        if one.requires_grad and next(iter(in_files(model, key, one.detach().numpy()))) in gradients
    ]
    yield
    for handle in handles:
        handle.remove()


def farthest(theirs: np.ndarray, others: Sequence[np.ndarray]) -> float:
    """Return the largest difference of an output from the same output rounded otherwise."""
    return max(apart(one, theirs) for one in others)


def apart(one: np.ndarray, other: np.ndarray) -> float:
    """Return the largest difference of two arrays."""
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(other, np.float64)).max())


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Return log-probabilities in float64."""
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def divergence(theirs: np.ndarray, ours: np.ndarray) -> float:
    """Return KL(theirs || ours) of logits: summed over the vocabulary, largest over positions."""
    p, q = log_softmax(theirs), log_softmax(ours)
    return (
        max(float((np.exp(p) * (p - q)).sum(-1).max()), 0.0) if not np.isnan(q).any() else math.nan
    )
