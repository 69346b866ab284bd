"""Mixtures of experts against transformers: the loss of routers, and what is refused."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models import registry
from jaxft.objectives.next_token import NextToken
from jaxft.weights import rules
from jaxft.weights.folders.transformers import open_source
from jaxft.weights.views import InMemory
from tests.families import CASES, MIXTURES, Pair, jit, tokens

LENGTHS = (24, 17, 9)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory, one_thread):
    """Each family's models, made once."""
    return {case: Pair(case, tmp_path_factory.mktemp("model")) for case in MIXTURES}


def batch(ids, lengths):
    """Rows of one example each, padded on the right."""
    real = np.arange(ids.shape[1]) < np.array(lengths)[:, None]
    weights = np.roll(real, -1, 1) & real
    weights[:, -1] = False
    return {
        "tokens": ids,
        "targets": np.roll(ids, -1, 1),
        "weights": weights.astype(np.float32),
        "segment_ids": real.astype(np.int32),
    }


def mean(total, weight, metrics):
    return total / weight, {name: value / weight for name, value in metrics.items()}


@pytest.mark.parametrize("case", MIXTURES)
def test_x4_loss_and_gradients_with_the_loss_of_routers(case, pairs):
    """All layers' rows are one set, without padding. The coefficient is the checkpoint's."""
    pair, ids = pairs[case], tokens(3, 24)
    rows = batch(ids, LENGTHS)
    pair.theirs.zero_grad()
    out = pair.theirs(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(rows["segment_ids"]),
        labels=torch.tensor(np.where(rows["segment_ids"] > 0, ids, -100)).long(),
        output_router_logits=True,
        use_cache=False,
    )
    out.loss.backward()
    coefficient = pair.theirs.router_aux_loss_coef
    assert pair.cfg.router_loss == pytest.approx(coefficient)
    assert abs(float(out.aux_loss) - pair.cfg.layers[0].experts.active) > 1e-3, "it is not even"
    objective = NextToken(jnp.float32, 24, 24, router_loss=pair.cfg.router_loss)

    def loss(params):
        model = P.bind(pair.template, params)
        (total, weight), metrics = objective.loss(model, rows, None, None)
        return mean(total, weight, metrics)

    (got, metrics), grads = jit(jax.value_and_grad(loss, has_aux=True))(pair.params)
    np.testing.assert_allclose(got, out.loss.item(), rtol=1e-5)
    np.testing.assert_allclose(metrics["router_loss"], out.aux_loss.item(), rtol=1e-5)
    assert 1 / pair.cfg.layers[0].experts.count < metrics["busiest_expert"] < 1
    assert 0 < metrics["router_entropy"] < 1
    state = pair.in_file({key: one.grad for key, one in pair.theirs.named_parameters()})
    for entry in pair.part.entries(pair.leaves):
        for i, key in enumerate(entry.keys):
            part = np.asarray(grads[entry.path])[entry.place(i)]
            mine, theirs = rules.to_torch(part, entry.layout, pair.part.sizes), state[key].numpy()
            apart = np.linalg.norm(mine - theirs) / max(np.linalg.norm(theirs), 1e-9)
            assert apart < 1e-3, f"{key}: {apart}"


