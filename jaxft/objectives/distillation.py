"""Distillation: the divergence of a model's next-token distributions from those of a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxft.core.params import Leaf
from jaxft.core.sharding import batch_ways
from jaxft.core.step import Batch, Metrics
from jaxft.kernels.cross_entropy import chunk_length
from jaxft.kernels.elementwise import soft_capped
from jaxft.objectives.next_token import NextToken


@dataclass(frozen=True)
class Distillation:
    """Forward KL divergence from the teacher, a decoder in `model.teacher`, at the trained tokens.

    The loss of a token is weight * T^2 KL(teacher / T, model / T) + (1 - weight) * cross-entropy,
    where T is the temperature. teacher_flops: FLOPs of its forward pass, a token.
    Source: Hinton et al. 2015, arXiv:1503.02531, section 2.
    """

    tokens: NextToken
    weight: float
    temperature: float
    teacher_flops: float = 0.0
    remat: str = "none"
    unit: ClassVar[str] = "tokens"
    unread: tuple[str, ...] = ()

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the summed loss, the number of trained tokens, and the divergence."""
        tokens = replace(self.tokens, remat=self.remat)
        dropout = keys if tokens.dropout else None
        hidden = tokens.hidden(model, batch, dropout)
        own, weights = tokens.trained_only(hidden, batch, tokens.width, ("weights",))
        taught = replace(tokens, remat="none").hidden(model.teacher, batch, None)
        taught = tokens.trained_only(taught, batch, tokens.width, ())[0]
        total = linear_divergence(
            Outputs(model.features(own, dropout), *_vocab_first(model)),
            Outputs(model.teacher.features(taught), *_vocab_first(model.teacher)),
            weights,
            self.temperature,
        )
        metrics = {"divergence": jax.lax.stop_gradient(total)}
        if self.weight < 1:
            data, sums = tokens.cross_entropy(model, hidden, batch, dropout)
            metrics["token_accuracy"] = sums["correct"]
            total = self.weight * total + (1 - self.weight) * data
        return (total, weights.sum()), metrics

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return self.tokens.units(batch)

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        return self.tokens.flops(trained) + self.teacher_flops


class Outputs(NamedTuple):
    """The features and the matrix of a model's logits, and their soft-cap."""

    features: Float[Array, "B T E"]
    matrix: Float[Array, "V E"]
    soft_cap: float | None = None


def _vocab_first(model: Any) -> tuple[Float[Array, "V E"], float | None]:
    """Return a decoder's output matrix with the vocabulary first, and its soft-cap.

    Each device has all of D.
    """
    matrix, vocab_first, soft_cap = model.head()
    matrix = matrix if vocab_first else matrix.T  # [V, E]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return matrix, soft_cap
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec("tensor", None)), soft_cap


def linear_divergence(
    own: Outputs,
    taught: Outputs,
    weights: Float[Array, "B T"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Return the weighted sum over tokens of T^2 KL(softmax(taught / T), softmax(own / T)).

    Rows of a matrix that the other lacks are padding of its vocabulary, and are left out. Logits
    exist for a chunk of time steps at once, and the backward pass computes them again.
    """
    size = min(len(own.matrix), len(taught.matrix))
    own, taught = (one._replace(matrix=one.matrix[:size]) for one in (own, taught))
    mesh = jax.sharding.get_abstract_mesh()
    rows = len(weights) // (1 if mesh.empty else batch_ways(mesh))
    chunk = chunk_length(max(rows, 1), weights.shape[1], 2 * size)  # of two models

    @partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(x: Array, y: Array, weights: Array) -> Array:
        ours, theirs = (
            jax.nn.log_softmax(_logits(part, one) / temperature)  # [B, chunk, V]
            for part, one in ((x, own), (y, taught))
        )
        each = jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1)  # [B, chunk]
        return jnp.sum(weights * each)

    def add(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + of_chunk(*inputs), None

    pair = _chunks(own.features, chunk), _chunks(taught.features, chunk)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), (*pair, _chunks(weights, chunk)))
    return temperature**2 * total


def _logits(features: Array, outputs: Outputs) -> Float[Array, "B C V"]:
    """Return the logits of a chunk's features."""
    matrix = outputs.matrix.astype(features.dtype)
    logits = jnp.einsum("bce,ve->bcv", features, matrix, preferred_element_type=jnp.float32)
    return soft_capped(logits, outputs.soft_cap)[0]  # [B, chunk, V]


def _chunks(x: Array, size: int) -> Array:
    """Pad x [B, T, ...] with zeros, and cut it into [chunks, B, size, ...]."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)  # [chunks, B, size, ...]
