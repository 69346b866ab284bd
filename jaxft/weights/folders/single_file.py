"""Single files in LDM's layout (SD 1.x, 2.x, SDXL): read under diffusers' keys, and written."""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from jaxft.core.errors import UserError
from jaxft.core.guards.inside import refuse_outside
from jaxft.weights.files.tensor_files import TensorFiles, Tensors, write_sharded
from jaxft.weights.folders import known_configs as known
from jaxft.weights.folders.diffusers import FAMILIES, SCHEDULER, Pipeline, open_pipeline
from jaxft.weights.folders.refused import check_keys
from jaxft.weights.folders.transformers import Source
from jaxft.weights.locate import INDEX
from jaxft.weights.transfer import Export
from jaxft.weights.views import THIRDS, Place, Relaid, RowSpan, relaid, widened

UNET_PREFIX, VAE_PREFIX = "model.diffusion_model.", "first_stage_model."
TEXT_PREFIXES = {  # each family has its own
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
V_PRED, ZTSNR = "v_pred", "ztsnr"  # empty tensors by which UIs recognise v-prediction files


class LDMLayout(NamedTuple):
    """Keys and shapes of one component in LDM's layout.

    prefix: the beginning of its keys. names: diffusers' names of modules or tensors to LDM's. The
    longest name that begins a key counts. arrows: diffusers' names of tensors to their layouts,
    LDM -> diffusers. fused: q, k and v are one in_proj. ignore: a regex of keys, on either side,
    that fill no parameter. rows: diffusers' modules that are rows of one module of LDM, with its
    name and these rows. swapped: diffusers' modules whose halves LDM has in the other order.
    """

    prefix: str
    names: Mapping[str, str]
    arrows: Mapping[str, str] = {}
    fused: bool = False
    ignore: str = r"(?!)"
    rows: Mapping[str, tuple[str, RowSpan]] = {}
    swapped: Collection[str] = ()


def as_diffusers(tensors: Tensors, layout: LDMLayout) -> Relaid:
    """Return one component of a single file under diffusers' keys and shapes."""
    back = {ldm: name for name, ldm in layout.names.items()}
    modules: dict[
        str, list[tuple[str, RowSpan]]
    ] = {}  # of diffusers, by the module of LDM with them
    for name, (ldm, rows) in layout.rows.items():
        modules.setdefault(ldm, []).append((name, rows))
    places: dict[str, Place] = {}
    for key in tensors.keys():  # noqa: SIM118 (a Tensors is no dict)
        inner = key.removeprefix(layout.prefix)
        if not key.startswith(layout.prefix) or re.fullmatch(layout.ignore, inner):
            continue
        stem, _, leaf = inner.rpartition(".")
        if stem in modules:
            for module, rows in modules[stem]:
                places[f"{module}.{leaf}"] = Place(key, rows=rows)
            continue
        name = renamed(inner, back)
        match = re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name) if layout.fused else None
        if match is None:
            arrow, shape = layout.arrows.get(name, ""), tensors.info(key)[0]
            # Some tools store attention as matrices already.
            is_matrix = arrow.startswith("o i 1 1") and len(shape) == 2
            swapped = name.rpartition(".")[0] in layout.swapped
            places[name] = Place(key, "" if is_matrix else arrow, swapped=swapped)
            continue
        for letter, rows in zip("qkv", THIRDS, strict=True):
            places[f"{match[1]}.{letter}_proj.{match[2]}"] = Place(key, rows=rows)
    return Relaid(tensors, places)


