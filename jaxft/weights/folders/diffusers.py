"""diffusers folders, read and written: configs, weights and side files of pipelines."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from jaxft.core.errors import UserError
from jaxft.core.guards.inside import is_inside, refuse_outside
from jaxft.weights.files.tensor_files import PICKLES, STEMS, TensorFiles, Tensors
from jaxft.weights.folders.quantised import methods
from jaxft.weights.folders.quantised.nf4 import PackedTensors
from jaxft.weights.folders.refused import check_index
from jaxft.weights.folders.transformers import SIDE_FILES, Source
from jaxft.weights.locate import INDEX, VARIANTS, locate
from jaxft.weights.transfer import Part
from jaxft.weights.views import Relaid, Renamed, as_matrices, widened

SCHEDULER = "scheduler/scheduler_config.json"
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
COMPONENTS = ("unet", "transformer", "vae", *TEXT_ENCODERS)
FAMILIES = {
    "SD3Transformer2DModel": "sd3",
    "FluxTransformer2DModel": "flux",
    "Flux2Transformer2DModel": "flux2",
    "ZImageTransformer2DModel": "zimage",
}
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")
GENERATION = "generation_config.json"  # beside a text encoder that is a language model
LEGACY = "text_model."  # transformers 4 cannot read a CLIPTextModel without this prefix in its keys
BULKY = (*PICKLES, ".msgpack", ".onnx", ".onnx_data", ".h5", ".safetensors")

Files = dict[str, Path | bytes]
Tables = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline, before any renaming, conversion or cast.

    `components` are the parts with weights that jaxft computes. The `side_files` of a component are
    its JSON files and its weight files, named without a variant. `files` maps relative paths to
    all other files that an export copies. `layout` is "diffusers", or the family of a single file.
    """

    name: str
    index: dict[str, Any]
    components: dict[str, Source]
    scheduler: dict[str, Any]
    files: Mapping[str, Path | bytes]
    folder: Path
    layout: str = "diffusers"

    @property
    def family(self) -> str:
        """The family by the index: one of FAMILIES, "sdxl" for an SDXL pipeline, else "sd"."""
        if "transformer" in self.components:
            return FAMILIES[self.index["transformer"][1]]
        return "sdxl" if "XL" in self.index.get("_class_name", "") else "sd"

    def tokenizer_dir(self, name: str = "tokenizer") -> Path:
        """Return the folder of `tokenizer`, `tokenizer_2` or `tokenizer_3`, for AutoTokenizer.

        Raises: UserError if there is no tokenizer.
        """
        if not {f"{name}/vocab.json", f"{name}/tokenizer.json"} & self.files.keys():
            raise UserError(
                f"{self.folder / name}: no vocab.json or tokenizer.json; copy the folder {name}/ "
                "of the original pipeline there"
            )
        return self.folder / name

    def projects(self, name: str) -> bool | None:
        """Return True if a text encoder's class has a projection, None if the index names none."""
        entry = self.index.get(name)
        return entry[1] == "CLIPTextModelWithProjection" if entry and entry[1] else None


class Changes(NamedTuple):
    """The changes of a pipeline by training, for `pipeline_files`.

    rewritten: components whose weights the caller writes. scheduler and configs (by component):
    keys with their new values. files: further or replaced files by relative path.
    """

    rewritten: frozenset[str] = frozenset()
    scheduler: Mapping[str, Any] = {}
    configs: Mapping[str, Mapping[str, Any]] = {}
    files: Mapping[str, Path | bytes] = {}


UNCHANGED = Changes()


