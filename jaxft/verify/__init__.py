"""The parity certificate against PyTorch: `python -m jaxft.verify DIR [--out FILE] [--long N]`."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from jaxft.core import runtime
from jaxft.core.config import parse_arguments
from jaxft.core.errors import UserError
from jaxft.models.pipelines.ldm import SINGLE
from jaxft.verify import autoencoder, diffusion, image_tokens, llm
from jaxft.verify.llm import hf_folder
from jaxft.verify.report import Check, show, write
from jaxft.weights.folders.diffusers import open_pipeline
from jaxft.weights.locate import INDEX, demo_folder

__all__ = ["certify", "hf_folder", "main"]


def main(argv: list[str] | None = None) -> int:
    """Certify a folder; 0 when every check passes, 1 when one does not, 2 for a user's mistake."""
    passed: list[bool] = []

    def run(words: list[str]) -> None:
        passed.append(_main(words))

    return runtime.command(run, sys.argv[1:] if argv is None else argv) or int(not all(passed))


def _main(argv: list[str]) -> bool:
    if not argv or argv[0].startswith("--"):
        raise UserError("name a model folder first: python -m jaxft.verify DIR [--out FILE]")
    spec, (options, overrides) = argv[0], parse_arguments(argv[1:], ("out", "long"))
    if overrides:
        raise UserError(f"--config.{overrides[0][0]} has no use here: verify reads a model folder")
    if not (far := options.get("long", "4096")).isdigit():
        raise UserError(f"--long={far!r} must be a position, such as 4096")
    folder = Path(spec) if Path(spec).is_dir() else Path.cwd()
    out = Path(options.get("out", folder / "parity.json"))
    certificate, checks = certify(spec, int(far))
    write(out, certificate)
    show(checks, out)
    return all(check.passed for check in checks)


def certify(spec: str, far: int = 4096) -> tuple[dict[str, Any], list[Check]]:
    """(certificate, checks) of the model that `spec` names; `far` is a language model's.

    What the folder holds says what it is: a pipeline, an autoencoder, an image-token model, else a
    language model.
    Raises UserError for what cannot be compared.
    """
    if _is_pipeline(spec):
        return diffusion.certify(spec)
    if autoencoder.is_autoencoder(_config(spec)):
        return autoencoder.certify(spec)
    if image_tokens.is_image_tokens(spec):
        return image_tokens.certify(spec, far)
    return llm.certify(spec, far)


def _is_pipeline(spec: str) -> bool:
    path = demo_folder(spec) if spec.startswith("demo:") else Path(spec).expanduser()
    if path.exists():
        alone = path.suffix in SINGLE and not (path.parent / "config.json").is_file()
        return alone or (path / INDEX).is_file()
    if not spec.startswith("pip:") and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", spec):
        return False
    try:
        open_pipeline(spec, weights=False)
    except UserError:
        return False
    return True


def _config(spec: str) -> dict[str, Any]:
    """config.json of a folder; nothing where there is none that can be read."""
    try:
        content = json.loads((Path(spec).expanduser() / "config.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
