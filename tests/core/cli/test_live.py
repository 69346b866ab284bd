"""The live line: below all printed lines, never torn, and absent in redirected output."""

import io
import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxft.core import processes
from jaxft.core.cli import live
from jaxft.core.cli.live import LiveLine, LiveStream, count_done, live_output, progress, status
from jaxft.core.metrics import MetricWriter
from jaxft.data.loader import eval_batches

ROOT = Path(__file__).resolve().parents[3]


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True

    @property
    def screen(self):
        """The lines as a terminal shows them: "\\r" goes back to the start of a line."""
        lines = [""]
        for piece in self.getvalue().replace("\n", "\n\r").split("\r"):
            text, newline, _ = piece.partition("\n")
            lines[-1] = text + lines[-1][len(text) :]
            lines += [""] if newline else []
        return [line.rstrip() for line in lines]


@pytest.fixture
def start(monkeypatch):
    """`start()` within a test: pytest's own capture begins behind its fixtures."""

    def install():
        monkeypatch.setenv("COLUMNS", "60")
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        monkeypatch.setattr(sys, "stderr", screen)
        return screen

    return install


def test_prints_to_both_streams_stand_above_the_line(start):
    terminal = start()
    with live_output():
        status("loading jax")
        print("one")
        print("a warning", file=sys.stderr)
        status("compiling")
        print("two", "three")
        assert terminal.screen == ["one", "a warning", "two three", "compiling"]
    assert terminal.screen == ["one", "a warning", "two three", ""]
    assert sys.stdout is terminal and sys.stderr is terminal


def test_a_line_that_is_not_ended_is_not_torn(start):
    terminal = start()
    with live_output():
        status("working")
        print("half ", end="")
        status("still working")
        print("and half")
        assert terminal.screen == ["half and half", "still working"]


def test_a_long_line_is_cut_to_the_terminal_and_a_shorter_one_covers_it(start):
    terminal = start()
    line = LiveLine(terminal)
    line.show("x" * 100)
    assert terminal.screen == ["x" * 59]
    line.show("short")
    assert terminal.screen == ["short"]


def test_a_line_that_does_not_change_tells_its_age(start, monkeypatch):
    terminal = start()
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    line = LiveLine(terminal)
    line.show("compiling")
    line.age()
    assert terminal.screen == ["compiling"]
    now[0] = 107.0
    line.age()
    assert terminal.screen == ["compiling (7 s)"]
    line.show("compiling")  # the same work goes on
    line.show("evaluating")
    line.age()
    assert terminal.screen == ["evaluating"]


def test_a_printed_line_is_broken_between_words_and_a_path_stays_whole(start):
    terminal = start()
    path = "/data/" + "x" * 70
    with live_output():
        print("model m: " + "6000 sequences of at most 64 tokens, " * 3 + "end")
        print(path)
        print("a  b\n\nc")
        print("half a line, " * 4, end="")  # what follows on the same line is not known yet
        print("and half")
    lines = terminal.screen
    assert lines[0] == "model m: 6000 sequences of at most 64 tokens, 6000 sequences"
    assert lines[1] == "    of at most 64 tokens, 6000 sequences of at most 64" and len(lines) > 6
    assert path in lines and lines[lines.index("a  b") :][:3] == ["a  b", "", "c"]
    assert lines[-2] == "half a line, " * 4 + "and half"


def test_the_parts_of_a_work_are_counted_behind_it(start, monkeypatch):
    terminal = start()
    now = [100.0]
    monkeypatch.setattr(live.time, "monotonic", lambda: now[0])
    with live_output():
        count_done(1, 9)  # nothing is shown that has parts
        assert terminal.screen == [""]
        status("evaluating")
        examples = [np.array([i]) for i in range(5)]
        for batch in eval_batches(examples, 2, lambda rows, batch_rows: {"x": np.array(rows)}):
            first = int(batch["sample_ids"][0])
            assert terminal.screen[-1] == f"evaluating {first // 2}/3"
        now[0] = 104.0
        sys.stdout.line.age()
        assert terminal.screen[-1] == "evaluating 2/3 (4 s)"
        print("one")
        assert terminal.screen == ["one", "evaluating 2/3"]
        status("evaluating")
        assert terminal.screen[-1] == "evaluating"


def test_threads_do_not_tear_the_line(start):
    terminal = start()
    with live_output():

        def work(name):
            for i in range(50):
                sys.stdout.write(f"{name} {i}\n")
                status(f"step {i}")

        threads = [threading.Thread(target=work, args=(name,)) for name in "abc"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        *lines, last = terminal.screen
    assert sorted(lines) == sorted(f"{name} {i}" for name in "abc" for i in range(50))
    assert last == "step 49"


def test_redirected_output_has_no_line(capsys):
    with live_output():
        status("loading")
        progress("caching 3 of 9")
        print("one")
    assert capsys.readouterr().out == "caching 3 of 9\none\n"


def test_the_bar_of_a_run_stays_below_an_evaluation(start, tmp_path):
    terminal = start()
    with live_output(), MetricWriter(tmp_path, 20) as writer:
        assert isinstance(sys.stdout, LiveStream)
        writer.busy("")  # the first step runs, and has no numbers yet
        assert terminal.screen == ["[....................] step 0/20"]
        writer.write(5, {"loss": 2.0})
        writer.busy("evaluating")
        assert terminal.screen == ["[#####...............] step 5/20 | evaluating"]
        print("a print of a library")
        writer.busy("")
        writer.write_eval(5, {"loss": 1.5})
        writer.write(6, {"loss": 1.0})
    *lines, last, _ = terminal.screen
    assert lines == ["a print of a library", "eval at step 5 | loss 1.5"]
    assert last.startswith("[######..............] step 6/20 | ETA 0m00s | loss 1")


def test_a_command_restores_the_streams_and_prints_its_error_whole(start):
    terminal = start()

    def fails(argv):
        status("loading")
        raise ValueError("of a library")

    assert processes.command(fails, []) == 1
    assert sys.stdout is terminal
    line, end = terminal.screen
    assert line.startswith("jaxft: unexpected ValueError: of a") and end == ""


def test_in_a_pseudo_terminal_the_line_is_drawn_and_removed():
    code = (
        "from jaxft.core.cli.live import live_output, status\n"
        "with live_output():\n    status('loading')\n    print('done')\n"
    )
    ours, theirs = pty.openpty()
    subprocess.run([sys.executable, "-c", code], stdout=theirs, stderr=theirs, cwd=ROOT, check=True)
    os.close(theirs)
    shown = os.read(ours, 10_000).decode()
    assert shown.startswith("\rloading\r       \rdone\r\n\rloading") and shown.endswith("\r")
