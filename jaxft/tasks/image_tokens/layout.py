"""The side-car of an image-token model: the ids of text, of image markers and of codes.

imagetoken.json lies beside the config.json of a language model whose vocabulary is
text | BOI, EOI, NULL, PAD | codes. A row is `prompt BOI code_0 … code_n-1`. Without a caption it is
`NULL BOI code_0 …`, in training and in sampling. EOI is for texts that go on after an image. The
grid has a fixed size, so nothing here trains or samples EOI.
"""

import dataclasses
import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from jaxft.core.errors import UserError
from jaxft.data.text.vocabulary import check_ids

LAYOUT_JSON = "imagetoken.json"
SPECIALS = ("boi", "eoi", "null", "pad")
CAPTION = "{caption}"
PROMPT_TOKENS = 64  # default limit of a prompt, in tokens


@dataclass(frozen=True)
class ImageLayout:
    """The content of imagetoken.json.

    Ids below `text_vocab` are text, and `image_offset` + c is code c. grid: rows and columns of
    codes, row-major. prompt: the template of a caption. vq: a fingerprint of the encoder and
    codebook that find the codes. max_caption_tokens: limit of the prompt, BOI not counted.
    """

    text_vocab: int
    boi: int
    eoi: int
    null: int
    pad: int
    image_offset: int
    codes: int
    grid: tuple[int, int]
    prompt: str
    max_caption_tokens: int
    vq: str

    @property
    def count(self) -> int:
        """Number of codes of an image."""
        return self.grid[0] * self.grid[1]

    @property
    def vocab_size(self) -> int:
        return self.image_offset + self.codes

    @property
    def specials(self) -> dict[str, int]:
        return {name: getattr(self, name) for name in SPECIALS}

    def without_caption(self, captions: Any, lengths: Any) -> tuple[Any, Any]:
        """Return NULL alone, of length 1, in place of prompts [B, C] of `lengths` [B] ids.

        Accepts NumPy or JAX arrays and returns the same kind. One prompt needs no device.
        """
        xp = captions.__array_namespace__()
        null = xp.full_like(captions[0], self.pad)
        null = xp.where(xp.arange(len(null)) == 0, self.null, null)
        return xp.broadcast_to(null, captions.shape), xp.ones_like(lengths)

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class JanusLayout:
    """The row `prompt BOI code_0 …` of a Janus, with codes counted from 0 in a separate table.

    Without a caption everything between BOS and BOI is pad and is attended to, as in the authors'
    sampling and in `generate` of transformers.
    """

    bos: int
    boi: int
    pad: int
    codes: int
    grid: tuple[int, int]
    prompt: str
    max_caption_tokens: int
    text_vocab: int
    image_offset: int = 0

    @property
    def count(self) -> int:
        return self.grid[0] * self.grid[1]

    @property
    def specials(self) -> dict[str, int]:
        return {"boi": self.boi, "pad": self.pad}

    def without_caption(self, captions: Any, lengths: Any) -> tuple[Any, Any]:
        stays = (captions == self.bos) | (captions == self.boi)
        return captions.__array_namespace__().where(stays, captions, self.pad), lengths


# The layout of a row in either family. Code c is the token image_offset + c. Ids below text_vocab
# may stand in a prompt. `prompt` is the template of a caption, and max_caption_tokens bounds the
# filled template without BOI.
ImageTokenLayout = ImageLayout | JanusLayout


def row_length(layout: ImageTokenLayout) -> int:
    """Return the most tokens of a row in the model. The last code is only a target."""
    return layout.max_caption_tokens + layout.count


def extended(text_vocab: int, codes: int, grid: tuple[int, int], vq: str) -> ImageLayout:
    """Return the layout of a text model with four special rows and a row for each code."""
    boi = text_vocab
    return ImageLayout(
        text_vocab, boi, boi + 1, boi + 2, boi + 3, boi + 4, codes, grid, CAPTION, PROMPT_TOKENS, vq
    )


