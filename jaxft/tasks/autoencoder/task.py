"""Autoencoders: reconstruction, perceptual and adversarial losses for a VAE or VQ tokenizer."""

from jaxft.core import config as configs
from jaxft.objectives.reconstruction import Reconstruction
from jaxft.tasks import Planned, Task
from jaxft.tasks.autoencoder.exports import WRITERS
from jaxft.tasks.autoencoder.opened import OpenedAutoencoder
from jaxft.tasks.autoencoder.preview import AutoencoderPreview
from jaxft.tasks.autoencoder.rows import ImageRows, planned


def _objective(opened: OpenedAutoencoder, rows: ImageRows | Planned) -> Reconstruction:
    start = _adversarial_start(opened, len(rows))
    side, template = opened.options.resolution, opened.template
    reconstruct, losses = opened.codec.reconstruct, opened.losses
    return Reconstruction(reconstruct, losses, start, opened.dtype, template, side)


def _adversarial_start(opened: OpenedAutoencoder, examples: int) -> int:
    """Return the first step of the adversarial loss. Prints a warning if the run ends before."""
    cfg, losses, size = opened.cfg, opened.losses, opened.cfg.batch_size
    start = configs.steps(losses.adversarial_start, size, examples, "loss.adversarial_start")
    if losses.adversarial and start >= configs.steps(cfg.total, size, examples, "total") > 0:
        print(
            f"warning: loss.adversarial_start={losses.adversarial_start!r} is not before"
            f" the end of the run ({cfg.total}): the discriminator will never train"
        )
    return start


AUTOENCODER = Task(
    open=OpenedAutoencoder,
    read=ImageRows,
    plan=planned,
    encode=lambda opened, chosen, sets, load: {},  # every step reads the images themselves
    objective=_objective,
    preview=AutoencoderPreview,
    writers=WRITERS,
)
