"""A task is a composition of five small things: Opened, Rows, Objective, Preview and writers.

A command opens a model without its data, and reads only the rows that it needs. This module does
not depend on devices, optimisers or checkpoints.
"""

from __future__ import annotations  # the names below are needed in annotations alone

from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

from jaxft.core.errors import UserError
from jaxft.tasks.autoencoder.options import AutoencoderOptions
from jaxft.tasks.diffusion.options import DiffusionOptions
from jaxft.tasks.image_tokens.options import ImageTokenOptions
from jaxft.tasks.llm.options import LLMOptions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
    from pathlib import Path

    import jax
    import numpy as np
    from flax import nnx
    from jax.sharding import Mesh

    from jaxft.core.configs.schema import Config
    from jaxft.core.params import Leaf, Params
    from jaxft.core.step import Batch, Metrics
    from jaxft.data.sources.images.records import Bad
    from jaxft.weights.transfer import Part

TASKS = {
    "llm": "jaxft.tasks.llm.task:LLM",
    "autoencoder": "jaxft.tasks.autoencoder.task:AUTOENCODER",
    "diffusion": "jaxft.tasks.diffusion.task:DIFFUSION",
    "image_tokens": "jaxft.tasks.image_tokens.task:IMAGE_TOKENS",
}

NOW = "now"  # the column of a sheet with what the model makes

OPTIONS = {  # the dataclass of the keys that only one task has
    "llm": LLMOptions,
    "autoencoder": AutoencoderOptions,
    "diffusion": DiffusionOptions,
    "image_tokens": ImageTokenOptions,
}


class Opened(Protocol):
    """Shapes and weight tables of a model's folder. Holds no weights and no data."""

    cfg: Config  # as given, or with values that the model's folder decides (an adapter's own rank)
    parts: tuple[Part, ...]  # weight tables, to load parameters from and to export them to
    template: nnx.Module  # abstract: shapes, no memory

    def build(self, key: jax.Array) -> nnx.Module:
        """Return all modules of a step with random parameters, frozen ones and adapters too."""
        ...

    def initial(self, wanted: Collection[str]) -> dict[str, np.ndarray]:
        """Return arrays by path that replace random parameters, such as an imported adapter.

        What is not in `wanted` is not used.
        """
        ...

    def describe(self) -> str:
        """Return a short description of the model."""
        ...


class Rows(Protocol):
    """Examples of a split, without parameters."""

    bad: tuple[Bad, ...]  # samples left out

    def __len__(self) -> int: ...

    def batches(self, start_step: int, rows: slice) -> Iterator[dict[str, np.ndarray]]:
        """Yield this host's `rows` of every batch, from a global step on, without an end.

        Batch k depends on (seed, k) alone.
        """
        ...

    def spec(self, rows: slice) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
        """Yield the shapes of this host's batch, once for every kind of batch in training."""
        ...

    def report(self) -> dict[str, Any]:
        """Return counts of the data for the manifest, and facts that later commands need."""
        ...

    def describe(self) -> str:
        """Return a short description of the data."""
        ...


class Objective(Protocol):
    """The loss of a step and the units by which its throughput is counted."""

    unit: ClassVar[str]  # "tokens", "images"

    @property
    def unread(self) -> tuple[str, ...]:
        """Beginnings of the paths of frozen parameters that `loss` does not read.

        They are not on the device while steps run.
        """
        ...

    def loss(
        self, model: Any, batch: Batch, keys: jax.Array, step: jax.Array
    ) -> tuple[tuple[jax.Array, jax.Array], Metrics]:
        """Return ((sum, weight), metrics): the unreduced loss, and further sums to report."""
        ...

    def units(self, batch: Mapping[str, np.ndarray]) -> int:
        """Return the number of units in this host's batch."""
        ...

    def flops(self, trained: Mapping[str, Leaf]) -> float:
        """Return the model FLOPs of a training step per unit, given the parameters that train.

        Recomputation is not counted.
        """
        ...


class Unread(NamedTuple):
    """Beginnings of the paths of frozen parameters that a preview does not read."""

    evaluate: tuple[str, ...] = ()
    sample: tuple[str, ...] = ()


class Preview(Protocol):
    """Evaluation and samples of a model."""

    @property
    def unread(self) -> Unread:
        """Parameters that `evaluate` and `sample` do without. They are not loaded for them."""
        ...

    def evaluate(self, params: Params, mesh: Mesh) -> Report:
        """Return metrics over the evaluation set. Without such a set there are none."""
        ...

    def sample(self, params: Params) -> Look:
        """Return samples for the prompts of the config, or of the data."""
        ...

    def complete(self, params: Params, prompts: list[str], request: Request) -> list[Look]:
        """Return one sample for each prompt."""
        ...


