"""Config keys of the autoencoder task. Light to import, so that a mistyped key fails at once."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Losses:
    """Weights of the loss terms.

    l1: weight of the mean of |x - y| over pixels.
    l2: weight of the mean of (x - y)^2 over pixels.
    perceptual: weight of the perceptual distance.
    kl: of a VAE, weight of the sum over the latents.
    adversarial: factor of the adaptive weight of the discriminator. 0 is off.
    adversarial_start: the step where the discriminator starts.
    commitment: of a VQ tokenizer, the beta of LlamaGen.
    revive: of a VQ tokenizer, weight that pulls unused codes to the latents.
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

    resolution: pixels per side.
    eval_examples: number of rows of data.eval. 0 is all.
    perceptual: network of the perceptual distance: demo:efficientnet-lite0 or a file.
    """

    resolution: int
    eval_examples: int
    perceptual: str
    loss: Losses
