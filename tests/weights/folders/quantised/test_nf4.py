"""Folders of bitsandbytes whose arrays do not fit. Whole ones: tests/parity/test_bitsandbytes_*."""

import json

import numpy as np
import pytest

from jaxft.core.errors import UserError
from jaxft.nn.quantised import NF4_TABLES
from jaxft.weights.folders.quantised.nf4 import STATE, PackedTensors
from jaxft.weights.views import InMemory


@pytest.mark.parametrize("cut", ["w", "w.absmax"])
def test_arrays_of_nf4_that_are_too_short_are_named(cut):
    state = json.dumps({"blocksize": 64, "shape": [2, 64]}).encode()
    tensors = {
        "w": np.zeros(64, np.uint8),
        "w.absmax": np.ones(2, np.float32),
        "w.quant_map": NF4_TABLES["quant_map"],
        f"w.{STATE}": np.frombuffer(state, np.uint8),
    }
    assert PackedTensors(InMemory(tensors), "x", NF4_TABLES).read("w").tolist() == [[-1.0] * 64] * 2
    tensors[cut] = tensors[cut][:1]
    with pytest.raises(
        UserError, match=r"x: the sizes of w and w\.\* are not those of config.json"
    ):
        PackedTensors(InMemory(tensors), "x", NF4_TABLES).read("w")
