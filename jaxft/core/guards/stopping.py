"""Stop of a training by SIGTERM or SIGINT: at once where nothing is lost, else after a save."""

import os
import signal
import sys
import threading
from types import FrameType
from typing import Any

PREEMPTED = 75  # exit status: the state is saved, so start the same command again
STOP_FLAG = "_stop"  # in a batch and in the metrics of a step: 1 if any process is asked to stop
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(ValueError):
    """A training that ended at a signal, with its state saved. The text says at which step."""


class StopRequests:
    """Requests of this process to stop. A context, within which the signals are caught.

    alone: no other process takes part in the run. busy: steps are under way that no checkpoint
    holds. While it is False, a process that is alone ends at the first signal. The second signal
    ends any process. A thread receives the signals, because Python's own handlers wait until a
    compilation ends.

    interactive: raise KeyboardInterrupt in place of ending the process. SIGTERM keeps its handler.
    """

    def __init__(self, alone: bool, interactive: bool = False):
        self.alone, self.asked, self.busy = alone, "", False
        self._interactive = interactive
        self._flag: Any = None
        self._former: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is not threading.main_thread():
            return self
        if self._interactive:
            self._former = {signal.SIGINT: signal.signal(signal.SIGINT, self._interrupt)}
        else:
            self._out, self._in = os.pipe()
            os.set_blocking(self._in, False)
            self._wakeup = signal.set_wakeup_fd(self._in, warn_on_full_buffer=False)
            self._former = {number: signal.signal(number, _ignore) for number in _SIGNALS}
            threading.Thread(target=self._listen, args=(self._out,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._former and not self._interactive:
            signal.set_wakeup_fd(self._wakeup)
            os.write(self._in, b"\0")  # ends the thread
            os.close(self._in)

    def _listen(self, out: int) -> None:
        received = b""
        while 0 not in received:
            received = os.read(out, 16)
            for number in received:
                if number in _SIGNALS:
                    self._ask(number)
        os.close(out)

    def _ask(self, number: int) -> None:
        name = signal.Signals(number).name
        if self.asked:
            _end(f"{name}, the second signal: ended at once", 128 + number)
        self.asked = name
        if self.alone and not self.busy:
            _end(f"{name}: nothing to save; the same command resumes", PREEMPTED)
        print(f"jaxft: {name}: a save follows this step", file=sys.stderr, flush=True)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.asked or not self.busy:
            raise KeyboardInterrupt
        self.asked = "SIGINT"
        print("jaxft: a save follows this step", file=sys.stderr, flush=True)

    def mark(self, batch: dict[str, Any], mesh: Any) -> dict[str, Any]:
        """Return the batch, with one STOP_FLAG for each device if there are other processes.

        The arrays of the batch may be shapes without values.
        """
        if self.alone:
            return batch
        import jax  # not needed by the commands that import this module
        import numpy as np
        from jax.sharding import NamedSharding, PartitionSpec

        asked = np.full(mesh.size, bool(self.asked), np.int32)
        place = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        flag = jax.make_array_from_callback(asked.shape, place, asked.__getitem__)
        return {**batch, STOP_FLAG: flag}

    def agreed(self, flag: Any) -> bool:
        """Return True in all processes at the same step, if one of them is asked to stop.

        flag: STOP_FLAG of the step that was just dispatched, None for a process that is alone. The
        answer is that of the step before, so that the device never waits for the host.
        """
        if flag is None:
            return bool(self.asked)
        before, self._flag = self._flag, flag
        return before is not None and int(before) > 0


def _ignore(number: int, frame: FrameType | None) -> None:
    """Take the place of Python's handlers. The thread has received the signal."""


def _end(text: str, code: int) -> None:
    print(f"jaxft: {text}", file=sys.stderr, flush=True)
    sys.stdout.flush()
    os._exit(code)