def renamed(key: str, names: Mapping[str, str]) -> str:
    """Return the key with its longest known beginning (of whole dotted parts) replaced."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if (new := names.get(".".join(parts[:n]))) is not None:
            return ".".join([new, *parts[n:]])
    return key


# ---- reading ----------------------------------------------------------------------------------


def open_single_file(spec: str, weights: bool = True, prediction: str | None = None) -> Pipeline:
    """Open a .safetensors file of SD 1.x, 2.x or SDXL.

    Each component has all tensors of the file, under the file's keys: `models.pipelines.ldm` gives
    them diffusers' keys. The configs are those of a model_index.json beside the file, else the
    published ones. The tokenizers are beside the file, in tokenizer/ (and tokenizer_2/).
    `prediction` ("epsilon", "v_prediction") is for SD 2 files, which mostly have no sign of it.
    Raises: UserError for other files, and for a prediction that is missing or contradicted.
    """
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"model {spec!r}: no such file; expected a .safetensors of SD 1, 2 or SDXL")
    tensors = widened(TensorFiles.open(path))
    check_keys(tensors.keys(), path)
    kind = family(tensors, path)
    beside = path.parent
    base = open_pipeline(str(beside), weights=False) if (beside / INDEX).is_file() else None
    configs = base and {name: source.config for name, source in base.components.items()}
    if configs is None:
        configs = _published(tensors, kind, path)
    if configs.keys() != {"unet", "vae", *TEXT_PREFIXES[kind]}:
        raise UserError(f"{path} holds {kind}, but {beside / INDEX} is of another family; move it")
    files = dict(base.files) if base else _beside(beside)
    scheduler = dict(base.scheduler) if base else _scheduler(beside, kind)
    scheduler |= _prediction(path, tensors, kind, scheduler, prediction)
    return Pipeline(
        name=spec,
        index=base.index if base else published_index(kind, configs["unet"]["in_channels"]),
        components={
            name: Source(
                f"{spec} ({name})",
                config,
                tensors if weights else None,
                {"config.json": _dump(config)},
            )
            for name, config in configs.items()
        },
        scheduler=scheduler,
        files={name: content for name, content in files.items() if name != SCHEDULER},
        folder=beside,
        layout=kind,
    )


def family(tensors: Tensors, path: Path) -> str:
    """Return the family of a file by its keys: "sd1", "sd2" or "sdxl"."""
    names = tensors.keys()
    for kind, prefixes in TEXT_PREFIXES.items():
        if all(
            any(k.startswith(one) for k in names)
            for one in (UNET_PREFIX, VAE_PREFIX, *prefixes.values())
        ):
            return kind
    raise UserError(
        f"{path}: no whole SD 1, SD 2 or SDXL checkpoint: expected keys that begin with"
        f" {UNET_PREFIX}, {VAE_PREFIX} and a text encoder's such as"
        f" {TEXT_PREFIXES['sd1']['text_encoder']}"
    )


def _published(tensors: Tensors, kind: str, path: Path) -> dict[str, dict[str, Any]]:
    """Return the published configs, with the input channels and vocabulary size of the file."""
    width, channels = tensors.info(f"{UNET_PREFIX}input_blocks.0.0.weight")[0][:2]
    if width != 320:
        raise UserError(
            f"{path}: a UNet of width {width} is none of the published {kind} models; put their "
            f"{INDEX} and config.json folders beside the file"
        )
    configs = {name: dict(config) for name, config in known.KNOWN_COMPONENTS[kind].items()}
    configs["unet"]["in_channels"] = channels
    for name, prefix in TEXT_PREFIXES[kind].items():
        for end in ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"):
            if prefix + end in tensors.keys():  # noqa: SIM118
                configs[name]["vocab_size"] = tensors.info(prefix + end)[0][0]
    return configs


def published_index(kind: str, channels: int) -> dict[str, Any]:
    """Return a family's model_index.json, with the pipeline class for a UNet's input channels."""
    index = known.KNOWN_INDEXES[kind]
    variant = {8: "InstructPix2Pix", 9: "Inpaint"}.get(channels, "")
    return {**index, "_class_name": index["_class_name"].replace("Pipeline", f"{variant}Pipeline")}


def _beside(folder: Path) -> dict[str, Path]:
    found = [path for name in known.SIDE_FOLDERS for path in (folder / name).glob("*")]
    found = sorted(path for path in found if path.is_file())
    refuse_outside(folder, found)
    return {f"{path.parent.name}/{path.name}": path for path in found}


def _scheduler(folder: Path, kind: str) -> dict[str, Any]:
    file = folder / SCHEDULER
    return json.loads(file.read_text()) if file.is_file() else dict(known.KNOWN_SCHEDULERS[kind])


def _prediction(
    path: Path, tensors: Tensors, kind: str, scheduler: Mapping, given: str | None
) -> dict[str, Any]:
    """Return the scheduler's keys that follow from marker tensors, modelspec and `given`.

    Raises: UserError if there is no prediction type, or if `given` contradicts the file.
    """
    with safe_open(path, "np") as file:
        stated = (file.metadata() or {}).get("modelspec.prediction_type", "")
    names = set(tensors.keys())
    found: dict[str, Any] = {}
    if V_PRED in names or stated.startswith("v"):
        found["prediction_type"] = "v_prediction"
    elif stated == "epsilon" or (kind != "sd2" and "prediction_type" not in scheduler):
        found["prediction_type"] = "epsilon"
    if ZTSNR in names:
        found |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    if given == "epsilon" and {**scheduler, **found}.get("prediction_type") == "v_prediction":
        raise UserError(
            f"prediction='epsilon', but {path} has v_prediction, by which its UNet was trained;"
            " leave prediction empty"
        )
    if given:
        found["prediction_type"] = given
    if "prediction_type" not in {**scheduler, **found}:
        raise UserError(
            f"{path}: this SD 2 file has no key for its prediction, epsilon or v; set "
            "prediction=v_prediction (768 px models) or prediction=epsilon (the base model)"
        )
    return found


# ---- writing ----------------------------------------------------------------------------------


def write(
    file: Path,
    parts: Mapping[str, tuple[Export, LDMLayout]],
    markers: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one LDM file from exports under diffusers' keys, one tensor in memory at a time.

    markers: V_PRED and ZTSNR, where they apply. metadata: see `modelspec`. The caller owns
    temporary names and renaming.
    """
    moved = [to_ldm(export, layout) for export, layout in parts.values()]
    empty = np.zeros(0, np.float32)
    infos = {key: info for export in moved for key, info in export.infos.items()}
    infos |= dict.fromkeys(markers, (empty.shape, empty.dtype))
    tensors = chain(*(export.tensors for export in moved), ((name, empty) for name in markers))
    everything = sum(prod(shape) * 8 for shape, _ in infos.values())
    write_sharded(file.parent, tensors, infos, everything + 1, file.stem, metadata)
    return file


