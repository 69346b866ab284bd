"""Fuzz the parsers of foreign files for a time, and print a table.

python tools/fuzz.py --minutes 10 [PARSER …]    # each for 10 minutes, by default all
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from fuzzing import fuzz, parsers

SLACK = 300.0  # seconds after the end, after which a parser hangs where no signal reaches it


def run(name: str, seconds: float, seed: int) -> int:
    """Fuzz one parser in this process, and print its row and what it found."""
    with tempfile.NamedTemporaryFile(prefix="jaxft-fuzz-", delete=False) as file:
        keep = Path(file.name)
    print(f"{name}: the case under way is in {keep}", file=sys.stderr, flush=True)
    made = fuzz(parsers()[name], seconds, seed, keep)
    keep.unlink()
    print(
        f"| {name} | {seconds / 60:.1f} | {made.cases:,} | {made.refused:,} |"
        f" {len(made.failures)} | {made.longest:.1f} s | {made.peak_mb:,.0f} MB |"
    )
    for failure, content in made.failures.items():
        print(f"  {failure}\n    {content[:300]!r}")
    return bool(made.failures) or made.peak_mb > 1024


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("parser", nargs="*")
    args.add_argument("--minutes", type=float, default=10)
    args.add_argument("--seed", type=int, default=time.time_ns() % 10**6)
    args.add_argument("--here", action="store_true", help="in this process")
    given = args.parse_args()
    if given.here:
        return max(run(name, given.minutes * 60, given.seed) for name in given.parser)
    print(f"seed {given.seed}\n")
    print("| parser | minutes | cases | refused | other errors, hangs | longest case | peak RSS |")
    print("| --- | --- | --- | --- | --- | --- | --- |", flush=True)
    failed = 0
    for name in given.parser or parsers():
        words = ["--here", "--minutes", str(given.minutes), "--seed", str(given.seed), name]
        try:
            end = subprocess.run([sys.executable, __file__, *words],
                                 timeout=given.minutes * 60 + SLACK, check=False)  # fmt: skip
            failed |= end.returncode != 0
        except subprocess.TimeoutExpired:
            failed = 1
            print(f"| {name} | hangs where no signal reaches it |", flush=True)
    return failed


if __name__ == "__main__":
    sys.exit(main())
