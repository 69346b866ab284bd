"""What a task is: everything family-specific, nothing about devices, optimisers or checkpoints."""

from __future__ import annotations  # what follows is only named in annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from jaxft.core.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    import jax
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh

    from jaxft.core.config import Config
    from jaxft.core.params import Params
    from jaxft.core.step import Batch, Metrics
    from jaxft.data.images.dataset import Bad
    from jaxft.weights.transfer import Part

TASKS = {
    "llm": "jaxft.tasks.llm.task:LLM",
    "autoencoder": "jaxft.tasks.autoencoder.task:Autoencoder",
    "diffusion": "jaxft.tasks.diffusion.task:Diffusion",
    "image_tokens": "jaxft.tasks.image_tokens.task:ImageTokens",
}


class Report(NamedTuple):
    """An evaluation: named numbers, a few rows to look at under their headers, and pictures."""

    metrics: dict[str, float]
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: Mapping[str, np.ndarray] = {}


class Look(NamedTuple):
    """What a model makes: a text, and pictures uint8 (Y, X, 3) by name."""

    text: str = ""
    pictures: Mapping[str, np.ndarray] = {}


class Request(NamedTuple):
    """How to make what is asked for; a task reads what it knows, None is its config's own."""

    seed: int = 0
    max_new: int = 64
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    steps: int | None = None
    guidance: float | None = None
    sampler: str | None = None
    image: str | None = None
    mask: str | None = None
    image_guidance: float | None = None


class Task(Protocol):
    """One family of models on one kind of data."""

    Options: type  # frozen dataclass of the keys that only this task knows
    EXPORT_KINDS: tuple[str, ...]  # what `export.kind` can be, "none" too
    unit: str  # what throughput counts: "tokens", "images"
    cfg: Config  # as given, or with what the model's folder decides (an adapter's own rank)
    parts: tuple[Part, ...]  # where the parameters come from and go to
    template: nnx.Module  # abstract: shapes, no memory

    def build(self, key: jax.Array) -> nnx.Module:
        """All modules that the step touches, frozen ones and adapters too."""
        ...

    def initial(self) -> dict[str, np.ndarray]:
        """Arrays by path that replace what `build` would draw (an imported adapter)."""
        ...

    def describe(self) -> str:
        """One line on the model and the data."""
        ...

    def data_report(self) -> dict[str, int]:
        """Counts of the training data: records, rows, what was cut or dropped."""
        ...

    def bad_samples(self) -> tuple[Bad, ...]:
        """What was left out of the data, training and held-out."""
        ...

    def n_examples(self) -> int:
        """The size of the training set, for durations in epochs."""
        ...

    def prepare(self, params: Params, trained: set[str]) -> None:
        """What is made once before the first batch (caches), by the parameters as they start."""
        ...

    def train_batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        """Host batches from a global step on; batch k depends on (seed, k) alone."""
        ...

    def shapes(self, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        """One batch of every shape that training will meet, so that all compile before step 0."""
        ...

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """An unreduced sum and its weight, and further sums to report."""
        ...

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Metrics over the whole evaluation set."""
        ...

    def sample(self, params: Params) -> Look:
        """A look at what the model makes now."""
        ...

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        """What the model makes of each prompt."""
        ...

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        """How many of `unit` this host's batch holds."""
        ...

    def flops_per_unit(self, chosen: set[str]) -> float:
        """Model FLOPs of a training step a unit, given what trains (never rematerialisation)."""
        ...

    def exported(self, params: Params) -> Params:
        """The parameters as an export writes them; most tasks' are what they are."""
        ...

    def side_files(self, dtype: str | None, rewritten: set[str]) -> dict[str, Path | bytes]:
        """Everything that an export holds beside the weights of the parts that it rewrites.

        `rewritten` are those parts' prefixes; `dtype` is None where each tensor keeps its own.
        """
        ...


def check_task(name: Any) -> None:
    """Raise UserError for a task that there is not, without importing any."""
    if name not in TASKS:
        raise UserError(f"config key task={name!r} is not known; it is one of {', '.join(TASKS)}")


def task_class(name: str) -> Any:
    """The class of a task, imported only when it is asked for."""
    check_task(name)
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)