def open_pipeline(spec: str, weights: bool = True, nf4: Tables | None = None) -> Pipeline:
    """Open a folder with model_index.json, a `pip:PACKAGE` that holds one, or a hub id.

    A hub id may name a subfolder (org/name/sub). Where the plain weight file is absent, one of
    VARIANTS (`*.fp16.safetensors`) is read. weights=False reads only configs. nf4: the values of
    codes, to read components in the NF4 of bitsandbytes as `PackedTensors`.
    Raises: UserError that names the file which is absent, unreachable, quantised or damaged.
    """
    folder = locate(spec, INDEX, weights)
    if not (folder / INDEX).is_file() and (folder / "config.json").is_file():
        found = _json(folder / "config.json")
        raise UserError(
            f"{folder}: no {INDEX}, but config.json of a"
            f" {found.get('_class_name') or found.get('model_type')}; give a whole pipeline folder"
            " (an AutoencoderKL alone trains with task=autoencoder)"
        )
    index = _json(folder / INDEX)
    check_index(index, folder / INDEX)
    for key in index:
        if _names(index, key) and ("/" in key or not is_inside(folder, key)):
            raise UserError(
                f"{folder / INDEX}: component {key!r}; expected the name of a folder beside it, and"
                " no link that leads elsewhere"
            )
    named = {key for key in COMPONENTS if _names(index, key)}
    return Pipeline(
        name=spec,
        index=index,
        components={
            key: _component(f"{spec}/{key}", folder / key, weights, nf4)
            for key in COMPONENTS
            if key in named
        },
        scheduler=_json(folder / SCHEDULER),
        files=_other_files(folder, index, named),
        folder=folder,
    )


def open_component(spec: str, kind: str, weights: bool = True) -> Source:
    """Open the folder of one component, or the subfolder `kind` ("vae") of a pipeline.

    `spec` is as in `open_pipeline`. The caller checks the class.
    """
    folder = locate(spec, "config.json", weights)
    if (folder / kind / "config.json").is_file():
        folder = folder / kind
    return _component(spec, folder, weights)


def _component(name: str, folder: Path, weights: bool, nf4: Tables | None = None) -> Source:
    config = _json(folder / "config.json")
    packed = nf4 is not None and bool(methods.nf4_scales(config))
    if not packed:
        methods.refuse_config(config, f"{folder / 'config.json'}")
    stems = STEMS if "model_type" in config else STEMS[::-1]
    files = _weight_files(folder, stems) if weights else {}
    tensors = _open_weights(folder, files) if weights else None
    if packed and nf4 is not None and tensors is not None:
        tensors = PackedTensors(tensors, name, nf4)
    side = {"config.json": folder / "config.json", **files}
    if (folder / GENERATION).is_file():
        side[GENERATION] = folder / GENERATION
    refuse_outside(folder, (path for path in side.values() if isinstance(path, Path)))
    return Source(name, config, tensors, side, folder)


def _open_weights(folder: Path, files: Files) -> Tensors:
    if not files:
        if any(path.suffix in PICKLES for path in folder.iterdir()):
            return TensorFiles.open(folder)  # raises the error that explains how to convert them
        raise UserError(
            f"{folder}: found no {STEMS[0]}.safetensors or {STEMS[1]}.safetensors; give a "
            "folder saved by save_pretrained, with its weights"
        )
    # As in diffusers and transformers, an index only lists shards, and all their tensors count.
    shards = [path for path in files.values() if isinstance(path, Path) and path.suffix != ".json"]
    return widened(as_matrices(TensorFiles.open(shards)))


def _weight_files(folder: Path, stems: Sequence[str] = STEMS) -> Files:
    """Return the weight files of a folder, named without a variant. {} if there are none.

    `stems` begins with the name that the component's own library uses: the library reads this one
    if both exist. Where there are shards and a single file, diffusers reads the shards, and
    transformers the single file.
    """
    for stem in stems:
        for infix in VARIANTS:
            dotted = f".{infix}" if infix else ""
            single = folder / f"{stem}{dotted}.safetensors"
            index = folder / f"{stem}.safetensors.index{dotted}.json"
            if index.is_file() and not (single.is_file() and stem == STEMS[0]):
                return _sharded(index, stem, dotted)
            if single.is_file():
                return {f"{stem}.safetensors": single}
    return {}


