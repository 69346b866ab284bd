"""The members of a sweep: adapters that one run trains, with other values of a few keys."""

import math
import re
from collections.abc import Mapping
from itertools import product
from typing import Any, NamedTuple

from jaxft.core.configs.values import convert
from jaxft.core.errors import UserError

SWEPT = {"optim.lr": float, "lora.rank": int, "lora.alpha": float, "seed": int}
EXAMPLE = "optim.lr=1e-4,2e-4 seed=0,1"
_NUMBER = re.compile(r"\d[\d.]*(?:e[+-]?\d+)?")  # a part of the name of a folder


class Member(NamedTuple):
    """One adapter of a sweep: its name, and the values of its keys."""

    name: str
    values: Mapping[str, Any]


def read_sweep(text: str) -> tuple[Member, ...]:
    """Return a member for each combination of the values in `sweep`, () for an empty text.

    text: "optim.lr=1e-4,2e-4 seed=0,1", whose first member is named lr1e-4-seed0.
    Raises: UserError for another form, an unknown key, a bad value, and for less than two members.
    """
    columns: dict[str, dict[Any, str]] = {}  # by key and value, the text of the value
    for part in re.sub(r"\s*([,=])\s*", r"\1", text).split():
        key, _, listed = part.partition("=")
        if key not in SWEPT or key in columns:
            problem = "stands there twice" if key in columns else f"is none of {', '.join(SWEPT)}"
            raise UserError(f"sweep={text!r}: {key!r} {problem}; write it as sweep={EXAMPLE!r}")
        columns[key] = {}
        for one in listed.split(","):
            value = _value(text, key, one)
            if value in columns[key]:
                raise UserError(f"sweep={text!r}: {key} has {one} twice; leave one out")
            columns[key][value] = one
    names = [key.rpartition(".")[2] for key in columns]
    members = [
        Member(
            "-".join(f"{name}{one}" for name, (_, one) in zip(names, pairs, strict=True)),
            {key: value for key, (value, _) in zip(columns, pairs, strict=True)},
        )
        for pairs in product(*(column.items() for column in columns.values()))
    ]
    if text and len(members) < 2:
        raise UserError(f"sweep={text!r} is one adapter; give at least two, as in {EXAMPLE!r}")
    return tuple(members) if text else ()


def _value(text: str, key: str, one: str) -> Any:
    if one.startswith("-"):
        raise UserError(f"sweep={text!r}: {key}={one} must not be below 0")
    if not _NUMBER.fullmatch(one):
        raise UserError(f"sweep={text!r}: {one!r} is no number; write it as sweep={EXAMPLE!r}")
    try:
        value = convert(key, one, SWEPT[key])
    except UserError:
        kind = "whole number" if SWEPT[key] is int else "number"
        raise UserError(f"sweep={text!r}: {key}={one} must be a {kind}") from None
    if not math.isfinite(value) or (not value and key != "seed"):
        raise UserError(f"sweep={text!r}: {key}={one} must be above 0, and no infinity")
    return value
