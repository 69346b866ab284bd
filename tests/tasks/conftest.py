"""Tests of tasks compile code fast: most of their time is the compiler's."""

import pytest


@pytest.fixture(scope="module", autouse=True)
def fast_compiler():
    """Here and in the commands that a test starts, so that both have the same bits."""
    import jax

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
