"""Single files in LDM's layout (SD 1.x, 2.x, SDXL): seen under diffusers' keys, and written."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from jaxft.core.errors import UserError
from jaxft.weights import known_configs as known
from jaxft.weights.pipeline import INDEX, SCHEDULER, Pipeline, open_pipeline
from jaxft.weights.rules import rearrange, rearranged_shape
from jaxft.weights.sources import Source
from jaxft.weights.tensor_files import Info, TensorFiles, Tensors, write_sharded
from jaxft.weights.transfer import Export

UNET, VAE = "model.diffusion_model.", "first_stage_model."
TEXT = {  # the prefixes that tell the families apart
    "sd1": {"text_encoder": "cond_stage_model.transformer."},
    "sd2": {"text_encoder": "cond_stage_model.model."},
    "sdxl": {
        "text_encoder": "conditioner.embedders.0.transformer.",
        "text_encoder_2": "conditioner.embedders.1.model.",
    },
}
V_PRED, ZTSNR = "v_pred", "ztsnr"  # empty tensors by which UIs know v-prediction files


class Layout(NamedTuple):
    """How LDM spells one component.

    prefix: of its keys. names: module (or tensor) by diffusers' name to LDM's; the longest that
    begins a key counts. arrows: tensor by diffusers' name to its layout, LDM -> diffusers. fused:
    q, k and v are one in_proj. ignore: a regex of keys, on either side, that make nothing.
    """

    prefix: str
    names: Mapping[str, str]
    arrows: Mapping[str, str] = {}
    fused: bool = False
    ignore: str = r"(?!)"


class _Slice(NamedTuple):
    """Where one of diffusers' tensors lies: LDM's key, its layout, and which third of it."""

    key: str
    arrow: str
    third: int | None


class AsDiffusers:
    """One component of a single file under diffusers' keys and shapes."""

    def __init__(self, tensors: Tensors, layout: Layout):
        self._tensors = tensors
        back = {ldm: name for name, ldm in layout.names.items()}
        self._places: dict[str, _Slice] = {}
        for key in tensors.keys():  # noqa: SIM118 (a Tensors is no dict)
            inner = key.removeprefix(layout.prefix)
            if inner == key or re.fullmatch(layout.ignore, inner):
                continue
            name = renamed(inner, back)
            match = re.fullmatch(r"(.+)\.in_proj_(weight|bias)", name) if layout.fused else None
            for third, letter in enumerate("qkv") if match else ():
                assert match is not None
                place = _Slice(key, "", third)
                self._places[f"{match[1]}.{letter}_proj.{match[2]}"] = place
            if not match:
                self._places[name] = _Slice(key, layout.arrows.get(name, ""), None)

    def keys(self) -> Sequence[str]:
        return list(self._places)

    def info(self, key: str) -> Info:
        place = self._places[key]
        shape, dtype = self._tensors.info(place.key)
        if place.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        # A shape that does not fit its arrow is shown as it is: the plan then names the tensor.
        fits = place.arrow and len(shape) == len(place.arrow.split("->")[0].split())
        return rearranged_shape(shape, place.arrow, {}) if fits else shape, dtype

    def read(self, key: str) -> np.ndarray:
        place = self._places[key]
        array = self._tensors.read(place.key)
        if place.third is not None:
            array = np.split(array, 3)[place.third].copy()
        arrow = place.arrow and rearrange(array, place.arrow, {})
        return np.ascontiguousarray(arrow) if place.arrow else array


def renamed(key: str, names: Mapping[str, str]) -> str:
    """The key with its longest known beginning (of whole dotted parts) replaced."""
    parts = key.split(".")
    for n in range(len(parts), 0, -1):
        if (new := names.get(".".join(parts[:n]))) is not None:
            return ".".join([new, *parts[n:]])
    return key


# ---- reading ----------------------------------------------------------------------------------


