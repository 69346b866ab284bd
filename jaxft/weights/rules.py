"""The weight table engine: one list of rules maps a checkpoint to parameters and back.

A rule is `(torch key, jaxft path, layout)`. In both names `{i}` is the layer index that is stacked
on axis 0 (the path does not carry it); any other `{name}` stands for the same text on both sides:
digits, or anything when the name starts with p. The layout reads torch -> jaxft, such as
"(n h) d -> d n h"; export flips the arrow. An empty layout keeps the shape.
"""

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import NamedTuple

import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf


class Rule(NamedTuple):
    """One line of a weight table: a checkpoint's key, our path, their dims' order."""

    key: str
    path: str
    layout: str = ""


class Entry(NamedTuple):
    """One parameter and the checkpoint tensors that make it (one a layer when stacked)."""

    path: str
    keys: tuple[str, ...]
    layout: str
    stacked: bool


Shapes = Mapping[str, tuple[int, ...]]
Sizes = Mapping[str, int]


def plan(
    rules: Iterable[Rule],
    leaves: Mapping[str, Leaf],
    shapes: Shapes,
    sizes: Sizes,
    ignore: Iterable[str] = (),
    where: str = "the checkpoint",
) -> list[Entry]:
    """Match every tensor to exactly one rule and every parameter to its tensors, or raise.

    `shapes` are the tensors of the checkpoint, `sizes` the dims that a layout names. All offenders
    are listed in one error: missing, extra, ambiguous and misshaped tensors.
    """
    rules = tuple(rules)
    skip = re.compile("|".join(ignore) or r"(?!)")
    found: dict[str, dict[int, tuple[str, str]]] = {}
    problems: list[str] = []
    for key in shapes:
        if skip.fullmatch(key):
            continue
        targets = [t for rule in rules if (t := _target(rule, key)) and t[0] in leaves]
        if len(targets) != 1:
            problems.append(f"{'unexpected' if not targets else 'ambiguous'} tensor {key}")
            continue
        path, index, layout = targets[0]
        first, _ = found.setdefault(path, {}).setdefault(index, (key, layout))
        if first != key:
            problems.append(f"tensors {first} and {key} are the same parameter {path}")
    entries = []
    for path, leaf in leaves.items():
        entry = _entry(path, leaf, found.get(path, {}), rules, problems)
        if entry:
            problems.extend(_misshaped(entry, leaf, shapes, sizes))
            entries.append(entry)
    if problems:
        raise UserError(f"{where} does not fit the model: {_first(problems)}")
    return entries


def expected(rules: Iterable[Rule], leaves: Mapping[str, Leaf]) -> list[Entry]:
    """The entries that a checkpoint of this model has, from the parameters alone.

    Where two rules can make a parameter (old and new spellings), the first one names the tensor.
    """
    rules, problems = tuple(rules), []
    entries = [_generate(path, leaf, rules, problems) for path, leaf in leaves.items()]
    if problems:
        raise AssertionError(f"no rule for {problems}")
    return [entry for entry in entries if entry]


def renamed(table: Iterable[Rule], key: str) -> tuple[str, str] | None:
    """(path, layout) that the first rule of a table of plain names has for a key, if one has."""
    found = (target for rule in table if (target := _target(rule, key)))
    return next(((path, layout) for path, _, layout in found), None)


def to_jax(tensor: np.ndarray, layout: str, sizes: Sizes) -> np.ndarray:
    """One checkpoint tensor in jaxft's layout."""
    return rearrange(tensor, layout, sizes) if layout else tensor


def to_torch(array: np.ndarray, layout: str, sizes: Sizes) -> np.ndarray:
    """The inverse of `to_jax`, contiguous."""
    if not layout:
        return np.ascontiguousarray(array)
    left, right = layout.split("->")
    return np.ascontiguousarray(rearrange(array, f"{right} -> {left}", sizes))


def rearrange(array: np.ndarray, layout: str, sizes: Sizes) -> np.ndarray:
    """`einops.rearrange` for one arrow: split, transpose, merge (and literal 1 dims)."""
    left, right = (_groups(side) for side in layout.split("->"))
    dims = _solve(left, array.shape, sizes)
    order = [name for group in left for name in group]
    split = array.reshape([dims[name] for name in order])
    moved = split.transpose([order.index(name) for group in right for name in group])
    return moved.reshape([prod(dims[name] for name in group) for group in right])


