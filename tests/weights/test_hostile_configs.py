"""config.json files with any value at any key: read, or refused in one line, and soon."""

import json
import math
import time

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.weights.fields import fields
from tests.published import FOLDER

VALUES = [
    *(None, True, False, 0, -1, 1, 2, 7, 10**6, 10**12, 0.5, math.nan, math.inf, -math.inf, 1e300),
    *("", "x", "false", "../x", "9" * 400),
    *([], [1], [None], ["x"], [[1, 2], [3]], [True] * 3, {}, {"a": 1}),
    {"type": "linear", "factor": None},
]
EXTRA = ("rope_scaling", "rope_parameters", "layer_types", "sliding_window")
# One published file for each class that is read.
FILES = sorted(FOLDER.rglob("config.json"))
READ = {}
for file in FILES:
    config = json.loads(file.read_text())
    if family := registry.find_family(config):
        READ.setdefault((config.get("model_type"), config.get("_class_name")), (family, config))


@pytest.mark.parametrize("kind", READ, ids=str)
def test_case_10_any_value_is_read_or_refused_in_one_line(kind):
    family, config = READ[kind]
    count = 0
    for key in (*config, *EXTRA):
        for value in VALUES:
            began = time.monotonic()
            try:
                with np.errstate(all="ignore"):
                    changed = {**config, key: value}
                    registry.find(changed, family).config(changed, "config.json")
            except UserError as error:
                assert "\n" not in str(error) and len(str(error)) < 1500
                count += 1
            assert time.monotonic() - began < 3, (key, value)
    assert count > len(config)


def test_case_10_the_classes_of_the_published_files():
    assert {family for family, _ in READ.values()} >= {"decoder", "denoiser", "autoencoder"}
    assert len(READ) >= 9


@pytest.mark.parametrize(
    ("default", "value", "expected"),
    [
        (3, "3", "an integer from 1 to 16777216"),
        (3, True, "an integer from 1 to"),
        (3, 0, "an integer from 1 to"),
        (1e-5, math.nan, "a number such as 1e-05"),
        (1e-5, True, "a number such as"),
        (True, "false", "true or false"),
        ("silu", ["silu"], "a text such as 'silu'"),
        ((64,), 64, r"a list such as \[64\]"),
        ((64,), [64, "64"], r"a list such as \[64\]"),
    ],
)
def test_case_10_types_and_ranges(default, value, expected):
    with pytest.raises(UserError, match=rf"a\.json: x=.* is not supported; expected {expected}"):
        fields({"x": value}, {"x": default}, {}, "a.json")
    fields({"x": default}, {"x": default}, {}, "a.json")


def test_case_10_a_million_layers_are_refused_by_the_name_of_the_key():
    with pytest.raises(UserError, match=r"num_layers=1000000 .* an integer from 1 to 10000"):
        fields({"num_layers": 10**6}, {"num_layers": 2}, {}, "a.json")
    with pytest.raises(UserError, match=r"num_hidden_layers=1000000; .* from 1 to 10000"):
        registry.read_decoder({"model_type": "llama", "num_hidden_layers": 10**6})
