"""Next-token prediction: the cross-entropy of the trained tokens of each row."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jaxft.core.params import Leaf
from jaxft.core.step import Batch, Metrics
from jaxft.kernels.cross_entropy import linear_cross_entropy
from jaxft.models.decoders.experts import balance_loss, routing_metrics


@dataclass(frozen=True)
class NextToken:
    """Cross-entropy of a decoder over rows of `seq_len` positions.

    width: the largest number of trained positions in a row. per_row: the largest number of examples
    in a row, marked by segment_ids if there are several. dropout: adapters use dropout.
    token_flops: FLOPs of a forward pass, a token. router_loss: the weight of the loss that balances
    experts, None for a model without experts.
    """

    dtype: Any
    seq_len: int
    width: int
    per_row: int = 1
    dropout: bool = False
    token_flops: float = 0.0
    remat: str = "none"
    router_loss: float | None = None
    unit: ClassVar[str] = "tokens"
    unread: tuple[str, ...] = ()

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the summed cross-entropy, the number of trained tokens, and the correct ones.

        With experts it also has the loss of their routers, once for each trained token, because the
        step divides by their number. Experts are balanced over this micro-batch.
        """
        dropout = keys if self.dropout else None
        if self.router_loss is None:
            hidden = self.hidden(model, batch, dropout)
            total, sums = self.cross_entropy(model, hidden, batch, dropout)
            return (total, sums["weight"]), {"token_accuracy": sums["correct"]}
        real, (places, segments) = batch["segment_ids"] > 0, self._places(batch)
        hidden, routing = model.routed(
            batch["tokens"], *places, real, keys=dropout, remat=self.remat, dtype=self.dtype,
            segments_in_row=segments,
        )  # fmt: skip
        total, sums = self.cross_entropy(model, hidden, batch, dropout)
        balance = balance_loss(routing, real.sum().astype(jnp.float32))
        total += self.router_loss * sums["weight"] * balance
        measured = {"router_loss": balance, **routing_metrics(routing)}
        report = {name: sums["weight"] * value for name, value in measured.items()}
        return (total, sums["weight"]), {"token_accuracy": sums["correct"], **report}

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return int(np.count_nonzero(batch["segment_ids"]))  # numbered from 1 in a shared row

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        """Return FLOPs a token: the forward pass and both halves of backward.

        With a frozen base, backward has one half: its weights get no gradients.
        """
        passes = 2 if all(leaf.added for leaf in trained.values()) else 3
        return passes * self.token_flops

    def hidden(self, model: Any, batch: Batch, keys: jax.Array | None) -> jax.Array:
        """Return the last hidden states [B, T, D]."""
        places, segments = self._places(batch)
        return model.hidden(
            batch["tokens"], *places, keys=keys, remat=self.remat, dtype=self.dtype,
            segments_in_row=segments,
        )[0]  # fmt: skip

    def _places(self, batch: Batch) -> tuple[tuple[Any, Any], int]:
        """Return positions and segments of the tokens, and the most segments of a row.

        A row of one example is padded on the right. Under a causal mask no real token attends to
        the padding. The row thus needs no segments, and the fastest causal kernel can be used.
        """
        if self.per_row == 1:
            return (None, None), 0
        return (batch["positions"], batch["segment_ids"]), self.per_row + 1

    def cross_entropy(
        self, model: Any, hidden: jax.Array, batch: Batch, keys: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Return the summed cross-entropy of hidden states [B, T, D], and the sums beside it."""
        hidden, targets, weights = self.trained_only(hidden, batch, self.width)
        head, vocab_first, soft_cap = model.head()
        features = model.features(hidden, keys)
        return linear_cross_entropy(
            features, head, targets, weights, vocab_first=vocab_first, soft_cap=soft_cap
        )

    def trained_only(
        self,
        hidden: jax.Array,
        batch: Batch,
        width: int,
        names: tuple[str, ...] = ("targets", "weights"),
    ) -> tuple[jax.Array, ...]:
        """Return hidden states and the batch's `names` at the trained positions of each row.

        They are [B, W, D] and [B, W]. The head computes logits there alone, which saves most of its
        work if short completions are trained. All positions stay if `width` is over half of them.
        """
        if 2 * width > self.seq_len:
            return hidden, *(batch[name] for name in names)
        # Untrained positions have weight 0: the `width` largest weights include all trained ones.
        places = jax.lax.top_k(batch["weights"], width)[1]  # [B, W]
        picked = tuple(jnp.take_along_axis(batch[name], places, axis=1) for name in names)
        return jnp.take_along_axis(hidden, places[..., None], axis=1), *picked
