"""Run the tests of faults by group, and write their table into docs/reliability.md.

python tools/reliability.py                     # all, with the hundred kills: two hours and a half
python tools/reliability.py kills signals       # only these groups; other rows stay
"""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "reliability.md"
FIGURES = ROOT / "docs" / "performance" / "reliability.json"
START, END = "<!-- tools/reliability.py -->\n", "<!-- end -->\n"
KILLS = "tests/faults/test_kills.py"
# What each group is, and the arguments of pytest or of a tool.
GROUPS = {
    "kills": ("6 and 3 SIGKILLs, 300 steps", [KILLS, "-m", "not slow"]),
    "hundred": ("100 SIGKILLs, 3,000 steps", [KILLS, "-m", "slow"]),
    "hooks": (
        "a NaN, a full disk, a flipped bit, a stall, bad samples",
        ["tests/faults/test_hooks.py", "tests/faults/test_bad_samples.py"],
    ),
    "signals": (
        "SIGTERM and SIGINT in each phase, one and two processes",
        ["tests/core/guards/test_stopping.py", "tests/test_processes_failing.py"],
    ),
    "damage": (
        "flipped bits; cut, emptied and deleted files",
        ["tests/runs/test_damage.py", "tests/core/guards/test_fingerprint.py"],
    ),
    "disk": (
        "full disks, read-only folders, two runs in a folder, torn metrics",
        [
            "tests/runs/test_disk.py",
            "tests/core/guards/test_room.py",
            "tests/core/guards/test_lock.py",
            "tests/core/test_metrics.py",
            "tests/runs/folders",
        ],
    ),
    "memory": ("memory over 50 saves", ["tests/faults/test_rss.py"]),
    "versions": ("checkpoints of this version", ["tests/test_golden_checkpoints.py"]),
    "cost": ("what the guards cost", ["tools/guard_cost.py"]),
    "fuzz": ("10 minutes of each fuzzer", ["tools/fuzz.py", "--minutes", "10"]),
}
SAID = re.compile(
    r"(\d.* MB after .*|fingerprints and the .*|with a save every .*|restore .*)$", re.M
)


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("group", nargs="*", choices=[*GROUPS, []])
    chosen = args.parse_args().group or GROUPS
    figures, failed = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}, []
    for name in chosen:
        figures[name] = run(name)
        failed += [name] * bool(figures[name]["status"])
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")
        PAGE.write_text(page(PAGE.read_text(), figures))
    print(f"failed: {', '.join(failed) or 'none'}")
    return bool(failed)


def run(name: str) -> dict:
    """Return the result of one group. Its output appears as it runs."""
    words = GROUPS[name][1]
    if words[0].startswith("tests/"):
        marks = [] if "-m" in words else ["-m", "slow or not slow"]
        words = ["-m", "pytest", "-n", "0", "-s", "-p", "no:warnings", *marks, *words]
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *words], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    text = "".join(lines)
    counts = re.findall(r"=+ (.*) in [\d.]+s", text)
    return {
        "status": process.wait(),
        "tests": counts[-1] if counts else "",
        "said": [line.strip() for line in SAID.findall(text)],
        "seconds": round(time.monotonic() - begin),
        "day": time.strftime("%Y-%m-%d"),
    }


def page(text: str, figures: dict) -> str:
    """Return the page with the table of these figures."""
    rows = ["| group | what | result | minutes | day |", "| --- | --- | --- | --- | --- |"]
    for name, (what, _) in GROUPS.items():
        if one := figures.get(name):
            said = "; ".join(filter(None, [one["tests"], *one["said"]])) or "as below"
            result = said if not one["status"] else f"**failed**: {said}"
            minutes = f"{one['seconds'] / 60:.1f}"
            rows.append(f"| {name} | {what} | {result} | {minutes} | {one['day']} |")
    before, _, rest = text.partition(START)
    return before + START + "\n".join(rows) + "\n" + END + rest.partition(END)[2]


if __name__ == "__main__":
    sys.exit(main())
