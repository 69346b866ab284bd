"""Rank and alpha of each adapter, by projection and by layer of a stack."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from math import sqrt
from typing import NamedTuple

from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError

ENTRY = re.compile(r"\s*(.+?)=(\d+)(?:/(\d[\d.]*(?:e[+-]?\d+)?))?\s*(?:,(?!\s*$)|$)")
SPAN = re.compile(r"(\d+)(?:-(\d+))?")
STACK = re.compile(r"(?:^|(?<=\.))layers(?=\.)")  # the part of a path that stands for all layers


class AdapterSize(NamedTuple):
    """Rank and alpha of the adapter of one layer. Rank 0 is no adapter."""

    rank: int
    alpha: float


def scale(cfg: Lora) -> float:
    """Return alpha / r, or alpha / sqrt(r) with rsLoRA (Kalajdzievski 2023, arXiv:2312.03732)."""
    return cfg.alpha / (sqrt(cfg.rank) if cfg.rslora else cfg.rank)


def sizes(cfg: Lora, path: str, layers: int) -> list[AdapterSize]:
    """Return the size of the adapter of each layer of a projection, if `lora.targets` matches it.

    `layers` is the length of its stack, and 0 for a projection that is not stacked, which has one
    size. The first entry of `lora.ranks` whose regex matches the path decides, either as it is or
    with the number of the layer behind "layers".
    """
    chosen, entries = parse_layers(cfg.layers), parse_ranks(cfg)
    if not layers:
        return [AdapterSize(0, cfg.alpha) if chosen else _size(cfg, entries, (path,))]
    return [
        AdapterSize(0, cfg.alpha)
        if chosen and i not in chosen
        else _size(cfg, entries, (path, layer_path(path, i)))
        for i in range(layers)
    ]


def scales(cfg: Lora, path: str, layers: int) -> list[float]:
    """Return the scale of the adapter of each layer of a projection, 0 for a layer without one."""
    return [
        scale(replace(cfg, rank=size.rank, alpha=size.alpha)) if size.rank else 0.0
        for size in sizes(cfg, path, layers)
    ]


def parse_ranks(cfg: Lora) -> list[tuple[str, AdapterSize]]:
    """Return the entries of `lora.ranks`, "REGEX=RANK, REGEX=RANK/ALPHA", in their order.

    Raises: UserError for a text of another form.
    """
    entries, start, text = [], 0, cfg.ranks
    while start < len(text):
        match = ENTRY.match(text, start)
        if not match:
            raise UserError(
                f"lora.ranks={text!r} is not a list such as '.*mlp.*=16, .*q_proj=4/8'"
                " (a regex, its rank, and its alpha if it is not lora.alpha)"
            )
        size = AdapterSize(int(match[2]), float(match[3]) if match[3] else cfg.alpha)
        try:
            re.compile(match[1])
        except re.error as error:
            raise UserError(
                f"lora.ranks: {match[1]!r} is not a regular expression: {error}"
            ) from None
        entries.append((match[1], size))
        start = match.end()
    return entries


def parse_layers(text: str) -> set[int]:
    """Return the layers of `lora.layers`, such as "0-3,7". An empty text stands for all.

    Raises: UserError for a text of another form.
    """
    found: set[int] = set()
    for piece in text.replace(" ", "").split(",") if text else ():
        match = SPAN.fullmatch(piece)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"lora.layers={text!r} is not a list of layers such as '0-3,7'")
        found |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
    return found


def layer_path(path: str, layer: int) -> str:
    """Return the path of one layer of a stacked projection: layers.3.self_attn.q_proj."""
    return STACK.sub(f"layers.{layer}", path, count=1)


def described(cfg: Lora, found: Sequence[tuple[str, list[AdapterSize]]]) -> Lora:
    """Return settings with `ranks` and `layers` under which `sizes` gives the sizes in `found`.

    `found` holds every adapted path with the sizes of its layers, one for a path without a stack.
    """
    stacks = [some for _, some in found if len(some) > 1]
    present = [{i for i, size in enumerate(some) if size.rank} for some in stacks]
    every = bool(present) and len(stacks) == len(found) and all(p == present[0] for p in present)
    partial = every and len(present[0]) < len(stacks[0])
    layers = ",".join(map(str, sorted(present[0]))) if partial else ""
    entries: list[str] = []
    for path, some in found:
        kept = [(i, size) for i, size in enumerate(some) if not partial or i in present[0]]
        if {size for _, size in kept} == {AdapterSize(cfg.rank, cfg.alpha)}:
            continue
        if len({size for _, size in kept}) == 1:
            entries.append(_entry(path, kept[0][1]))
            continue
        entries += [_entry(layer_path(path, i), size) for i, size in kept]
    return replace(cfg, ranks=", ".join(entries), layers=layers)


def check(cfg: Lora, counts: Iterable[tuple[str, int]]) -> None:
    """Raise UserError for a layer that no stack has, and an entry of `lora.ranks` without a match.

    counts: the path of each projection that `lora.targets` matches, and its number of layers.
    """
    counts = list(counts)
    longest = max((count for _, count in counts), default=0)
    if beyond := {i for i in parse_layers(cfg.layers) if i >= longest}:
        raise UserError(
            f"lora.layers={cfg.layers!r}: there is no layer {max(beyond)}; the last of those that"
            f" lora.targets matches is {longest - 1}"
        )
    names = [path for path, _ in counts]
    names += [layer_path(path, i) for path, count in counts for i in range(count)]
    for regex, _ in parse_ranks(cfg):
        if not any(re.fullmatch(regex, name) for name in names):
            raise UserError(
                f"lora.ranks: {regex!r} matches none of the projections of lora.targets:"
                f" {', '.join(path for path, _ in counts)}"
            )


def _size(cfg: Lora, entries: list[tuple[str, AdapterSize]], names: tuple[str, ...]) -> AdapterSize:
    matches = (size for regex, size in entries if any(re.fullmatch(regex, name) for name in names))
    return next(matches, AdapterSize(cfg.rank, cfg.alpha))


def _entry(path: str, size: AdapterSize) -> str:
    return f"{re.escape(path)}={size.rank}/{float(size.alpha)!r}"
