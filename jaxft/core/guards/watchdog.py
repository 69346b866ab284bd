"""End of a training whose step stalls, and of starts that come to no new checkpoint."""

import faulthandler
import json
import os
import statistics
import sys
import threading
import time
from collections import deque
from pathlib import Path

from jaxft.core.errors import NO_PROGRESS, STALLED, UserError

STALL = "JAXFT_STALL_SECONDS"  # the variable: the limit of a step, 0 for none
STALL_SECONDS, STALL_STEPS = 300.0, 10  # the default: the longer of 300 s and 10 usual steps
FIRST_SECONDS = 3600.0  # of the first step, before a usual time is known
STARTS = "starts.json"  # of a run folder: the starts since its newest checkpoint
IDLE_STARTS = 5  # starts without a new checkpoint, after which there is no other


class Watchdog:
    """Limit on the time of a step. A context, after which nothing is watched.

    Between `arm` and `pause` a thread waits. If a step takes longer than the limit, it writes
    where every thread is to stalled-PROCESS.txt, prints one line and ends the process with STALLED.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        text = os.environ.get(STALL, "")
        if not text.replace(".", "", 1).isdigit() and text:
            raise UserError(f"{STALL}={text!r} must be a number of seconds, or 0 for no limit")
        self._fixed = float(text) if text else None
        self._step, self._last, self._until = 0, 0.0, 0.0
        self._times: deque[float] = deque(maxlen=99)
        self._done = threading.Event()

    def __enter__(self) -> "Watchdog":
        if self._fixed != 0:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def arm(self, step: int) -> None:
        """Begin the time of a step that was just dispatched, and of the next one's batch."""
        now = time.monotonic()
        if self._last:
            self._times.append(now - self._last)
        self._step, self._last = step, now
        self._until = now + self._limit()

    def pause(self) -> None:
        """End the time of a step: what comes next may take as long as it likes."""
        self._until = self._last = 0.0

    def _limit(self) -> float:
        if self._fixed is not None:
            return self._fixed
        if not self._times:
            return FIRST_SECONDS
        return max(STALL_SECONDS, STALL_STEPS * statistics.median(self._times))

    def _watch(self) -> None:
        while not self._done.wait(min(1.0, self._fixed or 1.0)):
            if 0 < self._until < time.monotonic():
                self._end()

    def _end(self) -> None:
        import jax  # not needed by the commands that import this module

        file = self._folder / f"stalled-{jax.process_index()}.txt"
        with file.open("w") as stream:
            faulthandler.dump_traceback(stream, all_threads=True)
        print(
            f"jaxft: step {self._step} takes longer than {self._limit():g} s ({STALL}"
            f" sets the limit); {file} shows where each thread is, and the same command resumes",
            file=sys.stderr,
            flush=True,
        )
        os._exit(STALLED)


def refuse_idle(folder: Path, newest: int) -> None:
    """Raise UserError if too many starts in a row came to no checkpoint after step `newest`."""
    if _starts(folder, newest) >= IDLE_STARTS:
        raise UserError(
            f"{folder}: the last {IDLE_STARTS} starts ended in their steps without a checkpoint"
            f" after step {newest}; read their errors, save more often with every.save, and delete"
            f" {folder / STARTS} to start again",
            NO_PROGRESS,
        )


def count_start(folder: Path, newest: int) -> None:
    """Record a start that has come to its first step."""
    record = {"step": newest, "starts": _starts(folder, newest) + 1}
    (folder / STARTS).write_text(json.dumps(record) + "\n")


def _starts(folder: Path, newest: int) -> int:
    """Return the number of starts from this checkpoint."""
    try:
        record = json.loads((folder / STARTS).read_text())
        return int(record["starts"]) if record["step"] == newest else 0
    except (OSError, ValueError, KeyError, TypeError):
        return 0
