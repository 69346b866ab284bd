"""Single files of SD 3, FLUX.1, FLUX.2 klein and Z-Image: a transformer, alone or with the others.

Their tokenizers, configs and the networks that a file lacks are those of the diffusers folder in
which the file lies.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import TensorFiles, Tensors
from jaxft.weights.folders.diffusers import LEGACY, Pipeline, open_component, open_pipeline
from jaxft.weights.folders.refused import check_keys
from jaxft.weights.folders.single_file import UNET_PREFIX, LDMLayout, as_diffusers
from jaxft.weights.folders.single_file import VAE_PREFIX as FIRST_STAGE
from jaxft.weights.locate import INDEX
from jaxft.weights.views import InMemory, Overlaid, Renamed, widened

FLUX_VAE = "vae."  # ComfyUI expects it in a file of FLUX.1 and Z-Image
# Families by the beginning of a key that only they have, or that those before them lack.
FLOW_BLOCKS = {
    "joint_blocks.": "sd3",
    "double_stream_modulation_img.": "flux2",
    "double_blocks.": "flux",
    "noise_refiner.": "zimage",
}
FLOW_NAMES = {
    "sd3": "Stable Diffusion 3",
    "flux": "FLUX.1",
    "flux2": "FLUX.2 klein",
    "zimage": "Z-Image",
}
# The beginnings of a text encoder's keys, as Stability AI and ComfyUI write them.
_CLIP_L = "text_encoders.clip_l.transformer."
_T5 = "text_encoders.t5xxl.transformer."
FLOW_TEXTS = {
    "sd3": {
        "text_encoder": _CLIP_L,
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": _T5,
    },
    "flux": {"text_encoder": _CLIP_L, "text_encoder_2": _T5},
    "flux2": {},  # a file that has one is refused by `open_flow_file`
    "zimage": {"text_encoder": "text_encoders.qwen3_4b.transformer."},
}
ANY_TEXT = "text_encoders."
PROJECTION = "text_projection.weight"


def open_flow_tensors(spec: str) -> Tensors | None:
    """Return the tensors of a single file of one of these families, None for any other spec.

    Raises: UserError for a file of a model that jaxft cannot train.
    """
    path = Path(spec).expanduser()
    if not path.is_file():
        return None
    tensors = widened(TensorFiles.open(path))
    check_keys(tensors.keys(), path)
    return tensors if flow_family(tensors.keys()) else None


def flow_family(keys: Collection[str]) -> str:
    """Return the family of a file by its keys, "" for one of no transformer known here."""
    inner = {key.removeprefix(UNET_PREFIX).split(".")[0] + "." for key in keys}
    return next((kind for start, kind in FLOW_BLOCKS.items() if start in inner), "")


def folder_of(spec: str, tensors: Tensors) -> Pipeline:
    """Return the configs of the diffusers folder in which a single file lies.

    Raises: UserError if the file lies in none, or in that of another family.
    """
    path, kind = Path(spec).expanduser(), flow_family(tensors.keys())
    if not (path.parent / INDEX).is_file():
        raise UserError(
            f"{path}: a file of {FLOW_NAMES[kind]} has no tokenizers; put it into the model's"
            f" diffusers folder, beside {INDEX}, which also gives the networks that the file lacks"
        )
    base = open_pipeline(str(path.parent), weights=False)
    if base.family != kind:
        raise UserError(
            f"{path} holds {FLOW_NAMES[kind]}, but {path.parent / INDEX} is of another family;"
            f" put the file into the diffusers folder of its own model"
        )
    return base


def open_flow_file(
    spec: str, tensors: Tensors, base: Pipeline, layouts: Mapping[str, LDMLayout], weights: bool
) -> Pipeline:
    """Return the pipeline of a single file, under diffusers' keys.

    base: see `folder_of`. layouts: of its transformer and VAE, by component.
    """
    kind, names = base.family, tensors.keys()
    if not FLOW_TEXTS[kind] and any(key.startswith(ANY_TEXT) for key in names):
        raise UserError(
            f"{spec} holds a text encoder, which is read from text_encoder/ of the folder for"
            f" {FLOW_NAMES[kind]}; give the file of the transformer, with the VAE or without"
        )
    components = {}
    for name, source in base.components.items():
        made = replace(source, name=f"{spec} ({name})", folder=None)
        made = replace(made, side_files={"config.json": source.side_files["config.json"]})
        if weights:
            if name == "transformer":
                whole = any(key.startswith(UNET_PREFIX) for key in names)
                layout = layouts[name]._replace(prefix=UNET_PREFIX if whole else "")
                own = as_diffusers(tensors, layout)
            elif name == "vae":
                own = _vae(base, tensors, layouts[name])
            else:
                own = _text(base, name, tensors, FLOW_TEXTS[kind].get(name, ""))
            made = replace(made, tensors=own)
        components[name] = made
    return replace(base, name=spec, components=components, layout=kind)


def _vae(base: Pipeline, tensors: Tensors, layout: LDMLayout) -> Tensors:
    for prefix in (FIRST_STAGE, FLUX_VAE):
        if any(key.startswith(prefix) for key in tensors.keys()):  # noqa: SIM118
            return as_diffusers(tensors, layout._replace(prefix=prefix))
    return _of_folder(base, "vae")


def _text(base: Pipeline, name: str, tensors: Tensors, prefix: str) -> Tensors:
    """Return a text encoder: the folder's, with the tensors of the file in their places.

    A file lacks the projection of CLIP-L, which is the identity in SD 3. Without weights in the
    folder, it is that. Tensors beside those of an encoder, such as positions, have no place.
    """
    keys = [key for key in tensors.keys() if prefix and key.startswith(prefix)]  # noqa: SIM118
    if not keys:
        return _of_folder(base, name)
    known = _known(base, name)
    if known is None:
        whole = {key.removeprefix(prefix): key for key in keys if "position_ids" not in key}
        if not base.projects(name) or PROJECTION in whole:
            return Renamed(tensors, whole)
        width = int(base.components[name].config.get("projection_dim", 0))
        projection = InMemory({PROJECTION: np.eye(width, dtype=np.float32)})
        return Overlaid(projection, Renamed(tensors, whole))
    own = set(known.keys())
    pairs = [(key.removeprefix(prefix), key) for key in keys]
    places = {
        name: key
        for inner, key in pairs
        for name in (inner, inner.removeprefix(LEGACY), inner.removeprefix("model."))
        if name in own
    }
    if not places:
        raise UserError(
            f"{base.folder / name}: its weights have none of the keys of {prefix}* in the file;"
            " give the folder of the same model"
        )
    return Overlaid(known, Renamed(tensors, places))


def _known(base: Pipeline, name: str) -> Tensors | None:
    """Return the weights of a component of the folder, None if it has only the config."""
    if not any((base.folder / name).glob("*.safetensors")):
        return None
    return open_component(str(base.folder / name), name).tensors


def _of_folder(base: Pipeline, name: str) -> Tensors:
    if (found := _known(base, name)) is None:
        raise UserError(
            f"{base.folder / name}: no weights, and the single file has none of {name} either;"
            f" copy {name}/ of the original folder there"
        )
    return found
