"""Loops: what a CPU unrolls and unstacks, and when its cache grows."""

import pytest

from jaxft.kernels import loops
from tests.devices import traced_for


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_accelerators_keep_loops_stacks_and_whole_caches(platform):
    with traced_for(platform):
        assert not loops.unrolls(1) and not loops.unstacks(1)
        assert loops.cache_growth(1000) == [1000]


def test_a_cpu_unrolls_few_layers_and_unstacks_small_ones():
    least, most = loops.SCAN_MIN_LAYERS, loops.UNSTACKED_BYTES
    assert loops.unrolls(least - 1) and not loops.unrolls(least)
    assert loops.unstacks(most) and not loops.unstacks(most + 1)


@pytest.mark.parametrize(
    ("count", "ends"),
    [(1, [1]), (63, [63]), (64, [32, 64]), (130, [32, 65, 97, 130]), (256, [64, 128, 192, 256])],
)
def test_a_cpus_cache_grows_in_at_most_four_steps(count, ends):
    assert loops.cache_growth(count) == ends
