"""Damaged files of every foreign format: read, or refused in one line, soon and in little memory.

`python tools/fuzz.py --minutes 10` does the same for longer.
"""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))

from fuzzing import Parser, damaged_bytes, fuzz, parsers

PARSERS = parsers()


@pytest.mark.parametrize("name", PARSERS)
def test_damaged_files_are_read_or_refused(name):
    made = fuzz(PARSERS[name], 4.0)
    assert not made.failures
    assert made.cases > 3 and made.longest < 20


def test_other_errors_are_found():
    made = fuzz(Parser(damaged_bytes(b"12345"), lambda _, content: int(content)), 0.5)
    assert made.failures and "ValueError" in next(iter(made.failures))
