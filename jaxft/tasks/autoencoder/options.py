"""Config keys of the autoencoder task alone; light, so that a mistyped key fails at once."""

import dataclasses


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
