"""Qwen 3 as a text encoder, as Z-Image and FLUX.2 klein have it: some hidden states of a chat."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxft.core.errors import UserError
from jaxft.models.decoders.config import DecoderConfig
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.families import llama, qwen
from jaxft.models.decoders.files import with_prefix
from jaxft.weights.folders.diffusers import Pipeline, part
from jaxft.weights.rules import renamed
from jaxft.weights.transfer import Part

QWEN3 = "qwen3"
QWEN_TOKENS = 512  # of a caption with its chat template: the default of the pipelines in diffusers


@dataclass(frozen=True)
class QwenTextConfig:
    """The configuration of one Qwen 3 that encodes captions.

    decoder: its layers up to the last state that is used, without the head of its vocabulary.
    states: indices into transformers' `hidden_states`, rising. The text's channels are these side
    by side. thinking: the chat template lets the model think. max_positions: the tokens of a
    caption, which a pipeline decides.
    """

    decoder: DecoderConfig
    states: tuple[int, ...]
    thinking: bool
    max_positions: int = QWEN_TOKENS

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], states: Sequence[int], thinking: bool, where: str
    ) -> "QwenTextConfig":
        """Read the config.json of a Qwen 3. A negative state counts from the last one.

        Raises: UserError for another model, and for one without a layer that is asked for.
        """
        if config.get("model_type") != QWEN3:
            raise UserError(
                f"{where}: model_type={config.get('model_type')!r} is not supported; expected"
                f" {QWEN3}, as in the original folder"
            )
        whole = qwen.read(config)
        wanted = tuple(one % (whole.num_layers + 1) for one in states)
        if max(states) > whole.num_layers:
            raise UserError(
                f"{where}: num_hidden_layers={whole.num_layers}, but the pipeline reads the state"
                f" after layer {max(states)}; give the text encoder of the original folder"
            )
        decoder = replace(whole, layers=whole.layers[: max(wanted)], tied=True)
        return cls(decoder, wanted, thinking)

    @property
    def vocab_size(self) -> int:
        return self.decoder.vocab_size

    @property
    def hidden_size(self) -> int:
        """The channels of the text."""
        return len(self.states) * self.decoder.hidden_size


def encode(
    decoder: Decoder,
    cfg: QwenTextConfig,
    ids: Int[Array, "B T"],
    *,
    dtype: Any,
    keys: PRNGKeyArray | None = None,
) -> tuple[Float[Array, "B T D"], Int[Array, " B"]]:
    """Return the states of captions in `dtype`, and their numbers of tokens.

    ids: a token of padding with the id i is -1 - i. keys: one a row, for the dropout of adapters.
    """
    real = ids >= 0
    tokens = jnp.where(real, ids, -1 - ids)
    made = decoder.states(tokens, real, cfg.states, keys=keys, dtype=dtype)
    return jnp.concatenate(made, axis=-1), jnp.sum(real, axis=1)  # [B, T, states x D], [B]


def text_part(pipeline: Pipeline, name: str, cfg: QwenTextConfig) -> Part:
    """Return the part of a component with a Qwen 3. An export copies its other layers and head."""
    layers = "|".join(map(str, range(cfg.decoder.num_layers)))
    beyond = rf"model\.layers\.(?!({layers})\.)\d+\..*"
    ignore = (*llama.ignore(cfg.decoder), beyond)
    made = part(pipeline, name, (llama.RULES, llama.sizes(cfg.decoder)), ignore)
    if made.tensors is None:
        return made
    # A file of Qwen3Model has no prefix. transformers reads both.
    known = lambda key: bool(renamed(llama.RULES, key))  # noqa: E731
    return made._replace(tensors=with_prefix(made.tensors, known, made.name))