def _sharded(index: Path, stem: str, dotted: str) -> Files:
    plain = f"{stem}.safetensors.index.json"
    content = _json(index)
    places = content.get("weight_map")
    places = places if isinstance(places, dict) else {}
    names = list(places.values())
    if not names or any(
        not isinstance(name, str) or "/" in name or not is_inside(index.parent, name)
        for name in names
    ):
        raise UserError(f"{index}: expected an object 'weight_map' from tensor to shard beside it")
    names = sorted(set(names))
    if missing := [name for name in names if not (index.parent / name).is_file()]:
        single = index.parent / f"{stem}{dotted}.safetensors"
        or_else = f", or delete the index if {single.name} is whole" if single.is_file() else ""
        raise UserError(
            f"{index}: missing shards {', '.join(missing)}; download them again{or_else}"
        )
    if not dotted and isinstance(content.get("metadata"), dict):
        return {plain: index, **{name: index.parent / name for name in names}}
    content = {"metadata": {}, **{k: v for k, v in content.items() if v is not None}}
    content["weight_map"] = {key: name.replace(dotted, "", 1) for key, name in places.items()}
    shards = {name.replace(dotted, "", 1): index.parent / name for name in names}
    return {plain: _dump(content), **shards}  # diffusers fails without metadata


def _other_files(
    folder: Path, index: Mapping[str, Any], named: Iterable[str]
) -> dict[str, Path | bytes]:
    """Return all files outside of the components: side files, and other folders of the index."""
    found: Files = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and any(fnmatch(path.name, pattern) for pattern in SIDE_FILES)
    }
    found.pop("parity.json", None)  # describes the original weights, wrong after training
    for key in sorted(set(index) - set(named)):
        if not _names(index, key) or not (folder / key).is_dir():
            if _names(index, key) and key not in OPTIONAL:
                raise UserError(f"{folder / key}: missing, but {INDEX} names it; copy it there")
            continue
        weights = _weight_files(folder / key)
        here = sorted(path for path in (folder / key).iterdir() if path.is_file())
        small = {
            path.name: path
            for path in here
            if not weights or (path.suffix not in BULKY and ".safetensors.index" not in path.name)
        }
        found |= {f"{key}/{name}": content for name, content in (small | weights).items()}
    refuse_outside(folder, (path for path in found.values() if isinstance(path, Path)))
    return found


def _names(index: Mapping[str, Any], key: str) -> bool:
    """Return True if the index has a class for this key."""
    entry = index.get(key)
    return isinstance(entry, list) and len(entry) == 2 and bool(entry[1])


# ---- writing ----------------------------------------------------------------------------------


def part(pipeline: Pipeline, name: str, table: tuple, ignore: tuple[str, ...] = ()) -> Part:
    """Return the Part of a component, prefix `name.`, folder `name`. `table` is (rules, sizes)."""
    source, (rules, sizes) = pipeline.components[name], table
    stem = STEMS[0] if name in TEXT_ENCODERS else STEMS[1]
    return Part(f"{name}.", source.name, source.tensors, rules, sizes, ignore, (), name, stem)


def must_rewrite(pipeline: Pipeline) -> frozenset[str]:
    """Return the components that an export cannot copy even if they did not change.

    Old versions of diffusers and transformers cannot read their files.
    """
    if pipeline.layout != "diffusers":
        return frozenset(pipeline.components)
    return frozenset(
        name
        for name, source in pipeline.components.items()
        if isinstance(source.tensors, Relaid)
        or _lacks_prefix(source.tensors)
        or _lacks_format(source)
    )


def _lacks_prefix(tensors: Tensors | None) -> bool:
    return tensors is not None and "embeddings.token_embedding.weight" in tensors.keys()  # noqa: SIM118


def _lacks_format(source: Source) -> bool:
    """Return True if a weight file has no {"format": "pt"}: diffusers 0.31 fails on it."""
    for path in source.side_files.values():
        if isinstance(path, Path) and path.suffix == ".safetensors":
            with safe_open(path, "np") as file:
                if (file.metadata() or {}).get("format") != "pt":
                    return True
    return False


