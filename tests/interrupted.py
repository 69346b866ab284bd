"""A training that is killed under way, in a process of its own, and what is compared then."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def start(arguments, first="pass"):
    """`jaxft.train` with these arguments, on the devices of this process, after a line of code."""
    code = f"import sys; from jaxft import train; {first}; sys.exit(train.main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, env=dict(os.environ))


def kill_after(process, workdir, step):
    """SIGKILL as soon as metrics.jsonl has that step; False if the run was over before."""
    file = workdir / "metrics.jsonl"
    while process.poll() is None:
        if file.exists() and any(f'"step": {step},' in line for line in file.open()):
            process.send_signal(signal.SIGKILL)
            process.wait()
            return True
        time.sleep(0.02)
    return False


def timeless(workdir):
    """The records of a run without what depends on the clock."""
    records = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if "per_s" not in k and "wait" not in k} for r in records]
