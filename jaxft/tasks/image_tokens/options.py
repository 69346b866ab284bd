"""Config keys of the image-token task. Light to import, so that a mistyped key fails at once."""

import dataclasses

from jaxft.core.errors import UserError


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Weights of the loss terms.

    image_weight: weight of the mean cross-entropy over the codes of a row (DALL-E: 7/8).
    text_weight: weight of the mean cross-entropy over its prompt (DALL-E: 1/8).
    z: weight of the z-loss in both.
    """

    image_weight: float = 1.0
    text_weight: float = 0.0
    z: float = 0.0


@dataclasses.dataclass(frozen=True)
class TokenSample:
    """Sampled previews.

    prompts: prompts of the previews. Without any, held-out captions are used.
    guidance: guidance scale s in u + s(c - u). 1.0 is off.
    temperature: temperature of the codes. 0 is greedy.
    top_k: sample from the k likeliest codes. 0 is off.
    top_p: sample from the likeliest codes of this total probability. 1.0 is off.
    """

    prompts: tuple[str, ...]
    guidance: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self) -> None:
        """Raise UserError for a number out of its range."""
        for key, value, right, limit in (
            ("temperature", self.temperature, self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k, self.top_k >= 0, "at least 0"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
        ):
            if not right:
                raise UserError(f"config key sample.{key}={value} must be {limit}")


@dataclasses.dataclass(frozen=True)
class ImageTokenOptions:
    """Options of the image-token task.

    resolution: pixels per side. 0 is the size of the folder.
    cache: folder for the codes of the pictures.
    caption_dropout: share of rows that train without their caption.
    tokenizer: a VQ folder with a decoder that replaces that of the model.
    graft: a VQ folder whose codes a text model learns.
    prompt: template of the prompt with {caption}. Empty is that of the folder.
    max_caption_tokens: length of the prompt. 0 is that of the folder.
    flip: also train on every picture mirrored.
    crops: crops of each picture. 1 is the centre, up to 5 add corners.
    eval_examples: number of rows of data.eval. 0 is all.
    eval_generated: number of pictures to sample and measure. 0 is none.
    """

    resolution: int
    cache: str
    caption_dropout: float
    sample: TokenSample
    loss: TokenLoss = TokenLoss()
    tokenizer: str = ""
    graft: str = ""
    prompt: str = ""
    max_caption_tokens: int = 0
    flip: bool = False
    crops: int = 1
    eval_examples: int = 0
    eval_generated: int = 32