def open_single_file(spec: str, weights: bool = True, prediction: str | None = None) -> Pipeline:
    """A .safetensors of SD 1.x, 2.x or SDXL; its components' tensors are the file's, unrenamed.

    Configs are those of a model_index.json beside the file, else the published ones that fit its
    shapes. Tokenizers lie beside the file, in tokenizer/ (and tokenizer_2/). `prediction`
    ("epsilon", "v_prediction") is for SD 2 files, which do not say it. `jaxft.models.ldm` gives
    the components diffusers' keys.
    """
    path = Path(spec).expanduser()
    if not path.is_file():
        raise UserError(f"model {spec!r}: no such file; expected a .safetensors of SD 1, 2 or SDXL")
    tensors = TensorFiles.open(path)
    kind = family(tensors, path)
    beside = path.parent
    base = open_pipeline(str(beside), weights=False) if (beside / INDEX).is_file() else None
    configs = base and {name: source.config for name, source in base.components.items()}
    if configs is None:
        configs = _published(tensors, kind, path)
    if configs.keys() != {"unet", "vae", *TEXT[kind]}:
        raise UserError(f"{path} holds {kind}, but {beside / INDEX} is of another family; move it")
    files = dict(base.files) if base else _beside(beside)
    scheduler = dict(base.scheduler) if base else _scheduler(beside, kind)
    scheduler |= _prediction(path, tensors, kind, scheduler, prediction)
    return Pipeline(
        name=spec,
        index=base.index if base else known.INDEX[kind],
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
    """Which of TEXT's layouts a file has, "sd1", "sd2" or "sdxl"."""
    names = tensors.keys()
    for kind, prefixes in TEXT.items():
        if all(any(k.startswith(one) for k in names) for one in (UNET, VAE, *prefixes.values())):
            return kind
    raise UserError(
        f"{path}: no whole SD 1, SD 2 or SDXL checkpoint: expected keys that begin with {UNET}, "
        f"{VAE} and a text encoder's such as {TEXT['sd1']['text_encoder']}"
    )


def _published(tensors: Tensors, kind: str, path: Path) -> dict[str, dict[str, Any]]:
    """The published configs, with the file's own input channels and vocabulary."""
    width, channels = tensors.info(f"{UNET}input_blocks.0.0.weight")[0][:2]
    if width != 320:
        raise UserError(
            f"{path}: a UNet of width {width} is none of the published {kind} models; put their "
            f"{INDEX} and config.json folders beside the file"
        )
    configs = {name: dict(config) for name, config in known.COMPONENTS[kind].items()}
    configs["unet"]["in_channels"] = channels
    for name, prefix in TEXT[kind].items():
        for end in ("text_model.embeddings.token_embedding.weight", "token_embedding.weight"):
            if prefix + end in tensors.keys():  # noqa: SIM118
                configs[name]["vocab_size"] = tensors.info(prefix + end)[0][0]
    return configs


def _beside(folder: Path) -> dict[str, Path]:
    found = [path for name in known.SIDE_FOLDERS for path in (folder / name).glob("*")]
    return {f"{path.parent.name}/{path.name}": path for path in sorted(found) if path.is_file()}


def _scheduler(folder: Path, kind: str) -> dict[str, Any]:
    file = folder / SCHEDULER
    return json.loads(file.read_text()) if file.is_file() else dict(known.SCHEDULER[kind])


def _prediction(
    path: Path, tensors: Tensors, kind: str, scheduler: Mapping, given: str | None
) -> dict[str, Any]:
    """What the file says of its schedule: by marker tensors, modelspec, or not at all."""
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
            f"prediction='epsilon', but {path} says v_prediction, which is what its UNet has"
            " learned; leave prediction empty"
        )
    if given:
        found["prediction_type"] = given
    if "prediction_type" not in {**scheduler, **found}:
        raise UserError(
            f"{path}: SD 2 files do not say whether they predict epsilon or v; set "
            "prediction=v_prediction (768 px models) or prediction=epsilon (the base model)"
        )
    return found


# ---- writing ----------------------------------------------------------------------------------


