"""Specs of several sources, such as `0.7*jsonl:a.jsonl + 0.3*hf:b`, and the shares of each."""

import math
import re
from pathlib import Path
from typing import NamedTuple

from jaxft.core.errors import UserError

_PLUS = re.compile(r"\s+\+\s+")
_WEIGHTED = re.compile(r"(?P<weight>-?[\d.]+(?:e-?\d+)?)\s*\*\s*(?P<spec>[^*].*)")


class Mixture(NamedTuple):
    """Specs of the parts, and the share of the drawn examples of each. No shares: by size."""

    specs: tuple[str, ...]
    shares: tuple[float, ...] = ()


def read_mixture(spec: str) -> Mixture:
    """Split a spec at its " + ". A single source has no share.

    Raises UserError for a weight that is not a positive number, and for some weights but not all.
    """
    parts = _PLUS.split(spec.strip())
    if len(parts) < 2 or Path(spec).expanduser().exists():
        return Mixture((spec,))
    found = [_WEIGHTED.fullmatch(part) for part in parts]
    if not any(found):
        return Mixture(tuple(parts))
    weights, specs = [], []
    for part, match in zip(parts, found, strict=True):
        weight = _number(match["weight"]) if match else math.nan
        if match is None or not 0 < weight < math.inf:
            raise UserError(
                f"{spec!r}: the part {part!r} needs a positive weight, as in"
                " 0.7*a.jsonl + 0.3*b.jsonl; leave out all weights to mix by size"
            )
        weights.append(weight)
        specs.append(match["spec"])
    return Mixture(tuple(specs), tuple(weight / sum(weights) for weight in weights))


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def check_weights(spec: str, training: bool) -> Mixture:
    """Return the parts of a set. Raises UserError for weights where all is evaluated once."""
    mixture = read_mixture(spec)
    if mixture.shares and not training:
        raise UserError(
            f"data.eval={spec!r}: all of it is evaluated once, so weights have no effect:"
            f" write {' + '.join(mixture.specs)}"
        )
    return mixture
