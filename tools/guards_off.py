"""Take out one guard after the other in a copy of this tree, and check that its test fails.

python tools/guards_off.py [ITEM …]    # a test that passes without its guard is worth nothing
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent


class Guard(NamedTuple):
    """A place in jaxft/, what takes its effect away, and the tests that have to fail then."""

    file: str
    line: str
    without: str
    tests: str


GUARDS = {
    "an export replaces no folder of others": Guard(
        "runs/folders/outputs.py",
        "    if not out.exists() and not out.is_symlink():\n",
        "    if True:\n",
        "tests/runs/folders/test_outputs.py",
    ),
    "ids beyond the table": Guard(
        "data/text/vocabulary.py",
        "if not used.size or used.max() < rows:",
        "if True:",
        "tests/data/text/test_vocabulary.py",
    ),
    "flipped bits of a checkpoint": Guard(
        "runs/checkpoint.py",
        "if leaves[name][0] != one.number:",
        "if False:",
        "tests/runs/test_damage.py::test_s5_flips_in_array_files_are_caught",
    ),
    "flipped bits of its small files": Guard(
        "runs/checkpoint.py",
        "if not whole or items[",
        "if False and items[",
        "tests/runs/test_damage.py",
    ),
    "inputs that change": Guard(
        "runs/folders/inputs.py",
        "if changed or _listing(alike)",
        "if False and _listing(alike)",
        "tests/runs/folders/test_inputs.py",
    ),
    "weights that are not finite, at loading": Guard(
        "weights/transfer.py",
        "return jnp.stack([is_finite(x) for x in floats]).all()",
        "return jnp.asarray(True)",
        "tests/test_bad_input.py::test_w4_fault_5_weights_that_are_not_finite_are_named",
    ),
    "states that are not finite": Guard(
        "runs/checkpoint.py",
        "if bad := not_finite(state):",
        "if bad := []:",
        "tests/runs/test_damage.py",
    ),
    "steps that are not finite": Guard(
        "core/step.py",
        "fine = jnp.isfinite(mean) & jnp.isfinite(norm)",
        "fine = jnp.asarray(True)",
        "tests/core/test_step.py",
    ),
    "code of a tokenizer": Guard(
        "tasks/common/tokenizers.py",
        "trust_remote_code=False",
        "trust_remote_code=bool(1)",
        "tests/tasks/common/test_tokenizers.py",
    ),
    "names that lead out": Guard(
        "core/guards/inside.py",
        "if odd or not 0 < longest <= NAME_BYTES:",
        "if False:",
        "tests/core/guards/test_inside.py",
    ),
    "links that lead out": Guard(
        "core/guards/inside.py",
        "return any(target.is_relative_to(root) for root in roots)",
        "return True",
        "tests/core/guards/test_inside.py",
    ),
    "pictures of too many pixels": Guard(
        "data/images/decode.py",
        "if image.width * image.height > MAX_PIXELS:",
        "if False:",
        "tests/data/images/test_decode.py",
    ),
    "formats of pictures": Guard(
        "data/sources/images/records.py",
        "FORMATS = (",
        'FORMATS = ("EPS",',
        "tests/data/sources/images tests/data/images",
    ),
    "hostile tokenizers": Guard(
        "tasks/common/probing.py",
        "if all(_is_known(part) for part in parts):",
        "if True:",
        "tests/tasks/common/test_probing.py",
    ),
    "values of a config.json": Guard(
        "models/decoders/config.py",
        "        if name in config:\n",
        "        if False:\n",
        "tests/models/decoders/families/test_llama.py",
    ),
    "pickles": Guard(
        "verify/convert.py",
        "weights_only=True",
        "weights_only=False",
        "tests/verify/test_verify_convert.py",
    ),
    "signals": Guard(
        "core/guards/stopping.py",
        "self._ask(number)",
        "pass",
        "tests/core/guards/test_stopping.py",
    ),
    "two runs in a folder": Guard(
        "core/guards/lock.py",
        "raise _in_use(path, _read(path)) from None",
        "pass",
        "tests/core/guards/test_lock.py",
    ),
    "different configs on two hosts": Guard(
        "runs/agreement.py",
        "if differing := [",
        "if False and [",
        "tests/runs/test_agreement.py tests/test_processes_failing.py",
    ),
    "full disks": Guard(
        "core/guards/room.py",
        "if free >= needed:",
        "if True:",
        "tests/runs/test_disk.py tests/core/guards/test_room.py",
    ),
    "a step that stalls": Guard(
        "core/guards/watchdog.py",
        "if 0 < self._until < time.monotonic():",
        "if False:",
        "tests/core/guards/test_watchdog.py",
    ),
    "starts without progress": Guard(
        "core/guards/watchdog.py",
        "IDLE_STARTS = 5",
        "IDLE_STARTS = 10**9",
        "tests/core/guards/test_watchdog.py",
    ),
    "bad samples": Guard(
        "core/errors.py",
        'BAD_SAMPLES = "bad_samples.jsonl"',
        'BAD_SAMPLES = "other.jsonl"',
        "tests/faults/test_bad_samples.py",
    ),
    "planned faults": Guard(
        "core/guards/faults.py",
        "if FAULTS not in os.environ:",
        "if True:",
        "tests/core/guards/test_faults.py",
    ),
}


def main() -> int:
    args = argparse.ArgumentParser(description=__doc__)
    args.add_argument("item", nargs="*")
    chosen = args.parse_args().item or list(GUARDS)
    kept = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns("__pycache__", "runs-*", "exports-*")
        for name in ("jaxft", "configs", "tests", "tools", "docs"):
            shutil.copytree(ROOT / name, tree / name, ignore=ignored)
        for path in ROOT.glob("*.*"):
            if path.is_file():
                shutil.copy(path, tree)
        for name in chosen:
            begin, failed = time.monotonic(), fails_without(GUARDS[name], tree)
            seconds = time.monotonic() - begin
            print(f"{name}: {failed or 'PASSES WITHOUT IT'} ({seconds:.0f} s)", flush=True)
            kept += [name] * (not failed)
    print(f"{len(chosen) - len(kept)} of {len(chosen)} guards have a test that fails without them")
    return bool(kept)


def fails_without(guard: Guard, tree: Path) -> str:
    """Return the first test that fails without a guard, or ""."""
    file = tree / "jaxft" / guard.file
    text = file.read_text()
    assert text.count(guard.line) >= 1, f"{guard.file} has no {guard.line!r}"
    file.write_text(text.replace(guard.line, guard.without))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "-m", "not slow"]
    env = {**os.environ, "PYTHONPATH": str(tree)}
    end = subprocess.run(
        [*command, *guard.tests.split()], cwd=tree, env=env, capture_output=True, text=True
    )
    file.write_text(text)
    found = [line.split()[1] for line in end.stdout.splitlines() if line.startswith("FAILED ")]
    assert found or end.returncode in (0, 1), end.stdout[-2000:] + end.stderr[-2000:]
    return found[0] if found else ""


if __name__ == "__main__":
    sys.exit(main())
