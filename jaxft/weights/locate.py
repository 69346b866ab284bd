"""The folder of a diffusers model: a path, an installed package, a demo of jaxft, or a hub id."""

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath

import huggingface_hub

from jaxft.core.errors import UserError
from jaxft.demo import demo_path
from jaxft.weights.files.tensor_files import STEMS
from jaxft.weights.folders.transformers import SIDE_FILES, not_given
from jaxft.weights.packages import package_folders

INDEX = "model_index.json"
VARIANTS = ("", "fp16", "bf16", "fp32")  # of a weight file's name: the first that exists is read


def locate(spec: str, file: str, weights: bool) -> Path:
    """Return the folder that `spec` names.

    `spec` is a path, `pip:PACKAGE`, `demo:NAME` or a hub id org/name, which may name a subfolder.
    `file` (such as model_index.json) is the file that the folder should hold. weights=False
    downloads no weights.
    Raises: UserError where there is no such folder.
    """
    if spec.startswith("pip:"):
        return _in_package(spec.removeprefix("pip:"), file)
    if (demo := demo_path(spec, "model")) is not None:
        return demo
    path = Path(spec).expanduser()
    if path.is_dir():
        return path
    hub = re.fullmatch(r"([\w.-]+/[\w.-]+)((?:/[\w.-]+)*)", spec)
    if path.exists() or not hub or spec.startswith((".", "~")):
        raise UserError(
            f"model {spec!r}: no such folder; expected a diffusers folder with {file}, pip:PACKAGE "
            "or a hub id org/name"
        )
    return _from_hub(hub[1], hub[2].strip("/"), weights)


def _in_package(package: str, file: str) -> Path:
    """Return the only pipeline, else the only folder with `file`, of a package."""
    roots = package_folders(package)
    for sought in (INDEX, file):
        found = sorted(path.parent for root in roots for path in root.rglob(sought))
        if len(found) == 1:
            return found[0]
    shown = ", ".join(map(str, found)) or "none"
    raise UserError(f"pip:{package}: expected one {file} inside, found {shown}; give its path")


def _from_hub(repo: str, sub: str, weights: bool) -> Path:
    """Download the files that `wanted` lists. Return the cached copy if the hub is out of reach."""
    try:
        names = wanted(huggingface_hub.list_repo_files(repo), sub, weights)
        return Path(huggingface_hub.snapshot_download(repo, allow_patterns=names)) / sub
    except Exception as error:  # the hub client's errors share no base class
        if (cached := _cached(repo)) is not None:
            return cached / sub
        raise not_given(repo, error) from error


def _cached(repo: str) -> Path | None:
    try:
        return Path(huggingface_hub.snapshot_download(repo, local_files_only=True))
    except Exception:  # nothing is cached. The hub client's errors share no base class
        return None


def wanted(names: Sequence[str], sub: str, weights: bool) -> list[str]:
    """Return the files of a repository that a pipeline needs, and one variant of each weight."""
    inside = [PurePosixPath(n) for n in names if not sub or n.startswith(sub + "/")]
    depth = len(PurePosixPath(sub).parts)
    near = [path for path in inside if len(path.parts) - depth in (1, 2)]
    small = [path for path in near if any(fnmatch(path.name, p) for p in SIDE_FILES)]
    bulky = []
    for folder in {path.parent for path in near} if weights else ():
        here = [p for p in near if p.parent == folder and p.suffix == ".safetensors"]
        for infix in VARIANTS:
            dotted, shard = re.escape(f".{infix}" if infix else ""), r"-\d+-of-\d+"
            name = rf"(?:{'|'.join(STEMS)})(?:{dotted}(?:{shard})?|{shard}{dotted})\.safetensors"
            if chosen := [path for path in here if re.fullmatch(name, path.name)]:
                bulky += chosen
                break
    return sorted(map(str, {*small, *bulky}))
