"""Textual inversion (Gal et al. 2022, arXiv:2208.01618): training the embedding of a new word."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from jaxft.core.configs.schema import Config
from jaxft.core.errors import UserError
from jaxft.core.params import NEW_TOKEN_ROLE, Leaf, select
from jaxft.models.pipelines.families import AnyConfig
from jaxft.models.pipelines.stable_diffusion import PipelineConfig
from jaxft.tasks.diffusion.captions import Captions
from jaxft.tasks.diffusion.options import Inversion
from jaxft.weights.transfer import Part, to_host

EMBEDS_STEM = "learned_embeds"  # load_textual_inversion of diffusers looks for it
XL_KEYS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}
MOST_VECTORS = 64  # a caption has 77 tokens


def names(options: Inversion) -> tuple[str, ...]:
    """Return the new tokens, named like those of a word of several vectors in diffusers.

    Returns () without a new word. Raises UserError for an invalid word, `init` or `vectors`.
    """
    token, count = options.token, options.vectors
    if not token:
        return ()
    if token != token.lower() or token.split() != [token]:
        raise UserError(
            f"inversion.token={token!r} must be one word in small letters, such as '<cat-toy>':"
            " CLIP's tokenizers know no capitals"
        )
    if not options.init:
        raise UserError(
            f"inversion.init is empty: give the word that {token} starts as, such as 'toy'"
        )
    if not 1 <= count <= MOST_VECTORS:
        raise UserError(f"inversion.vectors={count} must be from 1 to {MOST_VECTORS}")
    return (token, *(f"{token}_{i}" for i in range(1, count)))


def extended(cfg: AnyConfig, count: int) -> AnyConfig:
    """Return the config of a pipeline with `count` new tokens in each text encoder.

    Raises UserError for new tokens of a pipeline other than Stable Diffusion 1, 2 and XL.
    """
    if not count:
        return cfg
    if not isinstance(cfg, PipelineConfig):
        raise UserError(
            f"inversion.token is not there for {cfg.describe()}; train a LoRA, with the word in its"
            " captions"
        )
    return replace(cfg, texts=tuple(replace(text, new_tokens=count) for text in cfg.texts))


def initial(
    options: Inversion, captions: Captions, parts: Sequence[Part], leaves: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Return the new rows by path, in fp32.

    Each row is a copy of the `init` word's row. Fresh weights have no entry.
    """
    made, encoders = {}, [part for part in parts if part.prefix.startswith("text_encoder")]
    for part, number in zip(encoders, captions.ids_of(options.init), strict=True):
        if part.tensors is not None:
            table = f"{part.prefix}token_embedding.embedding"
            (entry,) = (one for one in part.entries(leaves) if one.path == table)
            row = part.tensors.read(entry.keys[0])[number].astype(np.float32)
            rows = np.repeat(row[None], options.vectors, axis=0)
            made[f"{part.prefix}inversion.embedding"] = rows
    return made


def check(cfg: Config, captions: Captions, leaves: Mapping[str, Leaf]) -> None:
    """Raise UserError if none of the new rows trains, or `init` is not one token."""
    captions.ids_of(cfg.own["inversion"].init)
    rows = {path: leaf for path, leaf in leaves.items() if leaf.role == NEW_TOKEN_ROLE}
    if cfg.trainable and not select(cfg.trainable, leaves) & rows.keys():
        raise UserError(
            f"trainable={cfg.trainable!r} does not match {', '.join(rows)}, the new rows of"
            f" inversion.token={captions.new[0]!r}; set it to '' to train them alone"
        )


def check_captions(captions: Captions, texts: Sequence[str], spec: str) -> None:
    """Raise UserError for captions without the new word, whose pictures would not train it."""
    if lacking := [text for text in texts if not captions.names_new(text)]:
        shown = f"{lacking[0][:60]}…" if len(lacking[0]) > 60 else lacking[0]
        raise UserError(
            f"{len(lacking)} of {len(texts)} captions of {spec} lack {captions.new[0]} within"
            f" {captions.length} tokens, the first is {shown!r}; write it into each, such as"
            f" 'a photo of {captions.new[0]}'"
        )


def learned(
    token: str, params: Mapping[str, Any], leaves: Mapping[str, Leaf]
) -> dict[str, np.ndarray]:
    """Return rows [vectors, D] by the key that readers expect.

    The key is the token, or for SDXL clip_l and clip_g.
    """
    rows = {
        path.partition(".")[0]: to_host(array)
        for path, array in params.items()
        if leaves[path].role == NEW_TOKEN_ROLE
    }
    if len(rows) == 1:
        return {token: rows["text_encoder"]}
    return {XL_KEYS[name]: array for name, array in rows.items()}
