"""Errors and facts of several processes. tests/test_processes.py has real ones."""

import numpy as np
import pytest

from jaxft.core import processes
from jaxft.core.errors import UserError
from jaxft.runs import agreement


@pytest.fixture
def others(monkeypatch):
    """`others(*texts)`: processes 1, 2, … that give these texts."""

    def make(*texts):
        monkeypatch.setattr(agreement.processes, "joined", lambda: True)
        monkeypatch.setattr(agreement, "gather", lambda mine: [mine, *texts])

    return make


def test_one_process_keeps_its_own_error():
    agreement.check_same({"examples": 40})
    with agreement.agreement():
        pass
    with pytest.raises(UserError, match=r"^no such file$"), agreement.agreement():
        raise UserError("no such file")


def test_an_error_of_one_is_raised_in_all(others):
    others("", "no such file")
    reached = []
    with pytest.raises(UserError, match=r"^process 2: no such file$"), agreement.agreement():
        reached.append("the end of the block")
    assert reached
    with pytest.raises(UserError, match=r"^process 0: mine$"), agreement.agreement():
        raise UserError("mine")
    others("", "")
    with agreement.agreement():
        pass


def test_a_bug_is_not_an_error_of_the_user(others):
    others("")
    with pytest.raises(ZeroDivisionError), agreement.agreement():
        _ = 1 / 0


def test_facts_that_differ_are_named(others):
    facts = {"examples": 40, "latest checkpoint": 6, "exported": False}
    others("40\n6\nFalse", "39\n6\nTrue")
    line = r"process 2 differs from process 0 \(examples: 40 -> 39; exported: False -> True\)"
    with pytest.raises(UserError, match=line):
        agreement.check_same(facts)
    others("40\n6\nFalse")
    agreement.check_same(facts)


def test_texts_of_any_length_are_gathered(monkeypatch):
    """Process 1 has another length: all rows are padded to the longest."""
    theirs = np.frombuffer("é, a longer text".encode(), np.uint8)

    def allgather(mine):
        if mine.dtype == np.int32:
            return np.stack([mine, np.asarray([len(theirs)], np.int32)])
        return np.stack([mine, np.pad(theirs, (0, len(mine) - len(theirs)))])

    monkeypatch.setattr(agreement, "process_allgather", allgather)
    monkeypatch.setattr(agreement.jax, "process_count", lambda: 2)
    assert agreement.gather("alone") == ["alone"]
    monkeypatch.setattr(processes, "joined", lambda: True)
    assert agreement.gather("") == ["", "é, a longer text"]
    assert agreement.gather("short") == ["short", "é, a longer text"]
