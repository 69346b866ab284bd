"""Config keys of the image-token task. Light to import, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class TokenLoss:
    """Weights of the loss terms.

    image_weight, text_weight: of the mean cross-entropy over a row's codes and over its prompt
    (DALL-E: 7/8 and 1/8). z: of the z-loss in both.
    """

    image_weight: float = 1.0
    text_weight: float = 0.0
    z: float = 0.0


@dataclasses.dataclass(frozen=True)
class TokenSample:
    """Settings of the sampled previews. Without prompts, held-out captions are used."""

    prompts: tuple[str, ...]
    guidance: float
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclasses.dataclass(frozen=True)
class ImageTokenOptions:
    """Options of the image-token task.

    resolution, prompt, max_caption_tokens: 0 or "" is the folder's own. tokenizer: another VQ
    folder than the model's own. graft: the VQ folder whose codes a text model is to learn. crops: 1
    is the centre alone, and more add corners of a slightly larger picture.
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
