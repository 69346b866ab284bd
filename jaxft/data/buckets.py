"""Aspect-ratio buckets: which picture sizes exist, and batches of one size each."""

import math
from collections.abc import Sequence

from jaxft.core.errors import UserError

Size = tuple[int, int]  # height, width


def make_buckets(resolution: int, multiple: int, max_ratio: float = 2.0) -> tuple[Size, ...]:
    """Sizes (h, w) of about resolution^2 pixels and never more, sorted from wide to tall.

    Each long side comes with the longest short side; both are multiples of `multiple`, and at
    most `max_ratio` apart. The square is one of them. As in SDXL (arXiv 2307.01952, section 2.2).
    """
    if multiple < 1 or resolution < multiple or resolution % multiple:
        raise UserError(
            f"resolution={resolution} must be a multiple of {multiple}, such as "
            f"{max(1, round(resolution / max(multiple, 1))) * multiple}"
        )
    sizes = set()
    for long in range(resolution, int(resolution * max_ratio) + 1, multiple):
        short = resolution**2 // long // multiple * multiple
        if long <= max_ratio * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes, key=lambda size: (size[0] / size[1], size)))


def assign(original_size: Size, buckets: Sequence[Size]) -> int:
    """Index of the bucket (h, w) whose aspect ratio is nearest on a log scale."""
    ratio = math.log(original_size[0] / original_size[1])
    distances = [abs(math.log(h / w) - ratio) for h, w in buckets]
    return min(range(len(buckets)), key=distances.__getitem__)
