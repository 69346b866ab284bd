"""Captions as token ids for each text encoder, with the tokens that a run adds."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.core.errors import UserError
from jaxft.data.text.vocabulary import check_ids
from jaxft.models.text_encoders.clip import CLIPTextConfig
from jaxft.models.text_encoders.t5 import T5EncoderConfig
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.weights.folders.diffusers import Pipeline

TextConfig = CLIPTextConfig | T5EncoderConfig
COUNTED_TOGETHER = 1024  # captions in one call of a tokenizer


class Captions:
    """Token ids of a caption for every text encoder, padded and cut by its tokenizer.

    T is the longest length of all encoders. Zeros follow the ids of an encoder with fewer.
    `new` are the tokens of one further word. Captions and prompts contain the first token, which
    stands for all of them. Their ids follow the vocabulary of an encoder. Raises UserError if a
    tokenizer already has one of them, and for a caption with a token that has no row in an encoder.
    """

    def __init__(
        self, tokenizers: Sequence[Any], texts: Sequence[TextConfig], new: Sequence[str] = ()
    ):
        self.new = tuple(new)
        self._first = [_add(tokenizer, self.new) for tokenizer in tokenizers]
        self._encoders = tuple(zip(tokenizers, texts, strict=True))
        # A call changes how a tokenizer cuts and pads. Calls without a cut use copies, so that they
        # do not disturb the threads that read captions.
        self._uncut = deepcopy(tuple(tokenizers))
        self("")

    def __call__(self, caption: str) -> Int[np.ndarray, "E T"]:
        rows = []
        for (tokenizer, text), first in zip(self._encoders, self._first, strict=True):
            ids = _padded(tokenizer, caption, text.max_positions)
            if len(self.new) > 1 and first in ids:
                ids = _padded(tokenizer, self._whole(caption), text.max_positions)
            self._check(ids, tokenizer, text, first, caption)
            rows.append(np.where(ids < first, ids, ids - first + text.vocab_size))
        width = max(map(len, rows))
        return np.stack([np.pad(ids, (0, width - len(ids))) for ids in rows]).astype(np.int32)

    @property
    def length(self) -> int:
        """Largest number of tokens of a caption, with those of its start and end."""
        return min(text.max_positions for _, text in self._encoders)

    def too_long(self, captions: Sequence[str]) -> int:
        """Return the number of captions that are cut for some encoder.

        Raises UserError for a token that has no row in an encoder.
        """
        starts = range(0, len(captions), COUNTED_TOGETHER)
        return sum(self._cut(captions[start : start + COUNTED_TOGETHER]) for start in starts)

    def names_new(self, caption: str) -> bool:
        """Return whether every encoder reads the new word in a caption."""
        sizes = np.array([text.vocab_size for _, text in self._encoders])
        return bool((self(caption).max(axis=1) >= sizes).all())

    def ids_of(self, word: str) -> list[int]:
        """Return the id of a word for each encoder.

        Raises UserError if the word is not one token with a row.
        """
        ids = [_one_id(tokenizer, word) for tokenizer in self._uncut]
        for tokenizer, (_, text), number in zip(self._uncut, self._encoders, ids, strict=True):
            check_ids([number], text.vocab_size, tokenizer, f"inversion.init={word!r}")
        return ids

    def _cut(self, captions: Sequence[str]) -> int:
        cut = np.zeros(len(captions), bool)
        whole = [self._whole(caption) for caption in captions]
        for tokenizer, (_, text), first in zip(
            self._uncut, self._encoders, self._first, strict=True
        ):
            ids = tokenizer(whole, verbose=False).input_ids
            for caption, row in zip(captions, ids, strict=True):
                self._check(row[: text.max_positions], tokenizer, text, first, caption)
            cut |= np.array([len(row) for row in ids]) > text.max_positions
        return int(cut.sum())

    def _check(self, ids: Any, tokenizer: Any, text: TextConfig, first: int, caption: str) -> None:
        """Raise UserError for a token that is not in the encoder's table or the new word."""
        old = np.asarray(ids)[np.asarray(ids) < first]
        check_ids(old, text.vocab_size, tokenizer, f"caption {caption[:60]!r}")

    def _whole(self, caption: str) -> str:
        """Return the caption with all tokens of the new word: diffusers' maybe_convert_prompt."""
        return caption.replace(self.new[0], " ".join(self.new)) if self.new else caption


def load_captions(
    pipeline: Pipeline, texts: Sequence[TextConfig], new: Sequence[str] = ()
) -> Captions:
    """Return the tokenizers of a pipeline. Raises UserError where one is missing, or damaged."""
    made = []
    for i, text in enumerate(texts):
        folder = pipeline.tokenizer_dir(f"tokenizer_{i + 1}" if i else "tokenizer")
        made.append(load_tokenizer(folder, "t5" if isinstance(text, T5EncoderConfig) else "clip"))
    return Captions(made, texts, new)


def _padded(tokenizer: Any, caption: str, length: int) -> Int[np.ndarray, " T"]:
    made = tokenizer(caption, padding="max_length", truncation=True, max_length=length)
    return np.asarray(made.input_ids, np.int32)


def _add(tokenizer: Any, new: Sequence[str]) -> int:
    """Add tokens to a tokenizer. Returns the id of the first, or an id above all others."""
    if there := sorted(set(new) & tokenizer.get_vocab().keys()):
        raise UserError(
            f"inversion.token: {tokenizer.name_or_path} has {there[0]!r} in its vocabulary; choose"
            " a word that it has not, such as '<my-toy>'"
        )
    if not new:
        return np.iinfo(np.int32).max
    tokenizer.add_tokens(list(new))
    return tokenizer.convert_tokens_to_ids(new[0])


def _one_id(tokenizer: Any, word: str) -> int:
    ids = tokenizer.encode(word, add_special_tokens=False)
    if len(ids) != 1 or ids[0] in tokenizer.all_special_ids:
        shown = " ".join(tokenizer.convert_ids_to_tokens(ids)) or "nothing"
        raise UserError(
            f"inversion.init={word!r} is not one token but {shown!r} to {tokenizer.name_or_path};"
            " choose one common word that is near, such as 'toy'"
        )
    return ids[0]
