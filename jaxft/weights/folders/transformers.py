"""The source of a model: a Hugging Face folder, a file, an installed package or the hub."""

import atexit
import json
import math
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import ml_dtypes
import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.guards.inside import refuse_outside
from jaxft.demo import demo_path
from jaxft.weights.files.gguf import GgufFile
from jaxft.weights.files.tensor_files import TensorFiles, Tensors
from jaxft.weights.folders.quantised import methods
from jaxft.weights.folders.quantised.fp8 import Fp8Tensors, is_fp8, read_block
from jaxft.weights.folders.quantised.mxfp4 import Mxfp4Tensors, is_mxfp4
from jaxft.weights.packages import package_model

# Files of a model besides its weights: configs, tokenizer, chat template, licence, model card.
CONFIGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
SIDE_FILES = (*CONFIGS, "LICENSE*", "LICENCE*", "NOTICE*", "README*", "USE_POLICY*")
OWN_CONFIGS = ("config.json", "adapter_config.json")  # of a model, of an adapter
MODELOPT_FILE = "hf_quant_config.json"  # of older folders, in place of a key in config.json
TOKENIZER_FILES = {"tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model"}
HEAD, TABLE = "lm_head.weight", "model.embed_tokens.weight"  # of causal language models


@dataclass(frozen=True)
class Source:
    """A model's folder or file, before any renaming, conversion or cast.

    `side_files` maps the name of a file to its path (for a GGUF, to its bytes). An export copies
    these files unchanged. config.json is one of them. `tensors` is None if the weights were not
    requested.
    """

    name: str
    config: dict[str, Any]
    tensors: Tensors | None
    side_files: Mapping[str, Path | bytes]
    folder: Path | None = None
    tokenizer: Path | None = None  # the folder of a tokenizer that replaces the model's
    class_names: tuple[tuple[str, str], ...] = ()  # as in `Part`
    decoded_from: str = ""  # the quantisation of the file, if its weights are read in 16 bits

    @property
    def dtype(self) -> str:
        """The name of the dtype in config.json, else that of most of the weights."""
        stated = config_dtype(self.config)
        if stated or self.tensors is None:
            return stated or "float32"
        sizes: dict[str, int] = {}
        for shape, dtype in map(self.tensors.info, self.tensors.keys()):
            sizes[dtype.name] = sizes.get(dtype.name, 0) + math.prod(shape)
        return max(sizes, key=lambda name: sizes[name], default="float32")

    @property
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json, {} where it is absent or cannot be read."""
        content = self.side_files.get("generation_config.json", b"{}")
        try:
            return json.loads(content if isinstance(content, bytes) else content.read_bytes())
        except (OSError, ValueError):
            return {}  # an export copies the file unchanged, so a damaged file must not stop it

    def tokenizer_dir(self) -> Path:
        """Return a folder for AutoTokenizer.from_pretrained, for a GGUF a temporary one.

        Raises: UserError if there is no tokenizer.
        """
        if not TOKENIZER_FILES & self.side_files.keys():
            raise UserError(
                f"{self.name}: no tokenizer beside the weights; copy tokenizer.json and "
                "tokenizer_config.json of the original model there"
            )
        if found := self.tokenizer or self.folder:
            return found
        folder = Path(tempfile.mkdtemp(prefix="jaxft-tokenizer-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        for name, content in self.side_files.items():
            assert isinstance(content, bytes)
            (folder / name).write_bytes(content)
        return folder


def config_dtype(config: Mapping[str, Any]) -> str | None:
    """Return the dtype in config.json: `dtype` since transformers 5, `torch_dtype` before."""
    name = config.get("dtype") or config.get("torch_dtype")
    return name.removeprefix("torch.") if isinstance(name, str) else None


def export_config(config: Mapping[str, Any], dtype: str | None) -> dict[str, Any]:
    """Return config.json for an export: all fields, plus the keys of the other transformers.

    transformers 4 reads rope_theta, rope_scaling and torch_dtype, transformers 5 rope_parameters
    and dtype. Each silently uses its default where its own key is absent. `dtype` None keeps the
    dtype of the source.
    """
    out = {key: value for key, value in config.items() if key != "transformers_weights"}
    rope, theta = config.get("rope_parameters"), config.get("rope_theta")
    if rope and "rope_type" in rope and theta is None:
        out["rope_theta"] = rope.get("rope_theta", 10000.0)
        scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
        out.setdefault("rope_scaling", None if rope["rope_type"] == "default" else scaling)
    if theta is not None and not rope:
        scaling = dict(config.get("rope_scaling") or {})
        kind = scaling.pop("type", None)
        out["rope_parameters"] = {"rope_type": kind or "default", "rope_theta": theta, **scaling}
    if dtype or config_dtype(config):
        out["dtype"] = out["torch_dtype"] = dtype or config_dtype(config)
    for key, inner in out.items():  # text_config and vision_config may state a dtype too
        if dtype and isinstance(inner, dict) and config_dtype(inner):
            out[key] = {**inner, "dtype": dtype, "torch_dtype": dtype}
    return out


def open_source(spec: str, weights: bool = True, nf4: bool = False) -> Source:
    """Open a model.

    `spec` is a folder, a .safetensors beside config.json, a .gguf, `pip:PACKAGE`, `demo:NAME` or a
    hub id `org/name`. A path that exists needs no network. With `weights=False` no weights are read
    or downloaded. With `nf4` a folder in NF4 opens too, and its tensors are those of the file.
    Raises: UserError for a model that is absent, unreachable or damaged.
    """
    if spec.startswith("pip:"):
        return _open_path(spec, package_model(spec.removeprefix("pip:")), weights, nf4)
    spec = str(demo_path(spec, "model") or spec)
    path = Path(spec).expanduser()
    if path.exists():
        return _open_path(spec, path, weights, nf4)
    like_path = spec.startswith((".", "/", "~")) or path.suffix in (".gguf", ".safetensors")
    if like_path or not re.fullmatch(r"[\w.-]+/[\w.-]+", spec):
        raise UserError(
            f"model {spec!r}: no such file or folder; expected a path, pip:PACKAGE or a hub "
            "id org/name"
        )
    return _open_path(spec, _from_hub(spec, weights), weights, nf4)


def _open_path(name: str, path: Path, weights: bool, nf4: bool) -> Source:
    if path.suffix == ".gguf":
        gguf = GgufFile(path)
        return Source(name, gguf.config(), gguf if weights else None, gguf.side_files())
    folder = path if path.is_dir() else path.parent
    config = _read_config(folder / "config.json")
    if (folder / MODELOPT_FILE).is_file() and not config.get("quantization_config"):
        own = _read_config(folder / MODELOPT_FILE).get("quantization")
        config["quantization_config"] = {"quant_method": "modelopt", **(own or {})}
    nf4 = nf4 and bool(methods.nf4_scales(config))
    files, stated = side_files(folder), config.get("quantization_config") or {}
    method = "MXFP4" if is_mxfp4(config) else "FP8" if is_fp8(config) else ""
    if method:
        config = {key: value for key, value in config.items() if key != "quantization_config"}
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        files["config.json"] = text.encode()  # an export is in 16 or 32 bits
        files.pop(MODELOPT_FILE, None)
    if not nf4:
        methods.refuse_config(config, f"{folder / 'config.json'}")
    tensors: Tensors | None = None
    if weights:
        tensors = TensorFiles.open(path if path.is_file() else folder / _stated_file(config))
        if method == "MXFP4":
            tensors = Mxfp4Tensors(tensors, str(path))
        elif method:
            block = read_block(stated.get("weight_block_size"), f"{folder / 'config.json'}")
            tensors = Fp8Tensors(tensors, str(path), _decoded_dtype(config), block)
        if not nf4:
            methods.refuse_tensors(tensors.keys(), str(path))
    return Source(name, config, tensors, files, folder, decoded_from=method)


def _decoded_dtype(config: Mapping[str, Any]) -> np.dtype:
    """Return the dtype of the model before quantisation, bfloat16 if config.json has another."""
    name = config_dtype(config) or config_dtype(config.get("text_config") or {})
    return np.dtype(name if name in ("float16", "float32") else ml_dtypes.bfloat16)


def members_hint(folder: Path) -> str:
    """Return the advice to give one of the models or adapters in a folder, "" if it has none.

    The export of a sweep has a folder for each member.
    """
    inside = sorted({file.parent for name in OWN_CONFIGS for file in folder.glob(f"*/{name}")})
    if len(inside) < 2:
        return ""
    names = ", ".join(one.name for one in inside)
    return f"it holds {names}, so give one of them, such as {inside[0]}"


def _stated_file(config: Mapping[str, Any]) -> str:
    """Return the weight file or index that config.json names for transformers, else "."."""
    name = config.get("transformers_weights") or "."
    if name != "." and not re.fullmatch(r"[\w-][\w.-]*\.safetensors(\.index\.json)?", str(name)):
        raise UserError(
            f"config.json: transformers_weights={name!r}; expected a .safetensors file or index"
            " beside it"
        )
    return name


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        if (path.parent / "params.json").is_file():
            raise UserError(
                f"{path}: missing beside params.json, which is a file of Mistral's own format;"
                " download config.json and the files of the same model that begin with model"
            ) from error
        if (path.parent / "model_index.json").is_file():
            raise UserError(
                f"{path.parent} is a pipeline of diffusers, which has no {path.name}; train it with"
                " --config=configs/diffusion.py"
            ) from error
        advice = members_hint(path.parent) or "give a folder saved by save_pretrained"
        raise UserError(f"{path}: missing; {advice}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(config, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(config).__name__}")
    if "task" in config and "model_type" not in config:
        raise UserError(f"{path.parent} is the folder of a run; give {path.parent / 'export'}")
    return config


def side_files(folder: Path) -> dict[str, Path | bytes]:
    """Return the files of a model's folder that an export copies, by name.

    Raises: UserError for a link that leads out of the folder.
    """
    found = {path.name: path for pattern in SIDE_FILES for path in folder.glob(pattern)}
    kept = {
        name: path
        for name, path in sorted(found.items())
        # parity.json describes the original weights, and would be wrong after training.
        if path.is_file() and not name.endswith(".index.json") and name != "parity.json"
    }
    refuse_outside(folder, kept.values())
    return dict(kept)


def _from_hub(repo: str, weights: bool) -> Path:
    try:
        folder = huggingface_hub.snapshot_download(
            repo,
            allow_patterns=[*SIDE_FILES, *(["*.safetensors"] if weights else [])],
            # Subfolders and consolidated files hold the same weights in another spelling.
            ignore_patterns=["*/*", "consolidated*"],
        )
    except Exception as error:  # the hub client's errors share no base class
        raise not_given(repo, error) from error
    return Path(folder)


def not_given(repo: str, error: Exception) -> UserError:
    """Return the error of a model that is no folder, and that the hub did not give."""
    reason = str(error).strip().split("\n")[0]
    return UserError(
        f"model {repo!r}: no such folder, and the Hugging Face hub did not give it "
        f"({type(error).__name__}: {reason}); give the path of a local copy"
    )
