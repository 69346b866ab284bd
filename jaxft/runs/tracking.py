"""Services that keep the numbers of a run beside its folder: Weights & Biases, trackio, MLflow.

Each is reached through its own client, whose environment variables and logins hold. The run is
kept under one name over all starts.
"""

import json
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
from jaxtyping import UInt8

from jaxft.core.config import flatten_config
from jaxft.core.metrics import Tracker

PROJECT = "jaxft"  # where `track` names none
TRACKED = "track.json"  # in a run folder: the id of the run at the service


def open_tracker(track: str, workdir: Path) -> Tracker | None:
    """Return the service that `track` names, or None, for the run of a folder.

    A service that fails is left, with a line.
    """
    name, _, project = track.partition(":")
    if name == "none":
        return None
    config = json.loads((workdir / "config.json").read_text())
    file = workdir / TRACKED
    ids = json.loads(file.read_text()) if file.is_file() else {}
    makers = {"wandb": _Wandb, "trackio": _Trackio, "mlflow": _MLflow}
    guard = _Guarded(name)
    guard.do(lambda: makers[name](project or PROJECT, workdir, config, ids.get(name, "")))
    if isinstance(opened := guard.made, _Wandb | _Trackio | _MLflow):
        file.write_text(json.dumps({**ids, name: opened.id}) + "\n")
        guard.inner = opened
    return guard


class _Guarded:
    """A tracker whose errors end the tracking, not the training."""

    def __init__(self, name: str):
        self.name = name
        self.inner: Any = None
        self.made: Any = None

    def do(self, action: Callable[[], Any]) -> None:
        try:
            self.made = action()
        except Exception as error:  # of a network, an account, or the client itself
            reason = next(iter(str(error).splitlines()), type(error).__name__)
            print(f"{self.name} gets no more of this run: {reason}", flush=True)
            self.inner = None

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if self.inner:
            self.do(lambda: self.inner.scalars(step, values))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> None:
        if self.inner:
            self.do(lambda: self.inner.image(step, name, image))

    def close(self) -> None:
        if self.inner:
            self.do(self.inner.close)


class _Wandb:
    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any], known: str):
        self._client, self.id = import_module("wandb"), known or uuid4().hex
        self._run = self._client.init(
            project=project, name=workdir.name, id=self.id, resume="allow", dir=str(workdir),
            config=dict(config),
        )  # fmt: skip

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> None:
        self._run.log({name: self._client.Image(image)}, step=step)

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any], known: str):
        self._client = import_module("trackio")
        self.id = known or f"{workdir.name}-{uuid4().hex[:6]}"
        keys = flatten_config(config)
        self._client.init(project=project, name=self.id, resume="allow", config=keys)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._client.log(dict(values), step=step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> None:
        self._client.log({name: self._client.Image(image)}, step=step)

    def close(self) -> None:
        self._client.finish()


class _MLflow:
    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any], known: str):
        self._client = import_module("mlflow").MlflowClient()
        found = self._client.get_experiment_by_name(project)
        place = found.experiment_id if found else self._client.create_experiment(project)
        self.id = known or self._client.create_run(place, run_name=workdir.name).info.run_id
        if not known:
            for key, value in flatten_config(config).items():
                self._client.log_param(self.id, key, value)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._client.log_metric(self.id, name, value, step=step)

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W C"]) -> None:
        self._client.log_image(self.id, image, key=name, step=step)

    def close(self) -> None:
        self._client.set_terminated(self.id)
