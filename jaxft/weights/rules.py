"""The weight table engine: one list of rules maps a checkpoint to parameters and back.

A rule is `(torch key, jaxft path, layout)`. In a key `{i}` is the index of a layer, and all layers
are stacked on axis 0 of one parameter, whose path has no `{i}`. Where blocks of a model differ, a
rule names the layers that it stacks. `{e}` is the index of an expert, and the experts of a layer
are stacked on axis 1. Any other `{name}` matches the same text on both sides: any
text if the name starts with p, else digits. The layout is written torch -> jaxft, such as
"(n h) d -> d n h". Export reverses the arrow. An empty layout keeps the shape.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np

from jaxft.core.errors import UserError
from jaxft.core.params import Leaf


class Rule(NamedTuple):
    """One line of a weight table: the checkpoint's key, jaxft's path, the order of dims.

    layers: the values of `{i}` that this line stacks, in their order. None: 0, 1, 2, ...
    """

    key: str
    path: str
    layout: str = ""
    layers: range | None = None


class Entry(NamedTuple):
    """One parameter and the checkpoint tensors that fill it (one a layer if it is stacked).

    experts: the number of tensors of each layer if they are its experts', else 0.
    """

    path: str
    keys: tuple[str, ...]
    layout: str
    stacked: bool
    experts: int = 0

    def place(self, number: int) -> tuple[int, ...]:
        """Return the indices of a tensor in the parameter, () if it is the parameter."""
        if self.experts:
            return divmod(number, self.experts)
        return (number,) if self.stacked else ()

    def one(self, of_dims: Sequence[Any]) -> tuple[Any, ...]:
        """Return those of a tensor from the dims, axes or the like of the parameter."""
        return tuple(of_dims[len(self.place(0)) :])


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
    """Match every tensor to exactly one rule, and every parameter to its tensors.

    `shapes` holds the tensors of the checkpoint, `sizes` the lengths of dims that layouts name,
    `ignore` patterns of keys to leave out. `where` begins the error's text.
    Returns: an entry for each parameter.
    Raises: one UserError that lists missing, unexpected, ambiguous and misshaped tensors.
    """
    rules = tuple(rules)
    skip = re.compile("|".join(ignore) or r"(?!)")
    found: dict[str, dict[tuple[int, ...], tuple[str, str]]] = {}
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
    """Return the entries of a checkpoint of this model, from its parameters alone.

    Where two rules match a parameter (old and new names), the first rule gives the tensor's key.
    Raises: AssertionError for a parameter without a rule.
    """
    rules, problems = tuple(rules), []
    entries = [_generate(path, leaf, rules, problems) for path, leaf in leaves.items()]
    if problems:
        raise AssertionError(f"no rule for {problems}")
    return [entry for entry in entries if entry]


def in_class(key: str, names: Iterable[tuple[str, str]]) -> str:
    """Return a key with the start that transformers' class has for it, by pairs of starts."""
    for start, other in names:
        if key.startswith(start):
            return other + key.removeprefix(start)
    return key


def renamed(table: Iterable[Rule], key: str) -> tuple[str, str] | None:
    """Return (path, layout) by the first rule of a table that matches the key, or None."""
    found = (target for rule in table if (target := _target(rule, key)))
    return next(((path, layout) for path, _, layout in found), None)


def to_jax(tensor: np.ndarray, layout: str, sizes: Sizes) -> np.ndarray:
    """Return one checkpoint tensor in jaxft's layout."""
    return rearrange(tensor, layout, sizes) if layout else tensor


def to_torch(array: np.ndarray, layout: str, sizes: Sizes) -> np.ndarray:
    """Return one layer's parameter in the checkpoint's layout, contiguous: the inverse of `to_jax`.

    `layout` is the rule's, torch -> jaxft.
    """
    if not layout:
        return np.ascontiguousarray(array)
    left, right = layout.split("->")
    return np.ascontiguousarray(rearrange(array, f"{right} -> {left}", sizes))


