"""Text encoders of a pipeline against transformers': CLIP, T5, and Qwen 3 by its hidden states."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int
from numpy import ndarray, where

from jaxft.models.decoders.decoder import Decoder
from jaxft.models.text_encoders import qwen
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.models.text_encoders.qwen import QwenTextConfig
from jaxft.models.text_encoders.t5 import T5Encoder, T5EncoderConfig
from jaxft.verify.component import ComponentSubject
from jaxft.weights.folders.diffusers import Pipeline
from jaxft.weights.transfer import Part

AnyText = CLIPTextConfig | T5EncoderConfig | QwenTextConfig


def text_subjects(
    pipeline: Pipeline, parts: Sequence[Part], texts: Sequence[AnyText], ids: Int[ndarray, "B E T"]
) -> list[ComponentSubject]:
    """Return the comparisons of all text encoders, in the order of their folders.

    parts: those of the encoders. ids: as `Captions` makes them.
    """
    made = []
    for i, (part, text) in enumerate(zip(parts, texts, strict=True)):
        own = ids[:, i, : text.max_positions]
        if isinstance(text, CLIPTextConfig):
            made.append(_clip(pipeline, part, text, own))
        elif isinstance(text, T5EncoderConfig):
            made.append(_t5(pipeline, part, text, own))
        else:
            made.append(_qwen(pipeline, part, text, own))
    return made


def _clip(
    pipeline: Pipeline, part: Part, cfg: CLIPTextConfig, ids: Int[ndarray, "B T"]
) -> ComponentSubject:
    def theirs(model: Any) -> dict[str, Any]:
        made = model(_tensor(ids), output_hidden_states=True)
        return {
            "last state": made.last_hidden_state,
            "penultimate state": made.hidden_states[-2],
            "pooled": made.text_embeds if cfg.projection_dim else made.pooler_output,
        }

    def ours(model: CLIPText) -> dict[str, Array]:
        tokens = jnp.asarray(ids)
        last, inner = model(tokens), model(tokens, skip=1)
        return {
            "last state": last.normed,
            "penultimate state": inner.hidden,
            "pooled": last.pooled,
        }

    template = jax.eval_shape(lambda: CLIPText(cfg, key=jax.random.key(0)))
    kind = "CLIPTextModelWithProjection" if cfg.projection_dim else "CLIPTextModel"
    return _subject(pipeline, part, template, kind, theirs, ours)


def _t5(
    pipeline: Pipeline, part: Part, cfg: T5EncoderConfig, ids: Int[ndarray, "B T"]
) -> ComponentSubject:
    def theirs(model: Any) -> dict[str, Any]:
        return {"last state": model(_tensor(ids)).last_hidden_state}

    def ours(model: T5Encoder) -> dict[str, Array]:
        return {"last state": model(jnp.asarray(ids))}

    template = jax.eval_shape(lambda: T5Encoder(cfg, key=jax.random.key(0)))
    return _subject(pipeline, part, template, "T5EncoderModel", theirs, ours)


def _qwen(
    pipeline: Pipeline, part: Part, cfg: QwenTextConfig, ids: Int[ndarray, "B T"]
) -> ComponentSubject:
    """Return the comparison of the states that a pipeline reads, at tokens that are no padding.

    The layers after the last of these states are in the stock model alone.
    """
    real = ids >= 0  # [B, T]

    def theirs(model: Any) -> dict[str, Any]:
        import torch

        tokens, mask = _tensor(where(real, ids, -1 - ids)), torch.from_numpy(real)
        made = model(tokens, attention_mask=mask, output_hidden_states=True).hidden_states
        states = torch.cat([made[i] for i in cfg.states], dim=-1)
        return {"states": states * mask[..., None]}

    def ours(model: Decoder) -> dict[str, Array]:
        states, _ = qwen.encode(model, cfg, jnp.asarray(ids), dtype=jnp.float32)
        return {"states": states * jnp.asarray(real)[..., None]}

    template = jax.eval_shape(lambda: Decoder(cfg.decoder, key=jax.random.key(0)))
    made = _subject(pipeline, part, template, "Qwen3Model", theirs, ours)
    return made._replace(stock_prefix="model.")


def _subject(
    pipeline: Pipeline, part: Part, template: Any, kind: str, theirs: Any, ours: Any
) -> ComponentSubject:
    name = part.prefix.removesuffix(".")
    source, stock = pipeline.components[name], ("transformers", kind)
    return ComponentSubject(name, source, part, template, stock, theirs, ours)


def _tensor(ids: Int[ndarray, "B T"]) -> Any:
    import torch

    return torch.from_numpy(ids).long()
