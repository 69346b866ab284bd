"""Config keys of the diffusion task. Light to import, so that a mistyped key fails at once."""

import dataclasses

from jaxft.core.configs.schema import BASES
from jaxft.core.errors import UserError, check_choice


@dataclasses.dataclass(frozen=True)
class Prior:
    """Prior preservation (DreamBooth).

    data: pictures of the class. Empty is off.
    weight: weight of their loss.
    """

    data: str = ""
    weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Inversion:
    """Textual inversion.

    token: the new word in the captions. Empty is off.
    init: the known word that initialises it.
    vectors: its number of embedding rows.
    """

    token: str = ""
    init: str = ""
    vectors: int = 1


@dataclasses.dataclass(frozen=True)
class Sample:
    """Sampled previews.

    prompts: prompts of the previews. Without any, held-out captions are used.
    steps: steps of the sampler.
    guidance: guidance scale. 1.0 is off.
    sampler: dpm++, euler or ddim.
    rescale: share of the guidance rescaled to the deviation of the conditional prediction.
    image_guidance: guidance scale of the source picture, of InstructPix2Pix.
    """

    prompts: tuple[str, ...]
    steps: int
    guidance: float
    sampler: str = "dpm++"
    rescale: float = 0.0
    image_guidance: float = 1.5

    def __post_init__(self) -> None:
        """Raise UserError for no steps."""
        if self.steps < 1:
            raise UserError(f"config key sample.steps={self.steps} must be at least 1")


@dataclasses.dataclass(frozen=True)
class DiffusionOptions:
    """Options of the diffusion task.

    resolution: pixels per side. Buckets have at most the area of this square.
    buckets: keep aspect ratios instead of cropping to squares.
    cache: folder for moments and embeddings. Empty computes them every step.
    caption_dropout: share of rows whose caption becomes the null caption.
    min_snr_gamma: gamma of the min-SNR loss weights. 0 is off, 5 is usual.
    flip: add mirrored pictures as further examples.
    prediction: epsilon or v_prediction. Empty is that of the folder.
    zero_snr: zero terminal SNR.
    noise_offset: scale of a constant per channel that is added to the noise.
    mask: file (NAME.mask.png beside a picture) or alpha: white or opaque parts count. Empty is all.
    eval_examples: number of rows of data.eval for the validation loss. 0 is all.
    eval_generated: number of captions to sample for kid-lite0. 0 is none.
    base: layout of the frozen projections below a LoRA: none, nf4 or int8.
    clip_skip: number of last layers of CLIP that captions leave out. 0 is the pipeline's own.
    caption_chunks: number of chunks of 75 tokens in which CLIP reads a caption.
    grow: new inputs of a text-to-image UNet: none, inpainting or instruct_pix2pix.
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
    mask: str = ""
    eval_examples: int = 0
    eval_generated: int = 128
    prior: Prior = Prior()
    inversion: Inversion = Inversion()
    base: str = "none"
    clip_skip: int = 0
    caption_chunks: int = 1
    grow: str = "none"

    def __post_init__(self) -> None:
        """Raise UserError for an unknown layout of the base."""
        check_choice("base", self.base, BASES)
