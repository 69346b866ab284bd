"""Loops over layers and over tokens: how much of them a device runs better unrolled."""

from jaxft.core.runtime import device

SCAN_MIN_LAYERS = 9  # a CPU's step is compiled for fewer layers one by one
UNSTACKED_BYTES = 2**30  # of layers, held a second time while decoding
CACHE_SPANS, SMALLEST_CACHE_SPAN = 4, 32  # of tokens that are decoded before a cache grows


def unrolls(layers: int) -> bool:
    """Return whether a step over so many layers is compiled layer by layer, without a loop.

    A CPU's loop copies the weights of each layer, and stacks what its backward pass reads.
    """
    return device().platform == "cpu" and layers < SCAN_MIN_LAYERS


def unstacks(nbytes: int) -> bool:
    """Return whether decoding holds its layers, of so many bytes, apart from their stack.

    A CPU's loop over tokens reads them in place then. From a stack it copies each layer for each
    token.
    """
    return device().platform == "cpu" and nbytes <= UNSTACKED_BYTES


def cache_growth(count: int) -> list[int]:
    """Return the numbers of decoded tokens at which a cache grows, the last of them `count`.

    A CPU is slowed down by every slot that attention reads. Other devices allocate all at once.
    """
    spans = 1
    if device().platform == "cpu":
        spans = max(1, min(CACHE_SPANS, count // SMALLEST_CACHE_SPAN))
    return [count * (i + 1) // spans for i in range(spans)]
