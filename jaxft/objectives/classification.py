"""Classification and regression of texts: losses of a head of scores at one token of each text."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, Shaped

from jaxft.core.params import Leaf
from jaxft.core.step import Batch, Metrics
from jaxft.objectives.next_token import NextToken

Scores = Float[Array, "B W C"]


def label_losses(problem: str, scores: Scores, labels: Shaped[Array, "B W ..."]) -> Array:
    """Return the loss of each text [B, W], as transformers computes it for a problem_type.

    labels: indices [B, W] for one label, else numbers [B, W, C]. Cross-entropy, or the mean over
    the outputs of binary cross-entropies, or of squared errors.
    """
    match problem:
        case "single_label_classification":
            return optax.softmax_cross_entropy_with_integer_labels(scores, labels)
        case "multi_label_classification":
            return jnp.mean(optax.sigmoid_binary_cross_entropy(scores, labels), axis=-1)
        case "regression":
            return jnp.mean(jnp.square(scores - labels), axis=-1)
    raise ValueError(f"{problem!r} is no problem_type of transformers")


def head_scores(
    tokens: NextToken, model: Any, batch: Batch, keys: jax.Array | None = None
) -> tuple[Scores, Float[Array, "B W"], Int[Array, "B W"]]:
    """Return the scores, weights and segments at the positions of a row with weight 1.

    They are computed at `tokens.width` positions, of which those beyond the row's texts have weight
    0. keys: one a row, for the dropout of adapters.
    """
    hidden = tokens.hidden(model, batch, keys)
    names = ("weights", "segment_ids")
    hidden, weights, segments = tokens.trained_only(hidden, batch, tokens.width, names)
    return model.scores(hidden), weights, segments


def head_flops(tokens: NextToken, trained: Mapping[str, Leaf]) -> float:
    """Return FLOPs a token: the forward pass, and what the trained parameters need of backward.

    The head itself is read once a text and does not count.
    """
    below = {path: leaf for path, leaf in trained.items() if not path.startswith("score.")}
    return tokens.flops(below) if below else tokens.token_flops


@dataclass(frozen=True)
class Classification:
    """The loss of labels over rows of texts. Segment k of a row is text k.

    tokens: the decoder's hidden states, and the positions at which its head is read.
    problem: transformers' problem_type.
    """

    tokens: NextToken
    problem: str
    remat: str = "none"
    unit: ClassVar[str] = "tokens"
    unread: tuple[str, ...] = ()

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the loss summed over texts, their number, and the correct ones."""
        tokens = replace(self.tokens, remat=self.remat)
        dropout = keys if tokens.dropout else None
        scores, weights, segments = head_scores(tokens, model, batch, dropout)
        labels = _of_segments(batch["labels"], segments)
        total = jnp.sum(weights * label_losses(self.problem, scores, labels))
        if self.problem == "regression":
            return (total, jnp.sum(weights)), {}
        if self.problem == "single_label_classification":
            right = jnp.argmax(scores, axis=-1) == labels
        else:
            right = jnp.mean((scores > 0) == (labels > 0.5), axis=-1)
        return (total, jnp.sum(weights)), {"accuracy": jnp.sum(weights * right)}

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return self.tokens.units(batch)

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        return head_flops(self.tokens, trained)


def _of_segments(labels: Shaped[Array, "B K ..."], segments: Int[Array, "B W"]) -> Array:
    """Return the labels of segments 1 to K [B, W, ...]. Segment 0 is padding, and has any label."""
    places = jnp.maximum(segments - 1, 0)  # [B, W]
    if labels.ndim == 3:
        places = places[..., None]  # [B, W, 1]
    return jnp.take_along_axis(labels, places, axis=1)
