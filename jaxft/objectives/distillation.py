"""Distillation: the divergence of a model's next-token distributions from those of a teacher."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float

from jaxft.core.params import Leaf
from jaxft.core.sharding import batch_ways
from jaxft.core.step import Batch, Metrics
from jaxft.kernels.cross_entropy import chunk_length
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
            (model.features(own, dropout), _vocab_first(model)),
            (model.teacher.features(taught), _vocab_first(model.teacher)),
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


def _vocab_first(model: Any) -> Float[Array, "V E"]:
    """Return the output matrix of a decoder with the vocabulary first, each device's D gathered."""
    matrix, vocab_first = model.head()
    matrix = matrix if vocab_first else matrix.T  # [V, E]
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return matrix
    return jax.lax.with_sharding_constraint(matrix, PartitionSpec("tensor", None))


def linear_divergence(
    own: tuple[Float[Array, "B T E"], Float[Array, "V E"]],
    taught: tuple[Float[Array, "B T F"], Float[Array, "W F"]],
    weights: Float[Array, "B T"],
    temperature: float = 1.0,
) -> Float[Array, ""]:
    """Return the weighted sum over tokens of T^2 KL(softmax(taught / T), softmax(own / T)).

    own, taught: features and matrix of the logits. Rows of a matrix that the other lacks are
    padding of its vocabulary, and are left out. Logits exist for a chunk of time steps at once, and
    the backward pass computes them again.
    """
    size = min(len(own[1]), len(taught[1]))
    matrices = [matrix[:size] for _, matrix in (own, taught)]
    mesh = jax.sharding.get_abstract_mesh()
    rows = len(weights) // (1 if mesh.empty else batch_ways(mesh))
    chunk = chunk_length(max(rows, 1), weights.shape[1], 2 * size)  # of two models

    @partial(jax.checkpoint, prevent_cse=False)
    def of_chunk(x: Array, y: Array, weights: Array) -> Array:
        own, taught = (
            jax.nn.log_softmax(_logits(part, matrix) / temperature)  # [B, chunk, V]
            for part, matrix in zip((x, y), matrices, strict=True)
        )
        each = jnp.sum(jnp.exp(taught) * (taught - own), axis=-1)  # [B, chunk]
        return jnp.sum(weights * each)

    def add(total: Array, inputs: tuple[Array, Array, Array]) -> tuple[Array, None]:
        return total + of_chunk(*inputs), None

    chunks = _chunks(own[0], chunk), _chunks(taught[0], chunk), _chunks(weights, chunk)
    total, _ = jax.lax.scan(add, jnp.zeros((), jnp.float32), chunks)
    return temperature**2 * total


def _logits(features: Array, matrix: Array) -> Float[Array, "B C V"]:
    matrix = matrix.astype(features.dtype)
    return jnp.einsum("bce,ve->bcv", features, matrix, preferred_element_type=jnp.float32)


def _chunks(x: Array, size: int) -> Array:
    """Pad x [B, T, ...] with zeros, and cut it into [chunks, B, size, ...]."""
    x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % size)] + [(0, 0)] * (x.ndim - 2))
    return x.reshape(x.shape[0], -1, size, *x.shape[2:]).swapaxes(0, 1)  # [chunks, B, size, ...]
