"""The live line of a terminal: what runs now, below all lines that are printed.

A printed line that is wider than the terminal is broken between words. Output that is redirected
has no live line, and its lines stay whole.
"""

import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SHOWN_AFTER = 3.0  # seconds after which a line that does not change tells its age
INDENT = "    "  # of the rest of a line that is wider than the terminal


class LiveLine:
    """A line at the bottom of a terminal. Printed text goes above it, whole lines at a time."""

    def __init__(self, stream: Any):
        self.stream, self.lock = stream, threading.RLock()
        self._text, self._part, self._drawn, self._since = "", "", "", 0.0
        self._inside = False  # a printed line that is not ended yet

    def show(self, text: str) -> None:
        """Draw a text in place of the last one. An empty text removes the line."""
        with self.lock:
            if text != self._text:
                self._text, self._since = text, time.monotonic()
            self._part = ""
            self._draw(text)

    def part(self, done: int, total: int) -> None:
        """Draw how many parts of what the line shows are done. A line without text has none."""
        with self.lock:
            if self._text:
                self._part, self._since = f" {done}/{total}", time.monotonic()
                self._draw(self._text + self._part)

    def age(self) -> None:
        """Draw the line again with the seconds since it last changed."""
        with self.lock:
            seconds = time.monotonic() - self._since
            if self._text and seconds >= SHOWN_AFTER:
                self._draw(f"{self._text}{self._part} ({seconds:.0f} s)")

    def above(self, text: str, stream: Any) -> None:
        """Write a text to a stream of the same terminal, and the line below it again."""
        with self.lock:
            if self._drawn:
                self.stream.write("\r" + " " * len(self._drawn) + "\r")
                self.stream.flush()
                self._drawn = ""
            stream.write(text if self._inside else _broken(text))
            self._inside = not text.endswith("\n") if text else self._inside
            if self._text and not self._inside:
                stream.flush()
                self._draw(self._text + self._part)

    def end(self) -> None:
        """Leave the line as it is, and go on below it."""
        with self.lock:
            if self._drawn:
                self.stream.write("\n")
                self.stream.flush()
            self._text = self._part = self._drawn = ""

    def _draw(self, text: str) -> None:
        columns = shutil.get_terminal_size().columns
        if len(text) >= columns:  # without the parts of a bar that do not fit
            text = text[: columns + 2].rpartition(" | ")[0] or text[: columns - 1]
        if self._inside or not (text or self._drawn):  # a line that is not ended yet stays whole
            return
        end = "" if text else "\r"
        self.stream.write("\r" + text.ljust(len(self._drawn)) + end)
        self.stream.flush()
        self._drawn = text


def _broken(text: str) -> str:
    """Return a text whose lines fit into the terminal, broken between words."""
    columns = shutil.get_terminal_size().columns
    lines = (
        textwrap.wrap(
            line,
            columns,
            subsequent_indent=INDENT,
            break_long_words=False,  # a path or a regex stays whole, to be copied
            break_on_hyphens=False,
        )
        if len(line) > columns
        else [line]
        for line in text.split("\n")
    )
    return "\n".join(one for line in lines for one in line)


class LiveStream:
    """A stream of a terminal, whose text appears above the live line."""

    def __init__(self, line: LiveLine, stream: Any):
        self.line, self.stream, self.encoding = line, stream, stream.encoding

    def write(self, text: str) -> int:
        self.line.above(text, self.stream)
        return len(text)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.stream.fileno()


def live_line(stream: Any) -> LiveLine:
    """Return the live line of a stream, or a new one for a stream without it."""
    return stream.line if isinstance(stream, LiveStream) else LiveLine(stream)


def status(text: str) -> None:
    """Show what runs now on the live line, if there is one. "" removes it."""
    if isinstance(sys.stdout, LiveStream):
        sys.stdout.line.show(text)


def count_done(done: int, total: int) -> None:
    """Add to the live line how many parts of its work are done, if there is one."""
    if isinstance(sys.stdout, LiveStream):
        sys.stdout.line.part(done, total)


def progress(text: str) -> None:
    """Show how far something is: on the live line, or as a line of output that is redirected."""
    if isinstance(sys.stdout, LiveStream):
        status(text)
    else:
        print(text, flush=True)


@contextmanager
def live_output() -> Iterator[None]:
    """Give the terminal a live line, that no print to stdout or stderr tears."""
    out, err = sys.stdout, sys.stderr
    if isinstance(out, LiveStream) or not out.isatty():
        yield
        return
    line, ended = LiveLine(out), threading.Event()
    sys.stdout = LiveStream(line, out)
    if err.isatty():
        sys.stderr = LiveStream(line, err)

    def tick() -> None:
        while not ended.wait(1.0):
            line.age()

    threading.Thread(target=tick, daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        line.show("")
        sys.stdout, sys.stderr = out, err
