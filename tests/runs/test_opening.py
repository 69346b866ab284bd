"""Opening of a run: which parameters train, and in which order caches get them."""

from types import SimpleNamespace

import numpy as np

from jaxft.core.params import CONSTANT_ROLE, describe
from jaxft.runs import opening
from jaxft.tasks import Data


def test_t07_a_constant_of_the_model_never_trains(make_folder, make_config, monkeypatch):
    def described(model):
        leaves = describe(model)
        return leaves | {"norm.scale": leaves["norm.scale"]._replace(role=CONSTANT_ROLE)}

    config = make_config(make_folder(), {"lora.rank": 0, "trainable": ""})
    chosen = opening.open_run(config).chosen
    monkeypatch.setattr(opening, "describe", described)
    assert opening.open_run(config).chosen == chosen - {"norm.scale"} != chosen
    assert opening.open_run({**config, "trainable": "norm.*|embed.*"}).chosen == {
        "embed_tokens.embedding"
    }


def test_caches_get_parameters_in_the_order_of_all_processes():
    """Each is gathered from all processes, and the order of a set differs between them."""
    params = {f"text_encoder.{i}": np.float32(i) for i in range(50)}
    order = []

    def fill(opened, chosen, sets, load):
        order.extend(load(set(params)))
        return {}

    run = SimpleNamespace(task=SimpleNamespace(encode=fill), opened=None, chosen=set())
    opening.encode(run, Data(), params, 3)
    assert order == list(params)
