"""The parity certificate against PyTorch: `python -m jaxft.verify DIR [--out FILE] [--long N]`."""

import sys
from pathlib import Path
from typing import Any

from jaxft.api.loading import config_in, family_of
from jaxft.core import processes
from jaxft.core.cli.arguments import parse
from jaxft.core.errors import UserError
from jaxft.models.decoders.classifier import is_classifier
from jaxft.tasks import OPTIONS
from jaxft.verify import autoencoder, diffusion, image_tokens, llm
from jaxft.verify.heads import classifier
from jaxft.verify.report import Check, hf_folder, show, write

__all__ = ["certify", "hf_folder", "main"]


def main(argv: list[str] | None = None) -> int:
    """Certify a folder. Returns 0 if every check passes, 1 if one fails, 2 for a user's mistake."""
    passed: list[bool] = []

    def run(words: list[str]) -> None:
        passed.append(_main(words))

    return processes.command(run, sys.argv[1:] if argv is None else argv) or int(not all(passed))


def _main(argv: list[str]) -> bool:
    first = argv[0] if argv and not argv[0].startswith("-") else ""
    options, overrides = parse("verify", argv[1:] if first else argv, OPTIONS)
    if not first:
        raise UserError("name a model folder first: python -m jaxft.verify DIR [--out FILE]")
    if overrides:
        raise UserError(f"--config.{overrides[0][0]} has no use here: verify reads a model folder")
    if not (far := options.get("long", "4096")).isdigit():
        raise UserError(f"--long={far!r} must be a position, such as 4096")
    folder = Path(first) if Path(first).is_dir() else Path.cwd()
    out = Path(options.get("out", folder / "parity.json"))
    certificate, checks = certify(first, int(far))
    write(out, certificate)
    show(checks, out)
    return all(check.passed for check in checks)


def certify(spec: str, far: int = 4096) -> tuple[dict[str, Any], list[Check]]:
    """Return (certificate, checks) of the model that `spec` names.

    `far` is the first far position of a language model. Raises UserError for a model that cannot be
    compared. The family is that of `jaxft.load`.
    """
    family = family_of(spec)
    if family == "pipeline":
        return diffusion.certify(spec)
    if family == "autoencoder":
        return autoencoder.certify(spec)
    if family == "image_tokens":
        return image_tokens.certify(spec, far)
    if is_classifier(config_in(Path(spec).expanduser())):
        return classifier.certify(spec, far)
    return llm.certify(spec, far)
