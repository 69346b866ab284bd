"""A mixture against every expert on every token, on one device and on meshes of eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import params as P
from jaxft.core import sharding
from jaxft.models.decoders.config import ExpertSpec
from jaxft.models.decoders.decoder import Decoder, flops_per_token
from jaxft.models.decoders.experts import (
    ExpertMLP,
    Routing,
    balance_loss,
    chosen_experts,
    routing_metrics,
)
from jaxft.models.registry import read_decoder

CONFIG = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "initializer_range": 0.4,
}
GPT_OSS = {**CONFIG, "model_type": "gpt_oss", "head_dim": 4, "sliding_window": 5}
MESHES = {"of eight": (2, 2, 2), "experts on eight": (1, 8, 1), "width on four": (2, 1, 4)}
X = np.random.default_rng(0).normal(size=(8, 12, 16)).astype(np.float32)


def every_expert(params, x, spec):
    """Each expert on each token, weighted by the sparse weights of the formula."""
    probabilities = jax.nn.softmax(x @ params["router.kernel"], -1)  # [B, T, E]
    ranks = jnp.argsort(jnp.argsort(-probabilities, -1, stable=True), -1)
    weights = jnp.where(ranks < spec.active, probabilities, 0)
    if spec.normalised:
        weights = weights / weights.sum(-1, keepdims=True)
    gate, up, down = (params[f"experts.{name}_proj.kernel"] for name in ("gate", "up", "down"))
    inner = jax.nn.silu(jnp.einsum("btd,edf->btef", x, gate)) * jnp.einsum("btd,edf->btef", x, up)
    return jnp.einsum("btef,efd,bte->btd", inner, down, weights)


@pytest.mark.parametrize("normalised", [True, False])
def test_a_mixture_is_every_expert_on_every_token(normalised):
    cfg, spec = read_decoder(CONFIG), ExpertSpec(8, 3, 24, normalised)
    model = ExpertMLP(cfg, spec, key=jax.random.key(0))
    params = P.flatten(model)
    slope = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)

    def ours(params, x):
        out, _ = P.bind(model, params)(x, spec, "silu")
        return (out * slope).sum(), out

    def theirs(params, x):
        out = every_expert(params, x, spec)
        return (out * slope).sum(), out

    (got, out), (want, wanted) = (
        jax.jit(jax.grad(one, (0, 1), has_aux=True))(params, X) for one in (ours, theirs)
    )
    np.testing.assert_allclose(out, wanted, atol=2e-5)
    for (path, mine), other in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        scale = np.abs(other).max()
        assert scale > 0.1
        np.testing.assert_allclose(mine, other, atol=2e-5 * scale, err_msg=str(path))


def test_of_equal_experts_the_first_are_chosen():
    logits = jnp.zeros((1, 1, 8)).at[0, 0, 5].set(1.0)
    weights, chosen = chosen_experts(logits, ExpertSpec(8, 3, 24, normalised=True))
    assert chosen.tolist() == [[[5, 0, 1]]]
    np.testing.assert_allclose(weights.sum(), 1.0, rtol=1e-6)
    weights, _ = chosen_experts(logits, ExpertSpec(8, 3, 24, normalised=False))
    np.testing.assert_allclose(weights.sum(), (np.e + 2) / (np.e + 7), rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "config"),
    [*((name, CONFIG) for name in MESHES), ("of eight", GPT_OSS), ("experts on eight", GPT_OSS)],
)
def test_a_mesh_gives_the_same_loss_gradients_and_sums(name, config, capfd):
    """Biases of the experts are in the output once, though each device has a part of the width."""
    cfg = read_decoder(config)
    template = jax.eval_shape(partial(Decoder, cfg), key=jax.random.key(0))
    leaves, params = P.describe(template), P.flatten(Decoder(cfg, key=jax.random.key(0)))
    random = np.random.default_rng(3)
    for path in params:
        if path.endswith((".bias", ".sinks")):
            params[path] += random.normal(0, 0.5, params[path].shape).astype(np.float32)
    tokens = np.random.default_rng(2).integers(0, 64, (8, 16), np.int32)
    real = np.arange(16) < np.arange(9, 17)[:, None]

    def loss(params, tokens):
        model = P.bind(template, params)
        hidden, routing = model.routed(tokens, None, None, real, remat="full")
        balance = balance_loss(routing, jnp.float32(real.sum()))
        return (model.logits(hidden)[:, :, 3] * real).sum() + balance, (routing, balance)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    (want, sums), wanted = step(params, tokens)
    mesh = sharding.make_mesh(*MESHES[name])
    places = sharding.shardings(leaves, mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, places)
        given = jax.device_put(tokens, sharding.batch_sharding(mesh))
        (got, made), grads = step(placed, given)
    assert abs(float(got) / float(want) - 1) < 1e-5
    np.testing.assert_array_equal(made[0].tokens, sums[0].tokens)
    np.testing.assert_allclose(made[0].probabilities, sums[0].probabilities, rtol=1e-5)
    for path, grad in jax.device_get(grads).items():
        worst = np.abs(grad - wanted[path]).max() / np.abs(wanted[path]).max()
        assert worst < 1e-5, f"{path}: {worst}"
    assert "Involuntary" not in capfd.readouterr().err
    fused = config is GPT_OSS
    kernel = f"layers.mlp.experts.gate_{'up_' if fused else ''}proj.kernel"
    shape = placed[kernel].sharding.shard_shape(placed[kernel].shape)
    both = (2,) if fused else ()
    assert shape == (2, 8 // MESHES[name][1], 16, *both, 24 // MESHES[name][2])


def test_one_prompt_on_a_mesh_is_computed_by_every_device():
    cfg, spec = read_decoder(CONFIG), ExpertSpec(8, 3, 24, True)
    model = ExpertMLP(cfg, spec, key=jax.random.key(0))
    want, _ = model(X[:1], spec, "silu")
    with jax.set_mesh(sharding.make_mesh(2, 2, 2)):
        got = jax.jit(lambda x: model(x, spec, "silu")[0])(X[:1])
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_measures_of_routing():
    even = Routing(jnp.full((2, 4), 10.0), jnp.full((2, 4), 5.0))  # 20 tokens, 2 experts each
    assert float(balance_loss(even, jnp.float32(20))) == 2.0
    assert routing_metrics(even) == {"busiest_expert": 0.25, "router_entropy": 1.0}
    one = Routing(jnp.array([[20.0, 0, 0, 0]]), jnp.array([[20.0, 0, 0, 0]]))
    assert float(balance_loss(one, jnp.float32(20))) == 4.0
    assert routing_metrics(one) == {"busiest_expert": 1.0, "router_entropy": 0.0}
    assert float(balance_loss(Routing(*jnp.zeros((2, 1, 4))), jnp.float32(0))) == 0.0


def test_flops_are_those_of_a_tokens_experts():
    mixture = read_decoder(CONFIG)
    dense = read_decoder({**CONFIG, "model_type": "mistral", "intermediate_size": 3 * 24})
    routers = 2 * 2 * 16 * 8
    assert flops_per_token(mixture, 16) == flops_per_token(dense, 16) + routers
