"""Make the figures of docs/reliability.md again: every test of faults, then the fuzzers.

python tools/reliability.py [--minutes 10]    # of each fuzzer. The hundred kills take longest
"""

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = (
    "tests/faults", "tests/core/guards", "tests/runs/test_damage.py", "tests/runs/test_disk.py",
    "tests/test_golden_checkpoints.py", "tests/test_others_files.py",
    "tests/tasks/common/test_probing.py",
)  # fmt: skip


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("--minutes", default="10")
    given = args.parse_args()
    marks = ["-m", "slow or not slow", "-n", "0", "-s", "--durations=0"]
    tests = subprocess.run([sys.executable, "-m", "pytest", "-q", *marks, *TESTS], cwd=ROOT)
    fuzz = subprocess.run([sys.executable, "tools/fuzz.py", "--minutes", given.minutes], cwd=ROOT)
    return tests.returncode or fuzz.returncode


if __name__ == "__main__":
    sys.exit(main())
