"""Config keys of the diffusion task alone; light, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prior:
    """Prior preservation (DreamBooth): pictures of the class, and the weight of their loss."""

    data: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Inversion:
    """Textual inversion: the new word in the captions ("" is none), the known one that it starts
    from, and how many embedding rows it has."""

    token: str = ""
    init: str = ""
    vectors: int = 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is drawn to be looked at; without prompts, held-out captions. `image_guidance` is by the
    source picture of an InstructPix2Pix model."""

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    sampler: str = "dpm++"
    rescale: float = 0.0
    image_guidance: float = 1.5


@dataclasses.dataclass(frozen=True)
class DiffusionOptions:
    """`cache` is a folder for moments and embeddings ("" is none); `buckets` keeps aspect ratios;
    `prediction` "" is the folder's own; `eval_generated` pictures are drawn for kid-lite0."""

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
