"""Config keys of the autoencoder task. Light to import, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Losses:
    """Weights of the loss terms.

    l1, l2: means over pixels of |x - y| and (x - y)^2. perceptual: the perceptual distance. kl: the
    sum over the latents of a VAE, as in diffusers' training. commitment: LlamaGen's beta, for a VQ
    tokenizer, which also adds the codebook's loss with weight 1. revive: for a VQ tokenizer, pulls
    the codes that a batch leaves unused towards its latents. adversarial: a factor of the adaptive
    weight, from `adversarial_start` on.
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
        """Return the weights of a codec's latent losses by name."""
        return {
            "kl": self.kl,
            "codebook": 1.0,
            "commitment": self.commitment,
            "revive": self.revive,
        }


@dataclasses.dataclass(frozen=True)
class AutoencoderOptions:
    """Options of the autoencoder task.

    resolution: pixels a side. perceptual: the network of the perceptual distance.
    """

    resolution: int
    eval_examples: int
    perceptual: str
    loss: Losses
