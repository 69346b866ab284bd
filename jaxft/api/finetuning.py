"""A run from Python: a config with the caller's own rows and loss."""

import html
import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from jaxft.api.rows import write_rows
from jaxft.core import config as configs
from jaxft.core import processes
from jaxft.core.cli.live import live_output
from jaxft.core.errors import UserError
from jaxft.core.guards.watchdog import STALL
from jaxft.tasks import OPTIONS
from jaxft.train import start

Dicts = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Finetuned:
    """The folder of a finished run. A notebook shows its report."""

    workdir: Path

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """Return the records of all steps and evaluations. Those of an evaluation begin eval_."""
        return [json.loads(line) for line in (self.workdir / "metrics.jsonl").open()]

    @property
    def export(self) -> Path:
        """Return the folder that transformers, diffusers or peft load."""
        return self.workdir / "export"

    def load(self, dtype: str = "float32") -> Any:
        """Return the exported model, as `jaxft.load` does. An adapter alone is no model."""
        from jaxft.api.loading import load

        return load(self.export, dtype)

    def _repr_html_(self) -> str:
        page = html.escape((self.workdir / "report.html").read_text())
        return f'<iframe srcdoc="{page}" style="width:100%;height:640px;border:0"></iframe>'


def finetune(
    config: str | Path,
    workdir: str | Path,
    rows: Dicts | None,
    eval_rows: Dicts | None,
    loss: Callable[..., Any] | None,
    keys: Mapping[str, Any],
) -> Finetuned:
    """Train as `jaxft.finetune` says, and return the run."""
    _check(config, workdir, loss, keys)
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    os.environ.setdefault(STALL, "0")  # its end of the process would be that of the notebook
    folder = Path(workdir or f"runs/{Path(config).stem}")
    texts = [(key, value if isinstance(value, list) else str(value)) for key, value in keys.items()]
    resolved = configs.load_config(str(config), texts, OPTIONS)
    begun = (folder / "checkpoints").exists()
    for name, given in (("train", rows), ("eval", eval_rows)):
        if given is None:
            continue
        if processes.launcher():
            raise UserError(
                f"rows of Python are for one process; give data.{name} as a place that all"
                " processes read"
            )
        images = resolved.get("task") != "llm"
        resolved["data"][name] = write_rows(given, folder, name, images, begun)
    with live_output():
        if loss is None:
            start(resolved, folder, interactive=True)
        else:
            from jaxft.objectives.own import OwnLoss, name_of  # it takes jax to import

            resolved["own_loss"] = name_of(loss)
            start(resolved, folder, partial(OwnLoss, function=loss), interactive=True)
    return Finetuned(folder)


def _check(config: object, workdir: object, loss: object, keys: object) -> None:
    """Raise UserError for an argument of another type."""
    for name, value in (("config", config), ("workdir", workdir)):
        if not isinstance(value, str | Path):
            raise UserError(
                f"{name} is a {type(value).__name__}; give a path, such as"
                ' finetune("configs/llm.py", "runs/mine", keys={"optim.lr": 1e-4})'
            )
    if not isinstance(keys, Mapping):
        raise UserError(
            f'keys is a {type(keys).__name__}; give a dict, such as {{"optim.lr": 1e-4}}'
        )
    for key, value in keys.items():
        if isinstance(value, Mapping):
            inner = next(iter(value), "KEY")
            raise UserError(f'keys["{key}"] is a dict; give its keys as "{key}.{inner}"')
    if loss is not None and not callable(loss):
        raise UserError(f"loss is a {type(loss).__name__}; give a function, or leave it out")
