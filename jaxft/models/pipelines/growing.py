"""Text-to-image UNets that grow into those of inpainting and of InstructPix2Pix."""

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import NamedTuple

from jaxft.core.errors import UserError, check_choice
from jaxft.core.params import Leaf, select
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.weights.folders.diffusers import Pipeline
from jaxft.weights.folders.quantised.nf4 import GIVE_WHOLE, PackedTensors
from jaxft.weights.locate import INDEX
from jaxft.weights.views import MoreInputs

NO_GROWTH = "none"
NEW_INPUTS = "unet.conv_in.kernel"
# The parameters that train by default beside an adapter or a new word.
TRAINED_BESIDE = r"unet\.conv_in\..*|.*\.(lora_[abkm]|inversion\.embedding)"


class Growth(NamedTuple):
    """A kind of model that a text-to-image model can grow into.

    infix: what the class of its pipeline is called in diffusers. extra: its input channels beside
    noisy latents and the latents of a picture.
    """

    infix: str
    extra: int


GROWTHS = {
    "inpainting": Growth("Inpaint", extra=1),  # the mask
    "instruct_pix2pix": Growth("InstructPix2Pix", extra=0),
}


def grow(pipeline: Pipeline, kind: str) -> Pipeline:
    """Return a text-to-image pipeline with the inputs of `kind`, a key of GROWTHS.

    The kernel of the first convolution is zero for the new channels. Before they train, the model
    predicts what the text-to-image model does, for any picture and mask. InstructPix2Pix (Brooks et
    al. 2022, arXiv:2211.09800) and the inpainting models of Stable Diffusion began so.
    `unet/config.json` and `model_index.json` become those of the new kind.
    Raises: UserError for another kind, and for a model that is not text-to-image with a UNet.
    """
    check_choice("grow", kind, (NO_GROWTH, *GROWTHS))
    if kind == NO_GROWTH:
        return pipeline
    if "unet" not in pipeline.components:
        raise UserError(
            f"grow={kind} adds inputs to the UNet of Stable Diffusion 1, 2 or XL, and"
            f" {pipeline.name} has a transformer; leave it out"
        )
    unet, growth = pipeline.components["unet"], GROWTHS[kind]
    latent = VAEConfig.from_hf(pipeline.components["vae"].config).latent_channels
    if (now := UNetConfig.from_hf(unet.config).in_channels) != latent:
        raise UserError(
            f"grow={kind} starts from a text-to-image UNet, which has in_channels={latent}, and"
            f" that of {pipeline.name} has {now}; leave it out to train the model as it is"
        )
    if isinstance(unet.tensors, PackedTensors):
        raise UserError(
            f"grow={kind} writes a new model, which NF4 weights cannot be; {GIVE_WHOLE}"
        )
    config = {**unet.config, "in_channels": 2 * latent + growth.extra}
    more, tensors = latent + growth.extra, unet.tensors
    grown = replace(
        unet,
        config=config,
        tensors=tensors and MoreInputs(tensors, "conv_in.weight", more),
        side_files={"config.json": _dump(config)},  # its weights are no longer those of the files
    )
    size = "XL" if pipeline.family == "sdxl" else ""
    index = {**pipeline.index, "_class_name": f"StableDiffusion{size}{growth.infix}Pipeline"}
    return replace(
        pipeline,
        index=index,
        components={**pipeline.components, "unet": grown},
        files={**pipeline.files, INDEX: _dump(index)},
    )


def check_trained(kind: str, pattern: str, leaves: Mapping[str, Leaf]) -> None:
    """Raise UserError if `trainable` leaves out the new inputs, which would stay zero."""
    if kind != NO_GROWTH and NEW_INPUTS not in select(pattern, leaves):
        raise UserError(
            f"trainable={pattern!r} does not match {NEW_INPUTS}, whose new channels are zero until"
            f" they train; leave trainable out, or add unet\\.conv_in\\..* for grow={kind}"
        )


def _dump(content: Mapping) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
