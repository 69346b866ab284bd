"""Golden checkpoints: runs of this version that later versions have to go on from.

    python tools/golden_checkpoints.py    # writes tests/golden/checkpoints/VERSION-KIND.tar.gz

Each archive holds a run folder after 2 steps, and the losses of steps 3 and 4 of the version that
wrote it. Older archives stay. `tests/test_golden_checkpoints.py` goes on from all of them.
"""

import gzip
import io
import json
import os
import sys
import tarfile
import tempfile
from pathlib import Path

from golden_material import SHAPE, write_decoder, write_records

import jaxft
from jaxft import train

ROOT = Path(__file__).resolve().parent.parent
ARCHIVES = ROOT / "tests" / "golden" / "checkpoints"
SMALL = {
    "model_type": "llama", **SHAPE, "hidden_size": 8, "intermediate_size": 8,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}  # fmt: skip
KEYS = {
    "model": "model", "data.train": "jsonl:texts.jsonl", "data.eval": "", "batch_size": 8,
    "seq_len": 16, "optim.warmup": "1_steps", "every.save": "2_steps", "every.sample": "0_steps",
    "export.dtype": "float32",
}  # fmt: skip
KINDS = {"full": {"lora.rank": 0, "optim.ema": 0.9}, "lora": {"lora.rank": 2}}
KEPT = ("config.json", "metrics.jsonl", "checkpoints")  # nothing that names this machine
LATER = "4_steps"


def write_inputs(folder: Path) -> None:
    """Write the model and the data of every archive, by relative paths."""
    write_decoder(folder / "model", SMALL)
    write_records(folder)


def go_on(run: Path) -> list[float]:
    """Train a run folder up to LATER, from the folder of its inputs, and return the losses."""
    code = train.main(["--workdir", str(run), f"--config.total={LATER}"])
    if code:
        raise SystemExit(code)
    return losses(run)


def losses(run: Path) -> list[float]:
    """Return the losses of the steps of a run folder."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


def _write(kind: str) -> None:
    words = [f"--config.{key}={value}" for key, value in (KEYS | KINDS[kind]).items()]
    config = ["--config", str(ROOT / "configs" / "llm.py"), "--config.total=2_steps", *words]
    if code := train.main([*config, "--workdir", kind, "--config.export.kind=none"]):
        raise SystemExit(code)
    for mark in Path(kind).rglob("commit_success.txt"):
        mark.write_text("Checkpoint commit was successful\n")  # Orbax writes the path of this run
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name in KEPT:
            tar.add(f"{kind}/{name}", f"run/{name}", filter=_anonymous)
        expected = json.dumps({"losses": go_on(Path(kind))}).encode()
        info = tarfile.TarInfo("expected.json")
        info.size = len(expected)
        tar.addfile(info, io.BytesIO(expected))
    ARCHIVES.mkdir(exist_ok=True)
    place = ARCHIVES / f"{jaxft.__version__}-{kind}.tar.gz"
    place.write_bytes(gzip.compress(file.getvalue(), mtime=0))
    print(f"wrote {place}: {place.stat().st_size:,} bytes")


def _anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
    info.uid = info.gid = info.mtime = 0
    info.uname = info.gname = ""
    return info


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        write_inputs(Path())
        for kind in KINDS:
            _write(kind)
    return 0


if __name__ == "__main__":
    sys.exit(main())
