"""Folder of an export: which folder an export may replace, and the exchange of the two."""

import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxft.core.config import flatten_config
from jaxft.core.errors import UserError

MARK = ".jaxft-export"  # a file in every export: this folder may be replaced
PATH_KEYS = (  # config keys whose values are paths, or begin with a scheme before a path
    *("model", "tokenizer", "graft", "perceptual", "distill.teacher", "lora.from"),
    *("data.train", "data.eval", "prior.data", "cache", "chat"),
)
# Files of an export. Exports of versions before the mark are known by them.
_EXPORTED = ("config.json", "model_index.json", "adapter_config.json", "*.safetensors")


def check_output(
    out: Path, workdir: Path, config: Mapping[str, Any], overwrite: bool = False
) -> None:
    """Raise UserError for a folder that an export must not replace.

    An export goes to an absent or empty folder. An earlier export is replaced with `overwrite`, and
    in export/ of its own run always. A folder that is or holds the run, a model or data of the
    config, or the working directory is never replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not out.is_dir():
        raise UserError(f"{out} is no folder; export to a new or an empty folder, with --out")
    place = out.resolve()
    for name, path in _kept(workdir, config):
        if path == place or path.is_relative_to(place):
            raise UserError(
                f"an export to {out} would delete {name} {path}; name a folder outside of it, with"
                " --out"
            )
    if not any(out.iterdir()):
        return
    marked = (out / MARK).is_file()
    if out.absolute() == workdir.absolute() / "export" and not out.is_symlink():
        marked = overwrite = marked or any(any(out.glob(name)) for name in _EXPORTED)
    if not marked:
        raise UserError(
            f"{out} holds files that are no export of jaxft; move them away, or export to a new or"
            " an empty folder, with --out"
        )
    if not overwrite:
        raise UserError(f"{out} is an earlier export; add --overwrite, or name another --out")


def _kept(workdir: Path, config: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """Yield the name and path of everything that an export must not delete.

    A value of the config may be a mixture, `0.7*jsonl:a.jsonl + 0.3*b/*.csv`. Every piece of it is
    taken for a path, because a piece that is none protects nothing.
    """
    yield "the run folder", workdir.resolve()
    yield "the working directory", Path.cwd().resolve()
    leaves = flatten_config(config)
    for key in PATH_KEYS:
        value = str(leaves.get(key) or "")
        for piece in {value, *re.split(r"\s\+\s|[:*?[]", value)} - {""}:
            yield key, Path(piece.strip()).expanduser().resolve()


def begin_output(out: Path) -> Path:
    """Return a new marked folder beside `out` to write an export into.

    Those that a killed export left behind are removed.
    """
    out = out.resolve()
    for stale in out.parent.glob("*.partial-*"):
        if re.fullmatch(re.escape(out.name) + r"\.partial-\d+", stale.name) and _is_ours(stale):
            shutil.rmtree(stale)
    made = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        made.mkdir(parents=True)
        (made / MARK).write_text("Written by jaxft. A later export may replace this folder.\n")
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error}); name another folder") from None
    return made


def finish_output(made: Path, out: Path) -> None:
    """Put a complete folder in the place of `out`. The former folder is deleted last."""
    out = out.resolve()
    former = out.with_name(f"{made.name}0")  # a name that `begin_output` removes too
    if out.exists():
        out.rename(former)
    made.rename(out)
    if former.exists():
        (former / MARK).touch()  # exports of earlier versions have none
        shutil.rmtree(former)


def _is_ours(folder: Path) -> bool:
    return folder.is_dir() and not folder.is_symlink() and (folder / MARK).is_file()
