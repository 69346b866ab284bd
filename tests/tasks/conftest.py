"""Tests of tasks compile code fast: most of their time is the compiler's."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def fast_compiler():
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
