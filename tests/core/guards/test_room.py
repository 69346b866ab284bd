"""Errors of full disks, and the room that arrays need."""

import errno
from types import SimpleNamespace

import numpy as np
import pytest

from jaxft.core import processes
from jaxft.core.guards import room

IN_CPLUSPLUS = "RESOURCE_EXHAUSTED: Failed to write 9 bytes to file 22: No space left on device"


@pytest.mark.parametrize(
    ("error", "full"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), True),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), True),
        (ValueError(IN_CPLUSPLUS), True),
        (OSError(errno.EACCES, "Permission denied"), False),
        (ValueError("RESOURCE_EXHAUSTED: out of device memory"), False),
    ],
)
def test_s1_errors_of_a_full_disk(error, full):
    assert room.is_full(error) == full


def test_s2_what_fits_and_what_does_not(tmp_path, monkeypatch):
    tree = {"a": np.zeros((3, 4), np.float32), "b": [np.zeros(5, np.int8)]}
    assert room.nbytes(tree) == 53
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: SimpleNamespace(free=3 * 10**9))
    assert room.lack_of_room(tmp_path, 3 * 10**9) == ""
    line = f"needs 12.3 GB, 3 GB are free in {tmp_path}"
    assert room.lack_of_room(tmp_path, 12_345_000_000) == line


def test_s1_a_command_on_a_full_disk_ends_with_one_line(capsys):
    def export(argv):
        raise OSError(errno.ENOSPC, "No space left on device", "out/model.safetensors")

    assert processes.command(export, []) == 74
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("jaxft: the disk is full at out/model.safetensors; free space")
