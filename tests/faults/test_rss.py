"""Memory of a process that saves many times."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# 60 saves of 40 MB. The first ten fill the pools of malloc and of Orbax.
SAVES = """
import gc, sys
import jax.numpy as jnp
from jaxft.runs.checkpoint import Checkpoints
saved = Checkpoints(sys.argv[1])
for step in range(1, 61):
    saved.save(step, {"w": jnp.full(10_000_000, float(step))}, {"a": 1}, {"next_step": step})
    saved.wait()
    if step in (10, 60):
        gc.collect()
        print(int(open("/proc/self/statm").read().split()[1]) * 4096)
saved.close()
"""


@pytest.mark.slow
def test_memory_grows_by_less_than_5_percent_over_50_saves(tmp_path):
    command = [sys.executable, "-c", SAVES, str(tmp_path)]
    end = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True)
    before, after = map(int, end.stdout.split())
    print(f"{before / 1e6:.0f} MB after 10 saves, {after / 1e6:.0f} MB after 60")
    assert after < 1.05 * before, (before, after)
