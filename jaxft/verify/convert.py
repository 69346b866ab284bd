"""Convert pickled weights to safetensors, once: `python -m jaxft.verify.convert PATH [OUT]`.

A pickle can run code, so jaxft reads none. PyTorch's restricted reader (weights_only=True) takes
tensors and plain containers alone, and this command uses no other.
"""

import json
import pickle
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch

from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.errors import UserError
from jaxft.core.guards.inside import is_inside
from jaxft.tasks import OPTIONS
from jaxft.weights.files.tensor_files import DTYPE_NAMES, PICKLES, STEMS, write_sharded
from jaxft.weights.locate import INDEX

# Names of weights in folders of transformers and diffusers. A trainer's state is not among them.
PICKLED_WEIGHTS = (
    "pytorch_model*.bin",
    f"{STEMS[1]}*.bin",
    f"{STEMS[1]}*.pt",
    "model*.pt",
    "model*.pth",
)
NESTED = ("state_dict", "model_state_dict", "model", "module", "params")


def convert(path: str | Path, out: str | Path | None = None) -> list[Path]:
    """Write the pickled weights at `path` as safetensors and return the new files.

    `path` is one file, a folder of weights (shards are joined), or the folder of a pipeline, whose
    components are all converted. `out` is the file to write for a single file or folder of weights.
    By default the new file lies beside the pickle, under the name that transformers or diffusers
    expect. Raises UserError if there is nothing to convert, or the restricted reader refuses a
    file.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if (path / INDEX).is_file():
        folders = [one for one in sorted(path.iterdir()) if one.is_dir() and _pickles(one)]
        if not folders:
            raise UserError(f"{path}: no component has pickled weights")
        if out:
            raise UserError(
                f"{path}: a pipeline's components are converted where they lie; leave out {out}"
            )
        return [file for folder in folders for file in convert(folder)]
    sources = _pickles(path) if path.is_dir() else [path]
    if not sources:
        raise UserError(f"{path}: found no pickled weights, such as pytorch_model.bin")
    stem = STEMS[1] if sources[0].name.startswith(STEMS[1]) else STEMS[0]
    target = Path(out) if out else sources[0].with_name(f"{stem}.safetensors")
    if target.exists():
        raise UserError(f"{target}: exists already; move it, or name another file to write")
    tensors: dict[str, torch.Tensor] = {}
    for source in sources:
        tensors |= _read(source)
    infos = {key: (tuple(tensor.shape), _dtype(tensor)) for key, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in tensors.values())
    made = target.with_name(f".{target.stem}.part")
    (written,) = write_sharded(made.parent, _arrays(tensors), infos, size + 1, made.name)
    written.rename(target)
    print(f"wrote {target}: {len(tensors)} tensors of {', '.join(one.name for one in sources)}")
    return [target]


def _pickles(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights: all shards, or the one whole file."""
    for index in sorted(folder.glob("*.bin.index.json")):
        names = set(json.loads(index.read_text())["weight_map"].values())
        if outside := sorted(name for name in names if not is_inside(folder, str(name))):
            raise UserError(f"{index}: names {outside[0]!r}; expected files beside it")
        if all((folder / name).is_file() for name in names):
            return [folder / name for name in sorted(names)]
    found = [path for pattern in PICKLED_WEIGHTS for path in sorted(folder.glob(pattern))]
    plain = [path for path in found if path.stem in ("pytorch_model", *STEMS)]
    shards = [path for path in found if "-of-" in path.stem]
    pickles = sorted(path for path in folder.iterdir() if path.suffix in PICKLES)
    return plain[:1] or shards or found[:1] or (pickles if len(pickles) == 1 else [])


def _read(path: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of one pickle, without a trainer's containers around them."""
    try:
        try:
            content = torch.load(path, "cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before PyTorch 1.6 cannot be mapped
            content = torch.load(path, "cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{path}: PyTorch's restricted reader refuses it ({reason}); it may hold code or be"
            " damaged, so get a .safetensors of these weights"
        ) from error
    for name in NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
    found = content.items() if isinstance(content, Mapping) else ()
    tensors = {str(key): one for key, one in found if isinstance(one, torch.Tensor)}
    if not tensors:
        raise UserError(f"{path}: holds no mapping from names to tensors")
    return tensors


def _dtype(tensor: torch.Tensor) -> np.dtype:
    name = str(tensor.dtype).removeprefix("torch.")
    found = next((dtype for dtype in DTYPE_NAMES if dtype.name == name), None)
    if found is None:
        raise UserError(f"a tensor of dtype {name} has no place in a safetensors file")
    return found


def _arrays(tensors: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield one tensor after the other. Tied tensors share memory and are written once per name."""
    for key, tensor in tensors.items():
        raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
        yield key, raw.view(_dtype(tensor)).reshape(tuple(tensor.shape))


def main(argv: list[str] | None = None) -> int:
    """Convert the weights that the command line names. Returns 0, or 2 for a user's mistake."""

    def run(words: list[str]) -> None:
        if any(word.startswith("-") for word in words):
            parse("convert", words, OPTIONS)
        if not 1 <= len(words) <= 2:
            raise UserError("name the pickle or its folder: python -m jaxft.verify.convert PATH")
        convert(*words)

    return processes.command(run, sys.argv[1:] if argv is None else argv)


if __name__ == "__main__":
    sys.exit(main())
