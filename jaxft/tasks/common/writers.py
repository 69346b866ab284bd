"""Export writers that several tasks share: a Hugging Face folder and a PEFT adapter."""

import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path, PurePath
from typing import Any

import jax
import numpy as np

from jaxft.core import runtime
from jaxft.core.errors import UserError
from jaxft.core.guards.inside import is_inside
from jaxft.core.params import ADAPTER_ROLE, NEW_TOKEN_ROLE
from jaxft.nn import lora
from jaxft.tasks import Job, Writer
from jaxft.weights import transfer
from jaxft.weights.adapters import peft, ranks
from jaxft.weights.files.tensor_files import STEMS, write_sharded
from jaxft.weights.transfer import Part

SideFiles = Mapping[str, Path | bytes]  # by name: a file to copy, or content
SHARD_BYTES = {STEMS[0]: 5 * 10**9, STEMS[1]: 10**10}  # where transformers and diffusers split


def adapter(write: Callable[[Job], None]) -> Writer:
    """Return the export kind of an adapter."""
    return Writer(write, "lora.rank > 0", ADAPTER_ROLE, (ADAPTER_ROLE, NEW_TOKEN_ROLE))


def parts(job: Job) -> list[Part]:
    """Return the parts of a model that an export holds: all but auxiliary networks."""
    return [part for part in job.opened.parts if not part.aid]


def stated_dtype(job: Job) -> str | None:
    """Return the dtype in an export's configs. None keeps the dtype of each tensor."""
    return None if job.dtype == "source" else job.dtype


def write_folder(job: Job, side_files: Callable[[Job, set[str]], SideFiles]) -> None:
    """Write the model as a Hugging Face folder, with adapters merged into it.

    `side_files(job, rewritten)` returns all other files: those beside the weights, and the weights
    of the parts whose prefix is not in `rewritten`.
    """
    touched = set()
    for part in parts(job):
        inside = (path for path in job.chosen if path.startswith(part.prefix))
        trained = any(job.leaves[path].role != NEW_TOKEN_ROLE for path in inside)
        if trained or part.tensors is None or job.dtype != "source" or not part.prefix:
            touched.add(part.prefix)
    files = side_files(job, touched)
    for part in parts(job):
        # A part that is read in another layout has no weights among the files to copy.
        beside = [p for p in map(PurePath, files) if p.parent == PurePath(part.folder)]
        if part.prefix in touched or not any(p.suffix == ".safetensors" for p in beside):
            made, folder = merged(job, part), job.folder / part.folder
            folder.mkdir(exist_ok=True)
            write_sharded(folder, made.tensors, made.infos, SHARD_BYTES[part.stem], part.stem)
    copy(files, job.folder)


def merged(job: Job, part: Part) -> transfer.Export:
    """Return the tensors of a part with its trained parameters, adapters merged."""
    whole = part.tensors is None
    np_dtype = None if job.dtype == "source" else np.dtype(runtime.resolve_dtype(job.dtype))
    trained = {p: job.params[p] for p in job.leaves if whole or p in job.chosen}
    return transfer.export(part, job.leaves, trained, _changes(job, part), np_dtype)


def _changes(job: Job, part: Part) -> dict[str, Callable[[int, np.ndarray], np.ndarray]]:
    """Return functions that merge an adapter into one layer of a parameter, by its path."""
    cfg = job.opened.cfg.lora
    changes: dict[str, Callable[[int, np.ndarray], np.ndarray]] = {}
    for path in lora.adapted(job.leaves):
        names = {x: f"{path}.lora_{x}" for x in "abkm"}
        factors = {x: transfer.to_host(job.params[y]) for x, y in names.items() if y in job.leaves}
        stacked = job.leaves[f"{path}.kernel"].stacked
        scales = ranks.scales(cfg, path, len(factors["a"]) if stacked else 0)
        changes[f"{path}.kernel"] = partial(_merged_layer, factors, scales, stacked)
    for path in job.leaves if part.rows else ():
        if path.endswith(peft.TOKENS):
            rows = transfer.to_host(job.params[path])
            changes[path.replace(peft.TOKENS, peft.TABLE_END)] = partial(
                _with_rows, part.rows, rows
            )
    return changes


def _with_rows(ids: tuple[int, ...], rows: np.ndarray, _: int, table: np.ndarray) -> np.ndarray:
    made = table.copy()
    made[list(ids)] = rows
    return made


def _merged_layer(
    factors: Mapping[str, np.ndarray],
    scales: list[float],
    stacked: bool,
    i: int,
    kernel: np.ndarray,
) -> np.ndarray:
    own = {name: one[i] if stacked else one for name, one in factors.items()}
    a, b = own["a"], own["b"]
    if "k" in own:
        a, b = lora.expanded(a, b, own["k"])
    return lora.merged(kernel, a, b, own.get("m"), scales[i if stacked else 0])


def write_adapter(job: Job, files: SideFiles, kind: str = "CAUSAL_LM") -> None:
    """Write the adapters as a PEFT folder, and `files` beside them without the model's configs.

    kind: PEFT's task_type.
    """
    for part in parts(job):
        cfg = job.opened.cfg.lora
        peft.write(job.folder, part, job.leaves, adapters(job), cfg, part.name, kind)
    base = ("config.json", "generation_config.json")
    copy({name: content for name, content in files.items() if name not in base}, job.folder)


def adapters(job: Job) -> dict[str, np.ndarray]:
    """Return the adapters and the parameters trained beside them, by path."""
    paths = [path for path, leaf in job.leaves.items() if leaf.added or path in job.chosen]
    return {path: transfer.to_host(job.params[path]) for path in paths}


def copy(files: SideFiles, folder: Path) -> None:
    """Write files into a folder. Only the first process writes.

    Raises: UserError for a name that leads out of the folder.
    """
    if jax.process_index():
        return
    for name, content in files.items():
        if not is_inside(folder, name):
            raise UserError(f"an export has no file {name!r}; expected names inside its folder")
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            target.write_bytes(content)
        else:
            shutil.copyfile(content, target)


def dump(config: Mapping[str, Any]) -> bytes:
    """Return a config as the bytes of its JSON file."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
