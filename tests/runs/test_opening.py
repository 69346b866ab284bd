"""Opening of a run: which parameters train."""

from jaxft.core.params import CONSTANT_ROLE, describe
from jaxft.runs import opening


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
