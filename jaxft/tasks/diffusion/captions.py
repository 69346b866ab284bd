"""Captions as token ids for each text encoder, with the tokens that a run adds."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxft.core.errors import UserError
from jaxft.data.text.chat.format import ChatFormat
from jaxft.data.text.chat.records import Conversation
from jaxft.data.text.vocabulary import check_ids
from jaxft.models.text_encoders.clip import CLIPTextConfig
from jaxft.models.text_encoders.qwen import QwenTextConfig
from jaxft.models.text_encoders.t5 import T5EncoderConfig
from jaxft.tasks.common.tokenizers import load_tokenizer
from jaxft.weights.folders.diffusers import Pipeline

TextConfig = CLIPTextConfig | T5EncoderConfig | QwenTextConfig
# The kind of tokenizer, or None if its folder names the class.
TOKENIZERS = {CLIPTextConfig: "clip", T5EncoderConfig: "t5", QwenTextConfig: None}
COUNTED_TOGETHER = 1024  # captions in one call of a tokenizer


class Captions:
    """Token ids of a caption for every text encoder, padded and cut by its tokenizer.

    T is the longest length of all encoders. Zeros follow the ids of an encoder with fewer. Qwen
    reads a caption as a user's turn of a chat, and a token of padding with the id i is -1 - i.
    CLIP may read a caption in several `chunks`, each with its own first and last token and padding.
    `new` are the tokens of one further word. Captions and prompts contain the first token, which
    stands for all of them. Their ids follow the vocabulary of an encoder. Raises UserError if a
    tokenizer already has one of them, and for a caption with a token that has no row in an encoder.
    """

    def __init__(
        self,
        tokenizers: Sequence[Any],
        texts: Sequence[TextConfig],
        new: Sequence[str] = (),
        chunks: int = 1,
    ):
        self.new, self._chunks = tuple(new), chunks
        self._first = [_add(tokenizer, self.new) for tokenizer in tokenizers]
        self._encoders = tuple(zip(tokenizers, texts, strict=True))
        self._chats = tuple(_chat(*pair) for pair in self._encoders)
        # A call changes how a tokenizer cuts and pads. Calls without a cut use copies, so that they
        # do not disturb the threads that read captions.
        self._uncut = deepcopy(tuple(tokenizers))
        self("")

    def __call__(self, caption: str) -> Int[np.ndarray, "E T"]:
        rows = []
        for (tokenizer, text), first, chat in zip(
            self._encoders, self._first, self._chats, strict=True
        ):
            ids = self._padded(tokenizer, _turn(caption, text, chat), text)
            if len(self.new) > 1 and first in ids:
                ids = self._padded(tokenizer, self._whole(caption), text)
            self._check(ids, tokenizer, text, first, caption)
            rows.append(np.where(ids < first, ids, ids - first + text.vocab_size))
        width = max(map(len, rows))
        return np.stack([np.pad(ids, (0, width - len(ids))) for ids in rows]).astype(np.int32)

    @property
    def length(self) -> int:
        """Largest number of tokens of a caption, with those of its start and end."""
        return min(self._length(text) for _, text in self._encoders)

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
        for tokenizer, (_, text), first, chat in zip(
            self._uncut, self._encoders, self._first, self._chats, strict=True
        ):
            turns = [_turn(one, text, chat) for one in whole]
            ids = tokenizer(turns, verbose=False).input_ids
            for caption, row in zip(captions, ids, strict=True):
                self._check(row[: self._length(text)], tokenizer, text, first, caption)
            cut |= np.array([len(row) for row in ids]) > self._length(text)
        return int(cut.sum())

    def _length(self, text: TextConfig) -> int:
        """Return the largest number of tokens, with one start and one end for all chunks."""
        return self._chunks * (text.max_positions - 2) + 2

    def _padded(self, tokenizer: Any, caption: str, text: TextConfig) -> Int[np.ndarray, " T"]:
        how: dict[str, Any] = {"truncation": True, "max_length": self._length(text)}
        if isinstance(text, QwenTextConfig):
            ids = np.full(text.max_positions, -1 - tokenizer.pad_token_id, np.int32)
            made = tokenizer(caption, **how).input_ids
            ids[: len(made)] = made
            return ids
        if self._chunks == 1:
            return np.asarray(tokenizer(caption, padding="max_length", **how).input_ids, np.int32)
        begin, *words, end = tokenizer(caption, **how).input_ids
        ids = np.full((self._chunks, text.max_positions), tokenizer.pad_token_id, np.int32)
        inner = text.max_positions - 2
        for i, row in enumerate(ids):
            chunk = [begin, *words[i * inner : (i + 1) * inner], end]
            row[: len(chunk)] = chunk
        return ids.reshape(-1)

    def _check(self, ids: Any, tokenizer: Any, text: TextConfig, first: int, caption: str) -> None:
        """Raise UserError for a token that is not in the encoder's table or the new word."""
        old = np.asarray(ids)[np.asarray(ids) < first]
        check_ids(old, text.vocab_size, tokenizer, f"caption {caption[:60]!r}")

    def _whole(self, caption: str) -> str:
        """Return the caption with all tokens of the new word: diffusers' maybe_convert_prompt."""
        return caption.replace(self.new[0], " ".join(self.new)) if self.new else caption


def load_captions(
    pipeline: Pipeline, texts: Sequence[TextConfig], new: Sequence[str] = (), chunks: int = 1
) -> Captions:
    """Return the tokenizers of a pipeline. Raises UserError where one is missing, or damaged."""
    made = []
    for i, text in enumerate(texts):
        folder = pipeline.tokenizer_dir(f"tokenizer_{i + 1}" if i else "tokenizer")
        made.append(load_tokenizer(folder, TOKENIZERS[type(text)]))
    return Captions(made, texts, new, chunks)


def _chat(tokenizer: Any, text: TextConfig) -> ChatFormat | None:
    """Return the chat template of Qwen, None for other encoders. Raises UserError without one."""
    if not isinstance(text, QwenTextConfig):
        return None
    if not tokenizer.chat_template:
        raise UserError(
            f"{tokenizer.name_or_path}: no chat template, by which this model reads captions; copy"
            " tokenizer_config.json or chat_template.jinja of the original folder there"
        )
    return ChatFormat(tokenizer, tokenizer.chat_template, f"{tokenizer.name_or_path}")


def _turn(caption: str, text: TextConfig, chat: ChatFormat | None) -> str:
    """Return a caption as a user's turn, with the beginning of the answer."""
    if chat is None or not isinstance(text, QwenTextConfig):
        return caption
    messages = [{"role": "user", "content": caption}]
    talk = Conversation(messages, options={"enable_thinking": text.thinking})
    return chat.render(talk, messages, f"caption {caption[:60]!r}", prompt=True)


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
