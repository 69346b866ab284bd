"""Loops over layers and over tokens: the form of each that is fastest on a device."""

from jaxft.core.runtime import device

SCAN_MIN_LAYERS = 9  # on a CPU, fewer layers are compiled one by one
UNSTACKED_BYTES = 2**30  # most bytes of layers that decoding holds a second time
CACHE_SPANS, SMALLEST_CACHE_SPAN = 4, 32  # most spans of tokens between two growths of a cache


def unrolls(layers: int) -> bool:
    """Return True if a step over so many layers is compiled layer by layer, without a loop.

    A loop on a CPU copies the weights of each layer, and stacks the arrays for the backward pass.
    """
    return device().platform == "cpu" and layers < SCAN_MIN_LAYERS


def unstacks(nbytes: int) -> bool:
    """Return True if decoding holds its layers, of so many bytes, one by one beside their stack.

    On a CPU the loop over tokens reads them in place. From a stack it copies each layer for each
    token.
    """
    return device().platform == "cpu" and nbytes <= UNSTACKED_BYTES


def cache_growth(count: int) -> list[int]:
    """Return the numbers of decoded tokens at which the spans of a cache end. The last is `count`.

    On a CPU every slot that attention reads costs time, so the cache grows span by span. Other
    devices allocate all slots at once.
    """
    spans = 1
    if device().platform == "cpu":
        spans = max(1, min(CACHE_SPANS, count // SMALLEST_CACHE_SPAN))
    return [count * (i + 1) // spans for i in range(spans)]