def read_layout(content: bytes, where: str) -> ImageLayout:
    """Return the layout of an imagetoken.json.

    Raises UserError, which names the key, for a wrong value.
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not readable as JSON ({error})") from None
    names: dict[str, Any] = {field.name: field.type for field in dataclasses.fields(ImageLayout)}
    if not isinstance(found, dict) or (missing := sorted(names.keys() - found.keys())):
        lacking = f"lacks {', '.join(missing)}" if isinstance(found, dict) else "is no JSON object"
        raise UserError(f"{where} {lacking}; expected the keys {', '.join(names)}")
    values = {name: _typed(found[name], kind, f"{where}: {name}") for name, kind in names.items()}
    layout = ImageLayout(**values)
    _check_ids(layout, where)
    return layout


def check_tokenizer(layout: ImageTokenLayout, tokenizer: Any, where: str) -> None:
    """Raise UserError if the template does not fit the tokenizer.

    The template needs its caption once, only special tokens of the vocabulary, and room for a
    caption. A special id must not be that of unknown tokens.
    """
    if layout.prompt.count(CAPTION) != 1:
        raise UserError(f"{where}: prompt={layout.prompt!r} must contain {CAPTION} once")
    vocabulary = tokenizer.get_vocab()
    for special in re.findall(r"<[^<>{}\s]+>", layout.prompt):
        if special not in vocabulary:
            raise UserError(
                f"{where}: prompt={layout.prompt!r} has {special}, which is no token of the"
                " tokenizer; add it there, or leave it out"
            )
    for name, value in layout.specials.items():
        if value == tokenizer.unk_token_id:
            raise UserError(
                f"{where}: {name}={value} is the tokenizer's id of unknown tokens;"
                " give it an id of its own"
            )
    shortest = len(_ids(layout, tokenizer, ""))
    if shortest >= layout.max_caption_tokens:
        raise UserError(
            f"{where}: max_caption_tokens={layout.max_caption_tokens} leaves no room for a caption:"
            f" the prompt alone has {shortest} tokens"
        )


def _check_ids(layout: ImageLayout, where: str) -> None:
    ids = layout.specials
    for name, value in ids.items():
        if not layout.text_vocab <= value < layout.image_offset:
            raise UserError(
                f"{where}: {name}={value} must lie between text and codes: at least"
                f" text_vocab={layout.text_vocab} and below image_offset={layout.image_offset}"
            )
    if len(set(ids.values())) < len(ids):
        raise UserError(f"{where}: {', '.join(SPECIALS)} must be four ids, found {ids}")
    for name in ("codes", "count", "max_caption_tokens"):
        if getattr(layout, name) < 1:
            raise UserError(f"{where}: {name}={getattr(layout, name)} must be at least 1")


def _typed(value: Any, kind: Any, where: str) -> Any:
    if kind is int and type(value) is int and value >= 0:
        return value
    if kind is str and isinstance(value, str):
        return value
    if kind not in (int, str) and isinstance(value, list) and len(value) == 2:
        return tuple(_typed(side, int, where) for side in value)
    wanted = {int: "a whole number of at least 0", str: "a text"}.get(kind, "[rows, columns]")
    raise UserError(f"{where}={value!r} must be {wanted}")


# ---- prompts --------------------------------------------------------------------------------


class Prompt(NamedTuple):
    """A caption's ids without BOI, at most max_caption_tokens.

    cut: the caption was too long.
    """

    ids: list[int]
    cut: bool


def encode_prompt(layout: ImageTokenLayout, tokenizer: Any, caption: str) -> Prompt:
    """Return the tokens of the template filled with a caption.

    A caption that is too long is cut to the longest beginning that fits. The end of the template is
    never lost. Raises UserError for a token that is no text of the model, because its id would be
    that of a code in a common vocabulary.
    """
    ids, cut = _ids(layout, tokenizer, caption), False
    if len(ids) > layout.max_caption_tokens:
        low, high = 0, len(caption)  # `low` letters fit, `high` do not
        while high - low > 1:
            middle = (low + high) // 2
            fits = len(_ids(layout, tokenizer, caption[:middle])) <= layout.max_caption_tokens
            low, high = (middle, high) if fits else (low, middle)
        ids, cut = _ids(layout, tokenizer, caption[:low]), True
    check_ids(ids, layout.text_vocab, tokenizer, f"caption {caption[:60]!r}")
    return Prompt(ids, cut)


def _ids(layout: ImageTokenLayout, tokenizer: Any, caption: str) -> list[int]:
    return list(tokenizer(layout.prompt.replace(CAPTION, caption))["input_ids"])


def left_padded(
    layout: ImageTokenLayout, prompts: list[list[int]]
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B T"]]:
    """Return prompts with BOI for the sampler, padded on the left: (tokens, mask).

    Both are max_caption_tokens + 1 wide.
    """
    tokens = np.full((len(prompts), layout.max_caption_tokens + 1), layout.pad, np.int32)
    mask = np.zeros_like(tokens)
    for row, ids in enumerate(prompts):
        tokens[row, -len(ids) - 1 :] = [*ids, layout.boi]
        mask[row, -len(ids) - 1 :] = 1
    return tokens, mask


def null_prompt(layout: ImageTokenLayout, ids: list[int]) -> list[int]:
    """Return the ids that replace a prompt without a caption, by the rule of training."""
    prompts, counts = np.array([ids or [layout.pad]], np.int32), np.array([len(ids)], np.int32)
    captions, lengths = layout.without_caption(prompts, counts)
    return captions[0, : int(lengths[0])].tolist()