def to_ldm(export: Export, layout: LDMLayout) -> Export:
    """Return a component's export under LDM's keys and shapes."""
    kept = (key for key in export.infos if not re.fullmatch(layout.ignore, key))
    return relaid(export, {key: _to_ldm(key, layout) for key in kept})


def _to_ldm(key: str, layout: LDMLayout) -> Place:
    module, _, leaf = key.rpartition(".")
    if module in layout.rows:
        name, rows = layout.rows[module]
        return Place(f"{layout.prefix}{name}.{leaf}", rows=rows)
    name = renamed(key, layout.names)
    left, right = (layout.arrows.get(key) or "->").split("->")
    arrow = f"{right} -> {left}" if key in layout.arrows else ""
    match = re.fullmatch(r"(.+)\.([qkv])_proj\.(weight|bias)", name) if layout.fused else None
    if match:
        key = f"{layout.prefix}{match[1]}.in_proj_{match[3]}"
        return Place(key, rows=THIRDS["qkv".index(match[2])])
    return Place(layout.prefix + name, arrow, swapped=module in layout.swapped)


def markers(scheduler: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of a schedule's marker tensors.

    UIs read a file without them as epsilon-prediction.
    """
    v = scheduler.get("prediction_type") == "v_prediction"
    return ((V_PRED,) if v else ()) + ((ZTSNR,) if scheduler.get("rescale_betas_zero_snr") else ())


ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
    "sd3": "stable-diffusion-v3",
    "flux": "flux-1",
    "flux2": "Flux.2-klein",
    "zimage": "z-image",
}
AUTHORS = {
    "flux": "black-forest-labs/flux",
    "flux2": "black-forest-labs/flux2",
    "zimage": "Tongyi-MAI/Z-Image",
}


def modelspec(
    kind: str, title: str, resolution: int, scheduler: Mapping[str, Any], adapter: str = ""
) -> dict[str, str]:
    """Return metadata by Stability's model specification 1.0. `adapter` is "lora" or ""."""
    v = scheduler.get("prediction_type") == "v_prediction"
    name = ARCHITECTURES[kind]
    if kind == "sd2":
        name += "-768-v" if v else "-512"
    author = AUTHORS.get(kind, "Stability-AI/generative-models")
    stated = {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{name}/{adapter}" if adapter else name,
        "modelspec.implementation": f"https://github.com/{author}",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
    }
    if kind in FAMILIES.values():
        return stated
    return {**stated, "modelspec.prediction_type": "v" if v else "epsilon"}


def _dump(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()
