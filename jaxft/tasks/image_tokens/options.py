"""Config keys of the image-token task alone; light, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Weights of the mean cross-entropy over a row's codes and over its prompt (DALL-E: 7/8 and
    1/8), and of z-loss in both."""

    image_weight: float = 1.0
    text_weight: float = 0.0
    z: float = 0.0


@dataclasses.dataclass(frozen=True)
class TokenSample:
    """How images are drawn to be looked at; without prompts, held-out captions."""

    prompts: tuple[str, ...]
    guidance: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class ImageTokenOptions:
    """`tokenizer` is another VQ folder than the model's own; `graft` the one that a text model is
    to speak. `resolution` 0, `prompt` "" and `max_caption_tokens` 0 are the folder's own. `crops`:
    the centre alone, or corners of a slightly larger picture too."""

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
