"""Agreement of the processes of a run: an error of one is raised in all, before they would hang."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax.experimental.multihost_utils import process_allgather

from jaxft.core import processes
from jaxft.core.errors import UserError


@contextmanager
def agreement() -> Iterator[None]:
    """Raise a UserError of one process in all processes, as soon as each has left the block.

    The block must not communicate, because a process that has failed would be missing there.
    With one process, this changes nothing.
    """
    if not processes.joined():
        yield
        return
    mine = ""
    try:
        yield
    except UserError as error:
        mine = str(error)
    for place, text in enumerate(gather(mine)):
        if text:
            raise UserError(f"process {place}: {text}")


def check_same(facts: Mapping[str, Any]) -> None:
    """Raise UserError in all processes if a fact of one differs from that of process 0.

    A process with another number of steps would wait for the others for ever.
    """
    if not processes.joined():
        return
    first, *rest = (text.split("\n") for text in gather("\n".join(map(str, facts.values()))))
    for place, other in enumerate(rest, 1):
        pairs = zip(facts, first, other, strict=True)
        if differing := [f"{name}: {a} -> {b}" for name, a, b in pairs if a != b]:
            raise UserError(
                f"process {place} differs from process 0 ({'; '.join(differing)}); give the same"
                " command on every host, with data and a --workdir on a disk that all hosts share"
            )


def gather(text: str) -> list[str]:
    """Return the text of every process, in their order."""
    if not processes.joined():
        return [text]
    encoded = np.frombuffer(text.encode(), np.uint8)
    sizes = process_allgather(np.asarray([len(encoded)], np.int32)).ravel()
    padded = np.zeros(max(sizes.max(), 1), np.uint8)
    padded[: len(encoded)] = encoded
    rows = process_allgather(padded).reshape(jax.process_count(), -1)
    return [bytes(row[:size]).decode() for row, size in zip(np.asarray(rows), sizes, strict=True)]