def legacy_part(one: Part) -> Part:
    """Return the Part of a text encoder with the keys of transformers 4. Others are unchanged."""
    if one.tensors is None or not _lacks_prefix(one.tensors):
        return one
    text = ("embeddings.", "encoder.", "final_layer_norm.")
    old = {(LEGACY + k if k.startswith(text) else k): k for k in one.tensors.keys()}  # noqa: SIM118
    return one._replace(tensors=Renamed(one.tensors, old))


def pipeline_files(pipeline: Pipeline, changes: Changes = UNCHANGED) -> Files:
    """Return all files of the exported folder by relative path, but those that the caller writes.

    The caller writes the weights of `changes.rewritten` and `must_rewrite`. A file of the source
    that did not change is returned as its Path, a changed or new file as bytes.
    """
    rewritten = changes.rewritten | must_rewrite(pipeline)
    files = dict(pipeline.files)
    files[SCHEDULER] = _edited(files.get(SCHEDULER), pipeline.scheduler, changes.scheduler)
    files[INDEX] = _index_bytes(pipeline, files)
    for name, source in pipeline.components.items():
        for file, content in source.side_files.items():
            if file == "config.json":
                content = _edited(content, source.config, changes.configs.get(name, {}))
            elif name in rewritten and file != GENERATION:
                continue
            files[f"{name}/{file}"] = content
    for encoder in TEXT_ENCODERS:
        if encoder in pipeline.components and not _is_clip(pipeline.components[encoder]):
            continue  # all versions of transformers read the tokenizer.json of T5 and Qwen
        name = encoder.replace("text_encoder", "tokenizer")
        files |= _legacy_tokenizer(files, name)
        if f"{name}/vocab.json" in files:
            # Without model_max_length the tokenizer neither pads nor truncates.
            length = pipeline.components[encoder].config.get("max_position_embeddings", 77)
            config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length}
            files.setdefault(f"{name}/tokenizer_config.json", _dump(config))
    return files | dict(changes.files)


def _edited(content: Path | bytes | None, old: Mapping, new: Mapping[str, Any]) -> Path | bytes:
    same = all(key in old and old[key] == value for key, value in new.items())
    return content if same and content is not None else _dump({**old, **new})


def _index_bytes(pipeline: Pipeline, files: Mapping[str, Path | bytes]) -> Path | bytes:
    """Return model_index.json without components whose folders are absent.

    diffusers fails on an absent folder, in old and new versions.
    """
    index = dict(pipeline.index)
    present = {path.split("/")[0] for path in files if "/" in path} | pipeline.components.keys()
    for key in list(index):
        if _names(index, key) and key not in present:
            index[key] = [None, None]
    if not _names(index, "safety_checker") and pipeline.family == "sd":
        index |= {"safety_checker": [None, None], "requires_safety_checker": False}
    return files.get(INDEX, _dump(index)) if index == pipeline.index else _dump(index)


def _is_clip(source: Source) -> bool:
    return source.config.get("model_type") not in ("t5", "qwen3")


def _legacy_tokenizer(files: Mapping[str, Path | bytes], name: str) -> Files:
    """Return vocab.json and merges.txt, which transformers 4 needs, from a lone tokenizer.json.

    transformers 5 saves only tokenizer.json. Raises: UserError if it is not a byte-pair model.
    """
    whole = files.get(f"{name}/tokenizer.json")
    if not isinstance(whole, Path) or f"{name}/vocab.json" in files:
        return {}
    model = _json(whole).get("model", {})
    if not {"vocab", "merges"} <= model.keys():
        raise UserError(f"{whole}: no byte-pair model inside; copy vocab.json and merges.txt there")
    pairs = [one if isinstance(one, str) else " ".join(one) for one in model["merges"]]
    merges = "\n".join(["#version: 0.2", *pairs]) + "\n"
    vocab = json.dumps(model["vocab"], ensure_ascii=False)
    made: Files = {f"{name}/vocab.json": vocab.encode(), f"{name}/merges.txt": merges.encode()}
    return made


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; give a whole diffusers folder, as save_pretrained writes it"
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content
