"""Faults on purpose, for tests of what a run survives. Nothing happens without JAXFT_FAULT."""

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError

FAULTS = "JAXFT_FAULT"  # the variable: faults divided by commas, each KIND@[rankN:]PLACE[:NUMBER]
_FORM = re.compile(
    r"(?P<kind>kill|stall|enospc|flip|nan)@(?:rank(?P<rank>\d+):)?"
    r"(?P<place>step|save|restore|export|ckpt)(?::?(?P<number>\d+))?"
)
_PLACES = {"enospc": ("save",), "flip": ("ckpt",), "nan": ("step",)}  # of the other kinds: any
_WRITTEN = "ckpt"  # the place where a save is complete on the disk


class Fault(NamedTuple):
    """A fault: `kind` at the `number`-th `place`, in the process `rank` or, if it is "", in all.

    Steps are counted over the whole run, and saves, restores and exports within one start of it.
    """

    kind: str
    place: str
    number: int
    rank: str


def planned_faults() -> list[Fault]:
    """Return the faults that the environment names. Raises: UserError for an unknown one."""
    found = []
    for text in filter(None, os.environ.get(FAULTS, "").split(",")):
        match = _FORM.fullmatch(text)
        kind, place = (match["kind"], match["place"]) if match else ("", "")
        if match is None or place not in _PLACES.get(kind, ("step", "save", "restore", "export")):
            raise UserError(
                f"{FAULTS}={text!r}: expected such as kill@step:37, kill@save:2, enospc@save:1,"
                " stall@rank1:step5, flip@ckpt or nan@step:9"
            )
        place = _WRITTEN if kind == "enospc" else place  # that is when Orbax reports it
        found.append(Fault(kind, place, int(match["number"] or 1), match["rank"] or ""))
    return found


def with_nan(loss: Any, step: Any) -> Any:
    """Return the traced loss, or NaN at the steps of planned faults. `step` counts from 0."""
    for fault in planned_faults():
        if fault.kind == "nan":
            import jax.numpy as jnp  # not needed by the commands that import this module

            loss = jnp.where(step == fault.number - 1, jnp.nan, loss)
    return loss


def inject(place: str, number: int, rank: int, folder: Path | None = None) -> None:
    """Let the planned faults of a place happen. `folder` is the written checkpoint at "ckpt"."""
    if FAULTS not in os.environ:
        return
    for fault in planned_faults():
        if (fault.place, fault.number) != (place, number) or fault.rank not in ("", str(rank)):
            continue
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault.kind == "stall":
            time.sleep(10**6)
        if fault.kind == "flip" and folder and rank == 0:
            file = max(folder.rglob("d/*"), key=lambda path: path.stat().st_size)
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        if fault.kind == "enospc" and folder:
            if rank == 0:  # as Orbax leaves a save that did not end
                folder.rename(folder.with_name(f"{folder.name}.orbax-checkpoint-tmp-0"))
            raise OSError(errno.ENOSPC, "No space left on device")