def rearranged_shape(shape: tuple[int, ...], layout: str, sizes: Sizes) -> tuple[int, ...]:
    """The shape that `rearrange` gives."""
    if not layout:
        return tuple(shape)
    left, right = (_groups(side) for side in layout.split("->"))
    dims = _solve(left, shape, sizes)
    return tuple(prod(dims[name] for name in group) for group in right)


def _groups(side: str) -> list[list[str]]:
    """`"(n h) d 1"` as [["n", "h"], ["d"], []]."""
    tokens = re.findall(r"\(([^)]*)\)|(\S+)", side)
    return [group.split() if not one else ([] if one == "1" else [one]) for group, one in tokens]


def _solve(groups: list[list[str]], shape: tuple[int, ...], sizes: Sizes) -> dict[str, int]:
    if len(groups) != len(shape):
        raise ValueError(f"{len(groups)} dims expected")
    dims: dict[str, int] = {}
    for group, length in zip(groups, shape, strict=True):
        unknown = [name for name in group if name not in sizes]
        known = prod(sizes[name] for name in group if name in sizes)
        if len(unknown) > 1 or length % known or (not unknown and length != known):
            raise ValueError(f"{length} does not split into {' x '.join(group) or 1}")
        dims.update({name: sizes[name] for name in group if name in sizes})
        dims.update(dict.fromkeys(unknown, length // known))
    return dims


def _target(rule: Rule, key: str) -> tuple[str, int, str] | None:
    """(path, layer, layout) if the rule covers this torch key."""
    match = re.fullmatch(_pattern(rule.key), key)
    if not match:
        return None
    names = match.groupdict()
    layer = int(names.pop("i", 0) or 0)
    return rule.path.format(**names), layer, rule.layout


def _pattern(template: str) -> str:
    """A template as a regex; a name's second use is a back-reference."""
    seen: set[str] = set()

    def group(match: re.Match) -> str:
        name = match[1]
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{'.+' if name.startswith('p') else '[0-9]+'})"

    parts = re.split(r"(\{\w+\})", template)
    return "".join(re.sub(r"\{(\w+)\}", group, p) if "{" in p else re.escape(p) for p in parts)


def _generate(path: str, leaf: Leaf, rules: tuple[Rule, ...], problems: list[str]) -> Entry | None:
    for rule in rules:
        match = re.fullmatch(_pattern(rule.path), path)
        stacked = "{i}" in rule.key
        if match and stacked == leaf.stacked:
            count = leaf.shape[0] if stacked else 1
            keys = tuple(rule.key.format(i=i, **match.groupdict()) for i in range(count))
            return Entry(path, keys, rule.layout, stacked)
    problems.append(f"parameter {path} has no rule")
    return None


def _entry(
    path: str,
    leaf: Leaf,
    found: dict[int, tuple[str, str]],
    rules: tuple[Rule, ...],
    problems: list[str],
) -> Entry | None:
    wanted = _generate(path, leaf, rules, problems)
    if wanted is None:
        return None
    missing = [key for i, key in enumerate(wanted.keys) if i not in found]
    surplus = [found[i][0] for i in found if i >= len(wanted.keys)]
    problems += [f"missing tensor {key}" for key in missing]
    problems += [f"unexpected tensor {key}" for key in surplus]
    if missing or surplus:
        return None
    keys = tuple(found[i][0] for i in range(len(wanted.keys)))
    return Entry(path, keys, found[0][1], wanted.stacked)


def _misshaped(entry: Entry, leaf: Leaf, shapes: Shapes, sizes: Sizes) -> list[str]:
    want = leaf.shape[1:] if entry.stacked else leaf.shape
    lines = []
    for key in entry.keys:
        try:
            got = rearranged_shape(shapes[key], entry.layout, sizes)
        except ValueError as error:
            lines.append(f"tensor {key} has shape {tuple(shapes[key])}: {error}")
            continue
        if got != want:
            lines.append(f"tensor {key} {tuple(shapes[key])} gives {got}, the config asks {want}")
    return lines


def _first(problems: list[str], count: int = 12) -> str:
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more
