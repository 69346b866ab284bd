"""The config keys that only one task knows; light, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LLMOptions:
    """seq_len in tokens; `pack` lets short examples of a batch share rows (the sums stay the same);
    `template` turns {"text", "label"} records into prompt and completion."""

    seq_len: int
    pack: bool
    template: str
    eval_examples: int


@dataclasses.dataclass(frozen=True)
class Losses:
    """Weights of the terms: means over pixels of |x - y| and (x - y)^2 and the perceptual distance.

    A VAE adds `kl` (a sum over the latents, as in diffusers' training). A VQ tokenizer adds the
    codebook's loss as it is, `commitment` (LlamaGen's beta), and `revive`: what pulls the codes
    that a batch leaves unused towards its latents. The adversarial term's weight multiplies the
    adaptive one, from `adversarial_start` on.
    """

    l1: float
    l2: float
    perceptual: float
    kl: float
    adversarial: float
    adversarial_start: str = "0_steps"
    commitment: float = 0.25
    revive: float = 0.0

    def latent(self) -> dict[str, float]:
        """Weights of what a codec reports of its latents."""
        return {
            "kl": self.kl,
            "codebook": 1.0,
            "commitment": self.commitment,
            "revive": self.revive,
        }


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """`resolution` in pixels a side; `perceptual` is the network that measures."""

    resolution: int
    eval_examples: int
    perceptual: str
    loss: Losses


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


OPTIONS = {
    "llm": LLMOptions,
    "autoencoder": AutoencoderOptions,
    "diffusion": DiffusionOptions,
    "image_tokens": ImageTokenOptions,
}
