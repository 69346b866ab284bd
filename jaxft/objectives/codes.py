"""Image tokens: the cross-entropy of a picture's codes, and of the prompt before them."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxft.core.params import Leaf
from jaxft.core.step import Batch, Metrics, stream
from jaxft.models.pipelines.image_decode import CodeModel

CAPTION_STREAM, ADAPTER_STREAM = range(2)  # streams of a row's own key


class RowLayout(Protocol):
    """Token ids of a row. Code c is the token image_offset + c, and a picture has `count` codes.

    `without_caption(captions, lengths)` returns null prompts [B, C] and their lengths [B].
    """

    @property
    def boi(self) -> int: ...
    @property
    def pad(self) -> int: ...
    @property
    def image_offset(self) -> int: ...
    @property
    def count(self) -> int: ...

    def without_caption(self, captions: Any, lengths: Any) -> tuple[Any, Any]: ...


class TokenWeights(Protocol):
    """Weights of the loss over codes, over the prompt, and of z-loss in both."""

    @property
    def image_weight(self) -> float: ...
    @property
    def text_weight(self) -> float: ...
    @property
    def z(self) -> float: ...


@dataclass(frozen=True)
class CodePrediction:
    """Next-token prediction of `prompt BOI codes`.

    code_model: returns the `models.pipelines.image_decode.CodeModel` of a bound module. dropout:
    adapters use dropout. image_flops: FLOPs of a forward pass, a row.
    """

    layout: RowLayout
    code_model: Callable[[Any], CodeModel]
    dtype: Any
    weights: TokenWeights
    caption_dropout: float = 0.0
    dropout: bool = False
    image_flops: float = 0.0
    remat: str = "none"
    unit: ClassVar[str] = "images"
    unread: tuple[str, ...] = ()

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["weights"])

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        """Return FLOPs an image: the forward pass and both halves of backward.

        With a frozen base, backward has one half: its weights get no gradients.
        """
        passes = 2 if all(leaf.added for leaf in trained.values()) else 3
        return passes * self.image_flops

    def loss(
        self, model: nnx.Module, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the cross-entropy summed over rows, and the number of rows.

        A row has a mean over its codes and, with `text_weight`, one over its prompt. Sums over
        rows, and the number of rows, do not depend on the split into micro-batches.
        """
        dropped = jax.vmap(jax.random.uniform)(stream(keys, CAPTION_STREAM)) < self.caption_dropout
        adapter = stream(keys, ADAPTER_STREAM) if self.dropout else None
        total, metrics = self.cross_entropy(model, batch, dropped, adapter)
        return (total, jnp.sum(batch["weights"])), metrics

    def cross_entropy(
        self, model: nnx.Module, batch: Batch, dropped: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Return the weighted sum over rows, and its parts. `dropped` is bool [B]."""
        layout, options, weights = self.layout, self.weights, batch["weights"][:, None]
        rows = train_rows(layout, batch["prompt"], batch["length"], batch["codes"], dropped)
        code_model = self.code_model(model)
        embeds = code_model.embed(rows.tokens, rows.images, self.dtype, keys)
        hidden, _ = code_model.decoder.hidden(
            embeds=embeds, keys=keys, remat=self.remat, dtype=self.dtype
        )
        # The head computes logits at these positions alone.
        before_codes = jnp.take_along_axis(hidden, rows.places[..., None], axis=1)  # [B, S, D]
        even = jnp.broadcast_to(weights / layout.count, rows.image_targets.shape)
        targets = rows.image_targets
        image, sums = code_model.cross_entropy(before_codes, targets, even, options.z, keys)
        total = options.image_weight * image
        metrics = {"image_ce": image - sums.get("z", 0.0), "accuracy": sums["correct"]}
        if options.text_weight:
            before_text = hidden[:, : rows.text_targets.shape[1]]  # [B, C, D]
            spoken = rows.text_weights * weights
            text, text_sums = code_model.cross_entropy(
                before_text, rows.text_targets, spoken, options.z, keys
            )
            total = total + options.text_weight * text
            metrics["text_ce"] = text - text_sums.get("z", 0.0)
        return total, metrics


class TrainRows(NamedTuple):
    """Rows of a batch, padded on the right: no real token of a causal model attends to padding.

    images: the tokens that are codes. places: positions whose hidden states predict image_targets.
    text_targets, text_weights: targets of the first C positions. The weights of a row add up to 1,
    or to 0 without a prompt.
    """

    tokens: Int[Array, "B T"]
    images: Bool[Array, "B T"]
    places: Int[Array, "B S"]
    image_targets: Int[Array, "B S"]
    text_targets: Int[Array, "B C"]
    text_weights: Float[Array, "B C"]


def train_rows(
    layout: RowLayout,
    captions: Int[Array, "B C"],
    lengths: Int[Array, " B"],
    codes: Int[Array, "B S"],
    dropped: Bool[Array, " B"],
) -> TrainRows:
    """Return `prompt BOI codes` of each row, with the null prompt where `dropped`.

    captions: prompts padded on the right, with `lengths` real ids each. Works inside jit.
    """
    width, count = captions.shape[1], layout.count
    captions, lengths = jnp.asarray(captions, jnp.int32), jnp.asarray(lengths, jnp.int32)
    null, shorter = layout.without_caption(captions, lengths)
    captions = jnp.where(dropped[:, None], null, captions)
    lengths = jnp.where(dropped, shorter, lengths)[:, None]
    ids = codes.astype(jnp.int32) + layout.image_offset  # [B, S]
    after = jnp.arange(width + count)[None] - lengths  # [B, C + S]: 0 at BOI, k at code k - 1
    # Prompts differ in length: the picture is gathered to its place behind each, without a loop.
    image = jnp.take_along_axis(ids, jnp.clip(after - 1, 0, count - 1), axis=1)  # [B, C + S]
    image = jnp.where(after == 0, layout.boi, jnp.where(after < count, image, layout.pad))
    text = jnp.pad(captions, ((0, 0), (0, count)))  # [B, C + S]
    tokens = jnp.where(after < 0, text, image)
    spoken = (jnp.arange(width)[None] < lengths) & ~dropped[:, None]
    return TrainRows(
        tokens,
        (after > 0) & (after < count),
        lengths + jnp.arange(count),
        ids,
        tokens[:, 1 : width + 1],
        spoken / jnp.maximum(lengths, 1.0),  # a prompt of no tokens has no weight, and no 0 / 0
    )
