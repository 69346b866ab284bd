"""Curves of a run as inline SVG, in the colours of the page."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

WIDTH, HEIGHT = 360, 200  # of the drawing, which the page scales
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 10, 24  # margins around the curves
POINTS = 300  # of a curve, at most
SMOOTH = 0.05  # share of a curve that the moving average spans


class Series(NamedTuple):
    """A curve: steps and values, and its look ("line", "faint" or "dots")."""

    name: str
    steps: Sequence[float]
    values: Sequence[float]
    look: str = "line"


def chart(title: str, series: Sequence[Series]) -> str:
    """Return a figure with the curves, or "" if none has two points.

    A faint curve (the noisy loss of single steps) does not decide the range alone: its outer
    hundredths are cut off.
    """
    series = [one for one in series if one.values]
    if max((len(one.values) for one in series), default=0) < 2:
        return ""
    low, high = _range(series)
    ticks = _ticks(low, high)
    low, high = min(low, ticks[0]), max(high, ticks[-1])
    first = min(one.steps[0] for one in series)
    last = max(max(one.steps[-1] for one in series), first + 1)

    def place(step: float, value: float) -> tuple[float, float]:
        x = _LEFT + (step - first) / (last - first) * (WIDTH - _LEFT - _RIGHT)
        y = HEIGHT - _BOTTOM - (value - low) / (high - low) * (HEIGHT - _TOP - _BOTTOM)
        return round(x, 1), round(min(max(y, _TOP), HEIGHT - _BOTTOM), 1)

    parts = []
    for tick in ticks:
        _, y = place(first, tick)
        parts.append(f'<path class="grid" d="M{_LEFT} {y}H{WIDTH - _RIGHT}"/>')
        parts.append(f'<text x="{_LEFT - 5}" y="{y + 3.5}" text-anchor="end">{short(tick)}</text>')
    for tick in _ticks(first, last, 4):
        if first <= tick <= last:
            x, _ = place(tick, low)
            parts.append(
                f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{short(tick)}</text>'
            )
    for number, one in enumerate(series):
        parts += _curve(one, number, [(*p, *place(*p)) for p in _thinned(one)])
    key = "".join(
        f'<span class="key c{i} {one.look}">{html.escape(one.name)}</span>'
        for i, one in enumerate(series)
        if one.name
    )
    label = html.escape(title)
    return (
        f'<figure class="chart"><figcaption>{label}{key}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label} by step">'
        f"{''.join(parts)}</svg></figure>"
    )


def smoothed(name: str, steps: Sequence[float], values: Sequence[float]) -> list[Series]:
    """Return the values as a faint curve and their moving average, or as one curve if few."""
    if len(values) < 30:
        return [Series(name, steps, values)]
    keep, level, averaged = 1 - 1 / max(2.0, SMOOTH * len(values)), values[0], []
    for value in values:
        level = keep * level + (1 - keep) * value
        averaged.append(level)
    return [
        Series(f"{name}, average", steps, averaged),
        Series("each step", steps, values, "faint"),
    ]


def short(value: float) -> str:
    """Return a number in few characters: 15k, 0.25, 1.5e-4."""
    if 0 < abs(value) < 1e-3:
        digits, _, power = f"{value:.1e}".partition("e")
        return f"{digits.removesuffix('.0')}e{int(power)}"
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.4g}"


def _range(series: Sequence[Series]) -> tuple[float, float]:
    values: list[float] = []
    for one in series:
        ordered = sorted(one.values)
        cut = len(ordered) // 100 if one.look == "faint" else 0
        values += [ordered[cut], ordered[-1 - cut]]
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - abs(low or 1) / 10, high + abs(high or 1) / 10)


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers that cover a range."""
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    size = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= rough * 0.999)
    begin, end = math.floor(low / size + 1e-9), math.ceil(high / size - 1e-9)
    return [i * size for i in range(begin, end + 1)]


def _thinned(one: Series) -> list[tuple[float, float]]:
    points = list(zip(one.steps, one.values, strict=True))
    every = -(-len(points) // POINTS)
    return [*points[:-1:every], points[-1]]


def _curve(one: Series, number: int, points: list[tuple[float, float, float, float]]) -> list[str]:
    """Return the path of a curve through points (step, value, x, y)."""
    path = "M" + "L".join(f"{x} {y}" for _, _, x, y in points)
    parts = [f'<path class="c{number} {one.look}" d="{path}"/>']
    for step, value, x, y in points if one.look == "dots" else ():
        title = f"<title>step {step:g}: {value:.4g}</title>"
        parts.append(f'<circle class="c{number}" cx="{x}" cy="{y}" r="2.6">{title}</circle>')
    return parts
