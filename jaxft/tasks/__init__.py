"""A task is a composition of five small things: Opened, Rows, Objective, Preview and writers.

A command opens a model without its data, reads the rows that it needs, and never more. Nothing
here knows devices, optimisers or checkpoints.
"""

from __future__ import annotations  # the names below are needed in annotations alone

from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from jaxft.core.errors import UserError
from jaxft.tasks.autoencoder.options import AutoencoderOptions
from jaxft.tasks.diffusion.options import DiffusionOptions
from jaxft.tasks.image_tokens.options import ImageTokenOptions
from jaxft.tasks.llm.options import LLMOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from pathlib import Path

    import jax
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh

    from jaxft.core.config import Config
    from jaxft.core.params import Leaf, Params
    from jaxft.core.step import Batch, Metrics
    from jaxft.data.sources.image_records import Bad
    from jaxft.weights.transfer import Part

TASKS = {
    "llm": "jaxft.tasks.llm.task:LLM",
    "autoencoder": "jaxft.tasks.autoencoder.task:AUTOENCODER",
    "diffusion": "jaxft.tasks.diffusion.task:DIFFUSION",
    "image_tokens": "jaxft.tasks.image_tokens.task:IMAGE_TOKENS",
}

OPTIONS = {  # the dataclass of the keys that only one task has
    "llm": LLMOptions,
    "autoencoder": AutoencoderOptions,
    "diffusion": DiffusionOptions,
    "image_tokens": ImageTokenOptions,
}


class Opened(Protocol):
    """A model's folder, read: shapes and weight tables. It holds no weights and no data."""

    cfg: Config  # as given, or with values that the model's folder decides (an adapter's own rank)
    parts: tuple[Part, ...]  # weight tables, to load parameters from and to export them to
    template: nnx.Module  # abstract: shapes, no memory

    def build(self, key: jax.Array) -> nnx.Module:
        """Draw all modules of a step, frozen ones and adapters too."""
        ...

    def initial(self) -> dict[str, np.ndarray]:
        """Return arrays by path that replace drawn ones (an imported adapter)."""
        ...

    def describe(self) -> str:
        """Return a few words on the model."""
        ...


class Rows(Protocol):
    """The examples of a split, without parameters."""

    bad: tuple[Bad, ...]  # samples that were left out

    def __len__(self) -> int: ...

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        """Yield this host's `rows` of every batch from a global step on, without an end.

        Batch k depends on (seed, k) alone.
        """
        ...

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        """Yield the shapes of a batch of every kind that training can meet, on this host."""
        ...

    def report(self) -> dict[str, Any]:
        """Return counts of the data for the manifest, and facts that later commands need."""
        ...

    def describe(self) -> str:
        """Return a few words on the data."""
        ...


class Objective(Protocol):
    """The loss of a step and the units by which its throughput is counted."""

    unit: ClassVar[str]  # "tokens", "images"

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return an unreduced sum with its weight, and further sums to report."""
        ...

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        """Return the number of units in this host's batch."""
        ...

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        """Return the model FLOPs of a training step a unit, by the parameters that train.

        Recomputation is not counted.
        """
        ...


class Preview(Protocol):
    """Evaluation and samples of a model as it is."""

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Return metrics over the whole evaluation set; empty where there is none."""
        ...

    def sample(self, params: Params) -> Look:
        """Return samples for the prompts of the config, or of the data."""
        ...

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        """Return one sample for each prompt."""
        ...


class Data(NamedTuple):
    """The rows that a command reads, and what a training run wrote down about its own.

    `facts` is `Rows.report` of the training rows, from manifest.json where these are not read.
    """

    train: Any = None
    held_out: Any = None
    facts: Mapping[str, Any] = {}


class Report(NamedTuple):
    """An evaluation: named numbers, a few rows of text under headers, and pictures."""

    metrics: dict[str, float]
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: Mapping[str, np.ndarray] = {}


class Look(NamedTuple):
    """A sample: a text, and pictures uint8 (Y, X, 3) by name."""

    text: str = ""
    pictures: Mapping[str, np.ndarray] = {}


class Request(NamedTuple):
    """Settings of `Preview.complete`; None is the config's own, and unused ones are ignored."""

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


class Job(NamedTuple):
    """An export under way: an opened model with its parameters, a name, a dtype, a folder."""

    opened: Any
    leaves: Mapping[str, Leaf]
    chosen: set[str]
    params: Mapping[str, jax.Array]
    name: str
    dtype: str
    folder: Path


class Writer(NamedTuple):
    """An export kind. The other fields are of kinds that hold a part of the model alone.

    needs: the config key that such an export cannot do without. made_of: the role of a parameter
    that the model then has. holds: the roles of all trained parameters that there is room for.
    """

    write: Callable[[Job], None]
    needs: str = ""
    made_of: str = ""
    holds: tuple[str, ...] = ()


class Task(NamedTuple):
    """One family of models on one kind of data.

    `read(opened, spec, training)` makes Rows. `encode(opened, params, chosen, sets)` fills caches
    and has to be called before the first example of a set is read. `writers` is by export kind,
    the whole model first.
    """

    open: Callable[[Config], Any]
    read: Callable[[Any, str, bool], Any]
    encode: Callable[[Any, Params, set[str], Sequence[Any]], None]
    objective: Callable[[Any, Any], Objective]
    preview: Callable[[Any, Data], Preview]
    writers: Mapping[str, Writer]


def check_task(name: Any) -> None:
    """Raise UserError for an unknown task, without importing any."""
    if name not in TASKS:
        raise UserError(f"config key task={name!r} is not known; it is one of {', '.join(TASKS)}")


def get_task(name: str) -> Task:
    """Return a task by its name, importing that one alone."""
    check_task(name)
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)
