"""Folder of a run: the claim by one config, and that config on disk."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxft.core.config import MAPPING, flatten_config, resolve_config
from jaxft.core.errors import UNWRITABLE, UserError
from jaxft.core.guards.lock import LOCK

ROWS = "rows"  # in a run folder: the examples that `jaxft.finetune` was given


def make_workdir(workdir: Path) -> None:
    """Make the folder of a run. Raises UserError if it cannot be written."""
    if workdir.is_file():
        raise UserError(f"--workdir={workdir} is a file; give a folder, which need not exist")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"workdir {workdir} cannot be written ({error}); choose another --workdir",
            UNWRITABLE,
        ) from None


def claim_workdir(
    workdir: Path, config: Mapping[str, Any], options: Mapping[str, type] = MAPPING
) -> None:
    """Make the folder, refuse one where another config ran, and write this config to it.

    `options` maps a task's name to the dataclass of its own keys. A longer `total` continues the
    run of the folder. Raises UserError for a folder that cannot be written, or that belongs to
    another config. A folder with nothing but a config.json and no checkpoint (its run failed
    early, such as by a wrong model path) belongs to none.
    """
    make_workdir(workdir)
    file = workdir / "config.json"
    _refuse_foreign(file)
    if file.exists() and any(map(_is_of_a_run, workdir.iterdir())):
        old = read_config_file(workdir, options)
        _check_differing(workdir, old, config)
        if old == config:
            return
    aside = file.with_name(f"{file.name}.tmp")  # a killed write must not cut the config of a run
    aside.write_text(json.dumps(config, indent=2) + "\n")
    os.replace(aside, file)


def _is_of_a_run(entry: Path) -> bool:
    """Return True for an entry of a run folder that a run leaves which got as far as its data."""
    if entry.name == "checkpoints" and entry.is_dir():
        return any(entry.iterdir())
    return entry.name not in ("config.json", LOCK, ROWS)


def _check_differing(workdir: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise UserError for a config that differs from that of its folder, but by a longer total.

    The lengths are compared before data are read, so both have to be in the same unit.
    """
    differing = differing_keys(old, new)
    if not differing:
        return
    (count, unit), (more, other) = (
        str(config["total"]).partition("_")[::2] for config in (old, new)
    )
    if differing[1:] or old["total"] == new["total"]:
        raise UserError(
            f"workdir {workdir} belongs to another config ({'; '.join(differing)});"
            " choose another --workdir, or give the same keys to resume"
        )
    if unit != other or int(more) < int(count):
        raise UserError(
            f"workdir {workdir} has total={old['total']}, and total={new['total']} is not longer"
            f" in {unit}; give --config.total=N_{unit} with N above {count}, or another --workdir"
        )


def _refuse_foreign(file: Path) -> None:
    """Raise UserError for the config.json of a model, which the run's own would replace.

    A file that is no JSON was cut when its run was killed.
    """
    try:
        content = json.loads(file.read_bytes())
    except (OSError, ValueError):
        return
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{file} is not the config of a run; choose another --workdir")


def read_config_file(workdir: Path, options: Mapping[str, type] = MAPPING) -> dict[str, Any]:
    """Return the resolved config of a run folder. Keys newer than the folder get their defaults.

    Raises UserError for a folder without config.json, or with one that is no JSON object.
    """
    file = workdir / "config.json"
    try:
        content = json.loads(file.read_text())
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{workdir} is not a run folder: it has no config.json") from None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must be a JSON object of config keys; choose another --workdir")
    return resolve_config(content, (), options)


def differing_keys(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return `key: old -> new` for every leaf that differs between two configs."""
    a, b = flatten_config(old), flatten_config(new)
    gone = object()
    return [
        f"{key}: {a.get(key, 'absent')!r} -> {b.get(key, 'absent')!r}"
        for key in sorted(a.keys() | b.keys())
        if json.dumps(a.get(key, gone), default=str) != json.dumps(b.get(key, gone), default=str)
    ]
