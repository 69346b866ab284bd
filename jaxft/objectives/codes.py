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
from jaxft.models.pipelines.image_decode import Speaker

CAPTION_STREAM, ADAPTER_STREAM = range(2)  # streams of a row's own key


class RowLayout(Protocol):
    """The ids of a row; code c is the token image_offset + c, and there are `count` in a picture.

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

    speaker: makes of a bound module a `models.pipelines.image_decode.Speaker`. dropout: adapters
    draw a mask. image_flops: of a forward pass, a row.
    """

    layout: RowLayout
    speaker: Callable[[Any], Speaker]
    dtype: Any
    remat: str
    weights: TokenWeights
    caption_dropout: float = 0.0
    dropout: bool = False
    image_flops: float = 0.0
    unit: ClassVar[str] = "images"

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        return len(batch["weights"])

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        """Count the forward pass and both halves of backward; a frozen base has one half."""
        passes = 2 if all(leaf.added for leaf in trained.values()) else 3
        return passes * self.image_flops

    def loss(
        self, model: nnx.Module, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return the summed cross-entropy of codes and prompt, and the number of rows.

        Each is a mean over its own tokens of a row.

        Sums over rows, and their count, do not depend on how a batch is cut.
        """
        dropped = jax.vmap(jax.random.uniform)(stream(keys, CAPTION_STREAM)) < self.caption_dropout
        adapter = stream(keys, ADAPTER_STREAM) if self.dropout else None
        total, metrics = self.cross_entropy(model, batch, dropped, adapter)
        return (total, jnp.sum(batch["weights"])), metrics

    def cross_entropy(
        self, model: nnx.Module, batch: Batch, dropped: jax.Array, keys: jax.Array | None
    ) -> tuple[jax.Array, Metrics]:
        """Return the weighted sum over rows, and its parts; `dropped` bool [B]."""
        layout, options, weights = self.layout, self.weights, batch["weights"][:, None]
        rows = train_rows(layout, batch["prompt"], batch["length"], batch["codes"], dropped)
        speaker = self.speaker(model)
        embeds = speaker.embed(rows.tokens, rows.images, self.dtype, keys)
        hidden = speaker.llama.hidden(embeds=embeds, keys=keys, remat=self.remat, dtype=self.dtype)[
            0
        ]
        before_codes = jnp.take_along_axis(hidden, rows.places[..., None], axis=1)
        even = jnp.broadcast_to(weights / layout.count, rows.image_targets.shape)
        targets = rows.image_targets
        image, sums = speaker.cross_entropy(before_codes, targets, even, options.z, keys)
        total = options.image_weight * image
        metrics = {"image_ce": image - sums.get("z", 0.0), "accuracy": sums["correct"]}
        if options.text_weight:
            before_text = hidden[:, : rows.text_targets.shape[1]]
            spoken = rows.text_weights * weights
            text, text_sums = speaker.cross_entropy(
                before_text, rows.text_targets, spoken, options.z, keys
            )
            total = total + options.text_weight * text
            metrics["text_ce"] = text - text_sums.get("z", 0.0)
        return total, metrics


class TrainRows(NamedTuple):
    """Rows of a batch, padded on the right, which real tokens of a causal model do not attend to.

    places: where image_targets are predicted from. text_targets, text_weights: of the first
    C places; the weights of a row add up to 1, or to 0 without a prompt.
    images: which of the tokens are codes.
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

    captions: prompts padded on the right, `lengths` real ids each. For use inside jit.
    """
    width, count = captions.shape[1], layout.count
    captions, lengths = jnp.asarray(captions, jnp.int32), jnp.asarray(lengths, jnp.int32)
    null, shorter = layout.without_caption(captions, lengths)
    captions = jnp.where(dropped[:, None], null, captions)
    lengths = jnp.where(dropped, shorter, lengths)[:, None]
    ids = codes.astype(jnp.int32) + layout.image_offset  # [B, S]
    after = jnp.arange(width + count)[None] - lengths  # 0 at BOI, k at code k - 1
    image = jnp.take_along_axis(ids, jnp.clip(after - 1, 0, count - 1), axis=1)
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
