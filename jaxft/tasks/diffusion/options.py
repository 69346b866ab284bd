"""Config keys of the diffusion task. Light to import, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prior:
    """Prior preservation (DreamBooth): pictures of the class, and the weight of their loss."""

    data: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Inversion:
    """Textual inversion.

    token: the new word in the captions ("" is none). init: the known word that it starts from.
    vectors: its number of embedding rows.
    """

    token: str = ""
    init: str = ""
    vectors: int = 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """Settings of the sampled previews.

    prompts: without any, held-out captions are used. image_guidance: the guidance by the source
    picture of an InstructPix2Pix model.
    """

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    sampler: str = "dpm++"
    rescale: float = 0.0
    image_guidance: float = 1.5


@dataclasses.dataclass(frozen=True)
class DiffusionOptions:
    """Options of the diffusion task.

    cache: folder for moments and embeddings ("" is none). buckets: keep aspect ratios. prediction:
    "" is the folder's own. eval_generated: number of pictures sampled for kid-lite0.
    """

    resolution: int
    buckets: bool
    cache: str
    caption_dropout: float
    min_snr_gamma: float
    sample: Sample
    flip: bool = False
    prediction: str = ""
    zero_snr: bool = False
    noise_offset: float = 0.0
    eval_examples: int = 0
    eval_generated: int = 128
    prior: Prior = Prior()
    inversion: Inversion = Inversion()
