"""Ranks of projections and layers: their text, and the zeros that fill up a stack."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxft.core import optim
from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.core.params import bind, describe, flatten
from jaxft.nn import lora
from jaxft.weights.adapters import ranks
from jaxft.weights.adapters.ranks import AdapterSize
from tests.nn.test_lora import LAYERS, make

CFG = Lora(
    rank=4,
    alpha=8.0,
    targets="all-linear",
    ranks=r".*o_proj=6/12.0, layers\.1\.q_proj=2/4, layers\.2\.k_proj=0",
)


def test_the_first_entry_that_matches_decides():
    assert ranks.sizes(CFG, "layers.o_proj", 3) == [AdapterSize(6, 12.0)] * 3
    assert ranks.sizes(CFG, "layers.q_proj", 3) == [
        AdapterSize(4, 8.0),
        AdapterSize(2, 4.0),
        AdapterSize(4, 8.0),
    ]
    assert ranks.sizes(CFG, "layers.k_proj", 3) == [
        AdapterSize(4, 8.0),
        AdapterSize(4, 8.0),
        AdapterSize(0, 8.0),
    ]
    assert ranks.sizes(CFG, "lm_head", 0) == [AdapterSize(4, 8.0)]
    both = Lora(4, 8.0, ".*", ranks=r"layers\.[^.]{1,2}=3, layers\.x\.y=5,.*=7")
    assert ranks.sizes(both, "layers.ab", 1) == [AdapterSize(3, 8.0)]
    assert ranks.sizes(both, "a.layers.b", 1) == [AdapterSize(7, 8.0)]
    assert ranks.sizes(Lora(4, 8.0, ".*", layers="0-1"), "m.layers.b", 3)[2] == AdapterSize(0, 8.0)
    assert ranks.sizes(Lora(4, 8.0, ".*", layers="0, 3"), "lm_head", 0) == [AdapterSize(0, 8.0)]


def test_scales_are_those_of_each_size():
    assert ranks.scales(CFG, "layers.o_proj", 3) == [2.0] * 3
    assert ranks.scales(Lora(4, 8.0, ".*", True, ranks=".*b=16"), "b", 0) == [2.0]
    by_layer = Lora(4, 8.0, ".*", ranks=r"layers\.1\.q_proj=2", layers="1-2")
    assert ranks.scales(by_layer, "layers.q_proj", 3) == [0.0, 4.0, 2.0]


@pytest.mark.parametrize(
    "found",
    [
        [("layers.a", [AdapterSize(4, 8.0)] * 3), ("lm_head", [AdapterSize(4, 8.0)])],
        [("layers.a", [AdapterSize(4, 8.0)] * 3), ("layers.b", [AdapterSize(2, 1e-6)] * 3)],
        [("layers.a", [AdapterSize(0, 8.0), AdapterSize(4, 8.0), AdapterSize(0, 8.0)])],
        [
            ("layers.a", [AdapterSize(0, 8.0), AdapterSize(4, 8.0)]),
            ("layers.b", [AdapterSize(0, 8.0), AdapterSize(2, 4.0)]),
        ],
        [
            ("layers.a", [AdapterSize(0, 8.0), AdapterSize(4, 8.0)]),
            ("lm_head", [AdapterSize(3, 8.0)]),
        ],
        [
            ("layers.a", [AdapterSize(0, 8.0), AdapterSize(4, 8.0)]),
            ("layers.b", [AdapterSize(2, 4.5), AdapterSize(0, 8.0)]),
        ],
    ],
)
def test_settings_describe_the_sizes_that_a_file_holds(found):
    cfg = ranks.described(Lora(4, 8.0, ".*"), found)
    for path, some in found:
        assert ranks.sizes(cfg, path, len(some) if "layers" in path else 0) == some


def test_padding_stays_zero_under_every_optimiser():
    """Neither a gradient nor weight decay reaches the columns that a layer does not have."""
    model = make(CFG)
    leaves, params = describe(model), flatten(model)
    a, b = leaves["layers.q_proj.lora_a"], leaves["layers.o_proj.lora_b"]
    assert a.shape == (LAYERS, 64, 4) and b.shape == (LAYERS, 6, 64)
    chosen = lora_paths = [path for path in leaves if ".lora_" in path]
    x = jnp.asarray(np.random.default_rng(0).normal(size=(5, 64)), jnp.float32)

    def loss(trained):
        layers, y = bind(model, {**params, **trained}).layers, x
        for i in range(LAYERS):
            one = jax.tree.map(lambda leaf, i=i: leaf[i], layers)
            y = y + jnp.tanh(one.o_proj(one.q_proj(y) + one.k_proj(y)))
        return jnp.square(y).mean()

    def pads(trained):
        yield trained["layers.q_proj.lora_a"][1, :, 2:]
        yield trained["layers.q_proj.lora_b"][1, 2:]
        yield from (trained[f"layers.k_proj.lora_{side}"][2] for side in "ab")

    for name in optim.OPTIMIZERS:
        tx = optim.make_optimizer(
            name, optax.constant_schedule(0.1), b1=0.9, b2=0.999, weight_decay=0.1, clip=1.0,
            leaves={path: leaves[path] for path in chosen},
        )  # fmt: skip
        trained = {path: params[path] for path in lora_paths}
        state = tx.init(trained)
        for _ in range(3):
            updates, state = tx.update(jax.grad(loss)(trained), state, trained)
            trained = optax.apply_updates(trained, updates)
        assert not any(np.asarray(pad).any() for pad in pads(trained)), name
        assert all(np.asarray(x).any() for x in trained.values()), name


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"ranks": ".*q_proj"}, r"lora\.ranks='\.\*q_proj' is not a list such as"),
        ({"ranks": ".*=4, "}, "is not a list"),
        ({"ranks": ".*=4/x"}, "is not a list"),
        ({"ranks": "(=4"}, r"lora\.ranks: '\(' is not a regular expression"),
        ({"ranks": ".*z_proj=4"}, r"'\.\*z_proj' matches none of .*: layers\.k_proj, layers"),
        ({"ranks": r"layers\.3\..*=4"}, "matches none of"),
        ({"layers": "0-"}, r"lora\.layers='0-' is not a list of layers such as"),
        ({"layers": "2-1"}, "is not a list of layers"),
        ({"layers": "1-3"}, r"no layer 3; the last of those that lora\.targets matches is 2"),
        ({"ranks": ".*=0"}, r"lora\.ranks='\.\*=0' and lora\.layers='' leave no projection"),
        ({"rank": 0, "ranks": ".*=4"}, r"lora\.ranks='\.\*=4' needs lora\.rank > 0"),
        ({"rank": 0, "dora": True}, r"lora\.dora=True needs lora\.rank > 0"),
        ({"dora": True, "targets": ".*"}, r"lora\.dora=True does not go with .* lm_head"),
        ({"rank": 0, "layers": "1"}, r"lora\.layers='1' needs lora\.rank > 0"),
    ],
)
def test_a_wrong_text_is_named(keys, words):
    with pytest.raises(UserError, match=words) as caught:
        make(Lora(**{"rank": 4, "alpha": 8.0, "targets": "all-linear", **keys}))
    assert "\n" not in str(caught.value)


def test_a_run_may_not_contradict_the_ranks_of_an_adapter():
    linears = lora.projections(make(Lora()))
    own = Lora(4, 8.0, r"layers\..*", ranks=r"layers\.q_proj=2", layers="0,1")
    for same in ({"ranks": ".*q_proj=2/8"}, {"layers": "0-1"}, {}):
        asked = Lora(alpha=0.0, from_="x", **same)
        assert lora.continued(asked, own, linears) == Lora(
            4, 8.0, own.targets, from_="x", ranks=own.ranks, layers=own.layers
        )
    with pytest.raises(UserError, match=r"lora\.dora=True, but x has dora 0"):
        lora.continued(Lora(alpha=0.0, from_="x", dora=True), own, linears)
    for task, key, value in (("diffusion", "ranks", ".*=2"), ("diffusion", "tokens", "<a>")):
        with pytest.raises(UserError, match=rf"lora\.{key}=.* is for language models; leave"):
            lora.check_plain(Lora(4, 8.0, ".*", **{key: value}), task)
    for key, value in (("ranks", ".*=2"), ("layers", "1-2")):
        with pytest.raises(UserError, match=rf"lora\.{key}='{value}', but x has other ranks at"):
            lora.continued(Lora(alpha=0.0, from_="x", **{key: value}), own, linears)