@dataclass(frozen=True)
class Planned:
    """Rows for a plan, of the size that the config names: shapes without examples.

    shapes: of the batch of all hosts. width: the longest part that varies (trained tokens, a
    prompt). per_row: the number of examples in a row. empty_ids: int32 [E, T], in place of the
    empty caption. empty_text: its embedding, where a cache has it. unread: as in `Objective`.
    """

    shapes: Mapping[str, jax.ShapeDtypeStruct]
    width: int = 0
    per_row: int = 1
    empty_ids: Any = None
    empty_text: Any = None
    unread: tuple[str, ...] = ()

    def __len__(self) -> int:
        """Return a number of examples for durations in epochs. The compiled step is the same."""
        return 2**20


class Data(NamedTuple):
    """Rows that a command reads, and facts about the rows that the run trained on.

    `facts` is `Rows.report` of the training rows. A command that does not read these rows takes it
    from manifest.json.
    """

    train: Any = None
    held_out: Any = None
    facts: Mapping[str, Any] = {}


class Sheet(NamedTuple):
    """A few examples: a caption for each, and pictures uint8 (n, Y, X, 3) by column.

    The column NOW holds what the model makes. A run adds a column of what it made before step 0.
    """

    captions: tuple[str, ...]
    columns: Mapping[str, np.ndarray]


class Report(NamedTuple):
    """An evaluation: named numbers, a few rows of text under headers, pictures and sheets.

    predictions: a record for each example, for a file.
    """

    metrics: dict[str, float]
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()
    pictures: Mapping[str, np.ndarray] = {}
    predictions: tuple[Mapping[str, Any], ...] = ()
    sheets: Mapping[str, Sheet] = {}


class Look(NamedTuple):
    """A sample: a text, pictures uint8 (Y, X, 3) and sheets by name, and rows under headers.

    The last column of `rows` is what the model makes.
    """

    text: str = ""
    pictures: Mapping[str, np.ndarray] = {}
    sheets: Mapping[str, Sheet] = {}
    headers: tuple[str, ...] = ()
    rows: tuple[tuple[str, ...], ...] = ()


class Request(NamedTuple):
    """Settings of `Preview.complete`.

    None stands for the value in the config. size: height and width of pictures. raw: continue the
    prompt as it is, without the template or the chat format of the run. A model ignores the
    settings that it does not use.
    """

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
    negative: str | None = None
    size: tuple[int, int] | None = None
    raw: bool = False


class Job(NamedTuple):
    """An export to write: an opened model with its parameters, a name, a dtype, a folder."""

    opened: Any
    leaves: Mapping[str, Leaf]
    chosen: set[str]
    params: Mapping[str, jax.Array]
    name: str
    dtype: str
    folder: Path


class Writer(NamedTuple):
    """An export kind. Only kinds that export a part of the model set the other fields.

    needs: the config key that the export requires. made_of: the role of a parameter that this key
    adds to the model. holds: the roles of all trained parameters that the export can store.
    """

    write: Callable[[Job], None]
    needs: str = ""
    made_of: str = ""
    holds: tuple[str, ...] = ()


class Task(NamedTuple):
    """One family of models on one kind of data.

    `read(opened, spec, training)` returns Rows. `plan(opened)` returns their shapes, without
    data. `objective` takes either. `encode(opened, chosen, sets, load)` fills caches. Call it
    before the first example of a set is read. `load(paths)` returns these parameters as they were
    before step 0. `encode` returns those that a step reads as well, so that they are loaded once.
    `writers` maps each export kind to its writer, the whole model first.
    """

    open: Callable[[Config], Any]
    read: Callable[[Any, str, bool], Any]
    plan: Callable[[Any], Planned]
    encode: Callable[[Any, set[str], Sequence[Any], Callable[[set[str]], Params]], Params]
    objective: Callable[[Any, Any], Objective]
    preview: Callable[[Any, Data], Preview]
    writers: Mapping[str, Writer]


def check_task(name: Any) -> None:
    """Raise UserError for an unknown task, without importing any."""
    if name not in TASKS:
        raise UserError(f"config key task={name!r} is not known; it is one of {', '.join(TASKS)}")


def get_task(name: str) -> Task:
    """Return a task by its name. Imports this task alone.

    Raises UserError for an unknown task.
    """
    check_task(name)
    module, _, attribute = TASKS[name].partition(":")
    return getattr(import_module(module), attribute)
