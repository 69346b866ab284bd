"""The language-model task's own counts."""

import numpy as np

from jaxft.data.text import Example, collate_rows
from jaxft.tasks.llm import LLM


def test_throughput_counts_a_packed_token_once():
    """Segments count up along a shared row, so their sum would count its last example often."""
    example = Example(np.arange(5, dtype=np.int32), np.ones(5, np.float32))
    packed = collate_rows([[example] * 3, [example]], 16)
    assert LLM.__new__(LLM).units(packed) == 4 * 4
