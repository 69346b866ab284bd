"""Runs that do not fit in memory: one line with the keys that need less, and what each needs."""

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax

from jaxft.core import runtime, sharding
from jaxft.core.cli.live import status
from jaxft.core.errors import UserError
from jaxft.core.processes import EXHAUSTED
from jaxft.runs.compiling import Compiled
from jaxft.runs.opening import Run, open_run
from jaxft.runs.planning.estimate import estimate, held

LORA_RANK = 16  # of the adapters that are proposed in place of training everything


@dataclass
class Room:
    """The memory that a step of a run needs on a device, 0 before it is compiled."""

    run: Run
    config: Mapping[str, Any]
    needed: float = 0.0

    def check(self, step: Compiled) -> None:
        """Raise UserError if a compiled step needs more than a device has."""
        self.needed = step.needed
        if step.limit and step.needed > step.limit:
            raise UserError(
                f"a step needs {_gib(step.needed)} of the {_gib(step.limit)} of a device;"
                f" {remedies(self)}"
            )


class Knob(NamedTuple):
    """A changed key that needs less memory. `share` of the memory beside the state remains."""

    flag: str
    changed: Mapping[str, Any]
    share: float = 1.0


@contextmanager
def room_for(run: Run, config: Mapping[str, Any]) -> Iterator[Room]:
    """Yield the record of a step's memory. jax's error of a full memory becomes a UserError.

    Raises UserError if parameters, gradients and moments alone exceed a device, before any load.
    """
    room, limit, size = Room(run, config), runtime.memory_limit(run.mesh), held(run)
    if limit and size > limit:
        raise UserError(
            f"parameters, gradients and moments need {_gib(size)} of the {_gib(limit)} of a device;"
            f" {remedies(room)}"
        )
    try:
        yield room
    except jax.errors.JaxRuntimeError as error:
        if EXHAUSTED not in str(error):
            raise
        line = f"the memory of a device is exhausted; {remedies(room)}"
        raise UserError(line) from None


def remedies(room: Room) -> str:
    """Return the keys that make a step smaller, with the memory that a device needs with each.

    The state is that of a run with the changed key. What a step needs beside it falls with the rows
    and with their length. Only for remat=full a step is compiled. Before the step is compiled, only
    keys with a smaller state are named.
    """
    state, shown = held(room.run), []
    beside = max(0.0, room.needed - state)
    for knob in _knobs(room.run, room.config):
        try:
            run = open_run({**room.config, **knob.changed, "init": "random"})
            size = held(run) + beside * knob.share
            if room.needed and not knob.share:
                size = _compiled_bytes(run) if jax.process_count() == 1 else 0
        except UserError:  # the model does not take the key
            continue
        if room.needed or size < state:
            shown.append(f"{knob.flag} ({_gib(size)})" if size else knob.flag)
    return f"give {', '.join(shown) or 'a smaller model'} or more devices"


def _compiled_bytes(run: Run) -> float:
    """Return the memory of a compiled step, without the line that a compilation prints."""
    status("compiling a smaller step")
    with redirect_stdout(io.StringIO()):
        return estimate(run).memory.total


def _knobs(run: Run, config: Mapping[str, Any]) -> list[Knob]:
    cfg, found = run.cfg, []
    parts = cfg.batch_size // sharding.batch_ways(run.mesh)
    if parts > cfg.micro_batches:
        found.append(_knob("micro_batches", parts, cfg.micro_batches / parts))
    for key, share in (("seq_len", 0.5), ("resolution", 0.25)):
        if config.get(key, 0) > 1:
            found.append(_knob(key, config[key] // 2, share))
    if "lora" in config and not cfg.lora.rank:
        lora = {**config["lora"], "rank": LORA_RANK}
        found.append(Knob(f"--config.lora.rank={LORA_RANK}", {"lora": lora}))
    elif cfg.optim.name == "adamw":
        optim = {**config["optim"], "name": "adamw_8bit"}
        found.append(Knob("--config.optim.name=adamw_8bit", {"optim": optim}))
    if cfg.remat != "full" and cfg.task != "autoencoder":  # which has no such blocks
        found.append(_knob("remat", "full", 0.0))
    return found


def _knob(key: str, value: Any, share: float) -> Knob:
    return Knob(f"--config.{key}={value}", {key: value}, share)


def _gib(size: float) -> str:
    return f"{size / 2**30:.2f} GiB"