@pytest.mark.parametrize("case", MIXTURES)
def test_t13_packed_examples_have_the_loss_of_separate_rows(case, pairs):
    pair, ids = pairs[case], tokens(3, 24)
    apart = batch(ids, LENGTHS)
    parts = [[apart[name][i, :n] for i, n in enumerate(LENGTHS)] for name in apart]
    together = {
        name: np.concatenate([*rows, np.zeros(6, rows[0].dtype)])[None]
        for name, rows in zip(apart, parts, strict=True)
    }
    segments = np.concatenate([np.full(n, i + 1) for i, n in enumerate(LENGTHS)] + [np.zeros(6)])
    positions = np.concatenate([np.arange(n) for n in (*LENGTHS, 6)])
    together |= {"segment_ids": segments[None].astype(np.int32), "positions": positions[None]}
    made = []
    for rows, count in ((apart, 1), (together, 3)):
        length = rows["tokens"].shape[1]
        objective = NextToken(jnp.float32, length, length, per_row=count, router_loss=0.5)
        (total, weight), metrics = jit(
            lambda model, rows, one=objective: one.loss(model, rows, None, None)
        )(pair.ours, rows)
        made.append(mean(total, weight, metrics))
    np.testing.assert_allclose(made[1][0], made[0][0], rtol=1e-5)
    for name, value in made[0][1].items():
        np.testing.assert_allclose(made[1][1][name], value, rtol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mlp_only_layers": [1]}, r"layer 1 has no experts \(mlp_only_layers=\[1\]"),
        ({"decoder_sparse_step": 2}, "layer 0 has no experts.*decoder_sparse_step=2"),
        ({"num_experts_per_tok": 7}, "num_experts_per_tok=7, but there are 6 experts"),
        ({"num_local_experts": 8}, "two numbers of experts; leave one of them out"),
        ({"mlp_only_layers": "1"}, 'mlp_only_layers="1"; expected a list of layers'),
    ],
)
def test_x2_what_no_layer_computes_is_refused(changes, text):
    config = {"model_type": "qwen3_moe", "num_experts": 6, "num_experts_per_tok": 3, **changes}
    with pytest.raises(UserError, match=text) as caught:
        registry.read_decoder(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("case", ["mixtral", "qwen3_moe"])
def test_files_with_fused_experts_are_read_as_those_with_each_expert(case, pairs, tmp_path):
    """As transformers 5 saves them, if it is asked for the names of its classes in memory."""
    pair = pairs[case]
    pair.theirs.save_pretrained(tmp_path, save_original_format=False)
    files = open_source(str(tmp_path))
    assert "model.layers.0.mlp.experts.gate_up_proj" in files.tensors.keys()  # noqa: SIM118
    made, want = pair.architecture.opened(files).tensors, pair.part.tensors
    assert sorted(made.keys()) == sorted(want.keys())
    for key in want.keys():  # noqa: SIM118
        assert made.info(key) == want.info(key)
        assert made.read(key).tobytes() == want.read(key).tobytes(), key
    key = "model.layers.1.mlp.experts.down_proj"
    arrays = {one: files.tensors.read(one) for one in files.tensors.keys()}  # noqa: SIM118
    again = next(one for one in want.keys() if ".experts.2." in one)  # noqa: SIM118
    for more, text in (
        ({key: arrays[key][0]}, f"tensor {key} has shape .* as transformers 5 saves fused experts"),
        ({again: arrays[key][0]}, f"tensor {again} is there twice, alone and fused"),
    ):
        with pytest.raises(UserError, match=text):
            pair.architecture.opened(replace(files, tensors=InMemory({**arrays, **more})))


def test_jitter_is_refused():
    with pytest.raises(UserError, match=r"router_jitter_noise=0\.1 is not supported"):
        registry.read_decoder({"model_type": "mixtral", "router_jitter_noise": 0.1})


def test_c3_the_number_of_experts_has_two_names():
    for name in ("num_experts", "num_local_experts"):
        cfg = registry.read_decoder({"model_type": "qwen3_moe", name: 6, "num_experts_per_tok": 3})
        assert cfg.layers[0].experts.count == 6
    assert CASES["qwen3_moe"][1]["num_experts"] == 6


PUBLISHED = {
    "Mixtral-8x7B-v0.1": (
        {"model_type": "mixtral", "max_position_embeddings": 32768, "router_aux_loss_coef": 0.02},
        (46_702_792_704, 995),
    ),
    "Qwen3-30B-A3B": (
        {
            "model_type": "qwen3_moe",
            "head_dim": 128,
            "num_hidden_layers": 48,
            "num_experts": 128,
            "norm_topk_prob": True,
            "max_window_layers": 48,
            "mlp_only_layers": [],
        },
        (30_532_122_624, 18_867),
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_published_sizes_have_their_parameters_and_tensors(name):
    """The figures of the hub's indices. Nothing is allocated."""
    config, want = PUBLISHED[name]
    architecture, cfg = registry.find(config, "decoder"), registry.read_decoder(config)
    template = jax.eval_shape(lambda key: architecture.module(cfg, key=key), jax.random.key(0))
    leaves = P.describe(template)
    entries = rules.expected(architecture.rules(cfg), leaves)
    tensors = sum(len(entry.keys) for entry in entries)
    assert (sum(math.prod(leaf.shape) for leaf in leaves.values()), tensors) == want
