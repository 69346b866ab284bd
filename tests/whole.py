"""A run with everything that its task composes, for tests that look inside of it."""

from functools import cached_property

import numpy as np

from jaxft.core.sharding import local_rows
from jaxft.runs import compiling, opening, restoring, state
from jaxft.runs.compiling import Compiled
from jaxft.runs.opening import load_params
from jaxft.runs.state import abstract_state, fresh_state, model_params, start_state
from jaxft.tasks import Data

__all__ = [
    "Compiled",
    "Whole",
    "abstract_state",
    "fresh_state",
    "load_params",
    "make_plan",
    "make_step",
    "model_params",
    "open_run",
    "restore_run",
    "start_state",
]


class Whole:
    """The fields of a `Run`, its rows, objective and preview."""

    def __init__(self, run):
        self.__dict__.update(run._asdict())
        self.trained_leaves, self.copies = run.trained_leaves, run.copies
        self.train, self.held_out, _ = opening.read_data(run)

    @cached_property
    def objective(self):
        return self.task.objective(self.opened, self.train)

    @cached_property
    def preview(self):
        """Of rows as they are: `encode` comes first where they need it."""
        data = Data(self.train, self.held_out, self.train.report())
        return self.task.preview(self.opened, data)

    def encode(self, params, chosen=frozenset()):
        sets = [rows for rows in (self.train, self.held_out) if rows is not None]
        load = lambda paths: {path: params[path] for path in paths}  # noqa: E731
        self.task.encode(self.opened, set(chosen), sets, load)

    def batches(self, start=0):
        """Host batches of this process from a step on."""
        return self.train.batches(start, local_rows(self.mesh, self.cfg.batch_size))

    def shapes(self, rows):
        """One real batch of every shape that `spec` foretells, held to it."""
        specs, found = list(self.train.spec(rows)), {}
        for batch in self.train.batches(0, rows):
            found.setdefault(shape_of(batch), batch)
            if len(found) == len(specs):
                break
        assert found.keys() == {shape_of(spec) for spec in specs}
        return [found[shape_of(spec)] for spec in specs]

    def describe(self):
        return f"{self.opened.describe()}; {self.train.describe()}"


def shape_of(batch):
    return tuple((name, x.shape, np.dtype(x.dtype).name) for name, x in sorted(batch.items()))


def open_run(config):
    return Whole(opening.open_run(config))


def restore_run(workdir, at, overrides=()):
    run, params, step = restoring.restore_run(workdir, at, overrides)
    return Whole(run), params, step


def make_plan(run):
    return state.make_plan(run, len(run.train))


def make_step(run, plan):
    return compiling.make_step(run, plan, run.objective)
