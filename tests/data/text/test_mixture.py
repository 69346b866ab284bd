"""Mixtures of tokenised sets: the examples of each part as alone, and the sums of their counts."""

import json

import numpy as np
import pytest

from jaxft.data.loader import SourceShare
from jaxft.data.text.dataset import load_text
from jaxft.data.text.mixture import MixedText
from tests.data.text.test_dataset import TEMPLATE, make_tokenizer


@pytest.fixture
def parts(tmp_path):
    sets = {
        "a": [{"prompt": f"q{i}", "completion": " a" * i} for i in range(4)],  # the first is empty
        "b": [{"text": "long " * 40}],
        "c": [{"text": f"t{i}", "label": "xy"[i % 2]} for i in range(4)],
    }
    made = []
    for name, rows in sets.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made.append(load_text(str(file), make_tokenizer(), seq_len=16, template=TEMPLATE))
    return made


def test_a_mixture_has_the_examples_of_its_parts(parts):
    mixed = MixedText("a + b + c", parts, (0.5, 0.25, 0.25))
    alone = [(part, i) for part in parts for i in range(len(part))]
    assert len(mixed) == len(alone) == len(mixed.record_ids) == len(mixed.n_bytes)
    for index, (part, i) in enumerate(alone):
        np.testing.assert_array_equal(mixed[index].tokens, part[i].tokens)
        np.testing.assert_array_equal(mixed[index].weights, part[i].weights)
        assert mixed.inputs(index) == part.inputs(i) and mixed.n_bytes[index] == part.n_bytes[i]
        record = part.records[int(part.record_ids[i])]
        assert mixed.records[int(mixed.record_ids[index])] == record
    assert mixed.labels == ("x", "y")
    assert mixed.shares == tuple(
        SourceShare(len(part), share) for part, share in zip(parts, (0.5, 0.25, 0.25), strict=True)
    )


def test_counts_are_sums_and_the_longest_is_the_longest(parts):
    mixed = MixedText("a + b + c", parts, ())
    assert mixed.shares == () and mixed.report.keys() == parts[0].report.keys()
    for name, value in mixed.report.items():
        values = [part.report[name] for part in parts]
        assert value == (max(values) if name == "longest_trained" else sum(values)), name