def write(
    file: Path,
    parts: Mapping[str, tuple[Export, Layout]],
    markers: Sequence[str] = (),
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write one LDM file from exports under diffusers' keys, one tensor in memory at a time.

    markers: V_PRED and ZTSNR, where they apply. metadata: see `modelspec`. The caller owns
    temporary names and renaming.
    """
    infos: dict[str, Info] = {}
    for export, layout in parts.values():
        infos |= ldm_infos(export, layout)
    empty = np.zeros(0, np.float32)
    infos |= dict.fromkeys(markers, (empty.shape, empty.dtype))

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for export, layout in parts.values():
            yield from _ldm_tensors(export, layout)
        yield from ((name, empty) for name in markers)

    everything = sum(prod(shape) * 8 for shape, _ in infos.values())
    write_sharded(file.parent, tensors(), infos, everything + 1, file.stem, metadata)
    return file


def ldm_infos(export: Export, layout: Layout) -> dict[str, Info]:
    """Shapes and dtypes of a component's tensors as LDM has them, under its keys."""
    infos: dict[str, Info] = {}
    for key, (shape, dtype) in export.infos.items():
        if re.fullmatch(layout.ignore, key):
            continue
        place = _to_ldm(key, layout)
        if place.third is None:
            infos[place.key] = (rearranged_shape(shape, place.arrow, {}), dtype)
        else:
            infos[place.key] = ((3 * shape[0], *shape[1:]), dtype)
    return infos


def _ldm_tensors(export: Export, layout: Layout) -> Iterator[tuple[str, np.ndarray]]:
    waiting: dict[str, dict[int, np.ndarray]] = {}
    for key, array in export.tensors:
        if re.fullmatch(layout.ignore, key):
            continue
        place = _to_ldm(key, layout)
        if place.third is None:
            moved = rearrange(array, place.arrow, {}) if place.arrow else array
            yield place.key, np.ascontiguousarray(moved)
            continue
        thirds = waiting.setdefault(place.key, {})
        thirds[place.third] = array
        if len(thirds) == 3:
            yield place.key, np.concatenate([thirds[i] for i in range(3)])
            del waiting[place.key]


def _to_ldm(key: str, layout: Layout) -> _Slice:
    name = renamed(key, layout.names)
    left, right = (layout.arrows.get(key) or "->").split("->")
    arrow = f"{right} -> {left}" if key in layout.arrows else ""
    match = re.fullmatch(r"(.+)\.([qkv])_proj\.(weight|bias)", name) if layout.fused else None
    if match:
        return _Slice(f"{layout.prefix}{match[1]}.in_proj_{match[3]}", "", "qkv".index(match[2]))
    return _Slice(layout.prefix + name, arrow, None)


def markers(scheduler: Mapping[str, Any]) -> tuple[str, ...]:
    """The marker tensors of a schedule; UIs read a file without them as epsilon-prediction."""
    v = scheduler.get("prediction_type") == "v_prediction"
    return ((V_PRED,) if v else ()) + ((ZTSNR,) if scheduler.get("rescale_betas_zero_snr") else ())


ARCHITECTURES = {
    "sd1": "stable-diffusion-v1",
    "sd2": "stable-diffusion-v2",
    "sdxl": "stable-diffusion-xl-v1-base",
}


def modelspec(
    kind: str, title: str, resolution: int, scheduler: Mapping[str, Any], adapter: str = ""
) -> dict[str, str]:
    """Metadata by Stability's model specification 1.0; `adapter` is "lora" or nothing."""
    v = scheduler.get("prediction_type") == "v_prediction"
    name = ARCHITECTURES[kind]
    if kind == "sd2":
        name += "-768-v" if v else "-512"
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": f"{name}/{adapter}" if adapter else name,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.resolution": f"{resolution}x{resolution}",
        "modelspec.prediction_type": "v" if v else "epsilon",
    }


def _dump(config: Mapping[str, Any]) -> bytes:
    return (json.dumps(config, indent=2) + "\n").encode()