def rearrange(array: np.ndarray, layout: str, sizes: Sizes) -> np.ndarray:
    """Split, transpose and merge dims by one arrow, as `einops.rearrange` does.

    Only named dims, groups in parentheses and the literal 1 are supported.
    Raises: ValueError for a shape that does not fit the left side.
    """
    left, right = (_groups(side) for side in layout.split("->"))
    dims = _solve(left, array.shape, sizes)
    order = [name for group in left for name in group]
    split = array.reshape([dims[name] for name in order])
    moved = split.transpose([order.index(name) for group in right for name in group])
    return moved.reshape([prod(dims[name] for name in group) for group in right])


def rearranged_shape(shape: tuple[int, ...], layout: str, sizes: Sizes) -> tuple[int, ...]:
    """Return the shape of `rearrange`'s result. Raises as `rearrange`."""
    if not layout:
        return tuple(shape)
    left, right = (_groups(side) for side in layout.split("->"))
    dims = _solve(left, shape, sizes)
    return tuple(prod(dims[name] for name in group) for group in right)


def _groups(side: str) -> list[list[str]]:
    """Parse one side of a layout: `"(n h) d 1"` gives [["n", "h"], ["d"], []]."""
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


def _target(rule: Rule, key: str) -> tuple[str, tuple[int, ...], str] | None:
    """Return (path, place, layout) if the rule matches this torch key, else None.

    The place is as in `Entry.place`.
    """
    match = re.fullmatch(_pattern(rule.key), key)
    if not match:
        return None
    names = match.groupdict()
    place = tuple(int(names.pop(name)) for name in ("i", "e") if name in names)
    if rule.layers is not None:
        if place[0] not in rule.layers:
            return None
        place = (rule.layers.index(place[0]), *place[1:])
    return rule.path.format(**names), place, rule.layout


@cache  # a plan asks for each rule once a tensor
def _pattern(template: str) -> str:
    """Return a template as a regex. The second use of a name is a back-reference."""
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
            layers = rule.layers or range(leaf.shape[0] if stacked else 1)
            experts = leaf.shape[1] if "{e}" in rule.key else 0
            keys = tuple(
                rule.key.format(i=i, e=e, **match.groupdict())
                for i in layers
                for e in range(experts or 1)
            )
            return Entry(path, keys, rule.layout, stacked, experts)
    problems.append(f"parameter {path} has no rule")
    return None


def _entry(
    path: str,
    leaf: Leaf,
    found: dict[tuple[int, ...], tuple[str, str]],
    rules: tuple[Rule, ...],
    problems: list[str],
) -> Entry | None:
    wanted = _generate(path, leaf, rules, problems)
    if wanted is None:
        return None
    places = [wanted.place(number) for number in range(len(wanted.keys))]
    missing = [key for place, key in zip(places, wanted.keys, strict=True) if place not in found]
    surplus = [found[place][0] for place in sorted(found.keys() - set(places))]
    problems += [f"missing tensor {key}" for key in missing]
    problems += [f"unexpected tensor {key}" for key in surplus]
    if missing or surplus:
        return None
    keys = tuple(found[place][0] for place in places)
    return wanted._replace(keys=keys, layout=found[places[0]][1])


def _misshaped(entry: Entry, leaf: Leaf, shapes: Shapes, sizes: Sizes) -> list[str]:
    want = entry.one(leaf.shape)
    lines = []
    for key in entry.keys:
        try:
            got = rearranged_shape(shapes[key], entry.layout, sizes)
        except ValueError as error:
            lines.append(f"tensor {key} has shape {tuple(shapes[key])}: {error}")
            continue
        if got != want:
            lines.append(f"tensor {key} {tuple(shapes[key])} gives {got}, but the model has {want}")
    return lines


def _first(problems: list[str], count: int = 12) -> str:
    more = f"; and {len(problems) - count} more" if len(problems) > count else ""
    return "; ".join(problems[:count]) + more
