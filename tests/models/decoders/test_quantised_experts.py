"""Quantised experts compute with their decoded weights, on one device and on meshes of eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import params as P
from jaxft.core import sharding
from jaxft.core.errors import UserError
from jaxft.kernels.quantised.int8 import Int8
from jaxft.kernels.quantised.layouts import decode
from jaxft.kernels.quantised.nf4 import NF4
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.registry import read_decoder
from jaxft.nn.quantised import quantise

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "initializer_range": 0.2,
}
GPT_OSS = {**MIXTRAL, "model_type": "gpt_oss", "head_dim": 16, "sliding_window": 5}
FIELDS = {"nf4": NF4._fields, "int8": Int8._fields}


def make(config, base, double=True):
    cfg = read_decoder(config)

    def quantised(key):
        model = Decoder(cfg, key=key)
        quantise(model, base, double)
        return model

    plain = jax.eval_shape(partial(Decoder, cfg), key=jax.random.key(0))
    template = jax.eval_shape(quantised, jax.random.key(0))
    return plain, template, P.flatten(quantised(jax.random.key(0)))


def decoded(params, base, plain):
    """Return the parameters of the same model with arrays for kernels."""
    kind, kernels = {"nf4": NF4, "int8": Int8}[base], {}
    for path, leaf in P.describe(plain).items():
        if path in params:
            kernels[path] = params[path]
            continue
        held = kind(*(params.get(f"{path}.{name}") for name in FIELDS[base]))
        lead = sum(axis in ("layers", "expert") for axis in leaf.axes)
        ins = leaf.shape[lead : lead + leaf.inputs]
        one = lambda kernel, ins=ins: jnp.moveaxis(  # noqa: E731
            decode(kernel, ins, jnp.float32), range(-len(ins), 0), range(len(ins))
        )
        for _ in range(lead):
            one = jax.vmap(one)
        kernels[path] = one(held)
        assert kernels[path].shape == leaf.shape
    return kernels


def loss_and_gradients(template, params, tokens):
    """Gradients of the routers and norms, before and after the experts of each layer."""
    tuned = {x: y for x, y in params.items() if x.endswith(("router.kernel", "norm.scale"))}
    assert len(tuned) > 3

    def loss(tuned):
        hidden, _ = P.bind(template, {**params, **tuned}).routed(tokens, None, None, tokens >= 0)
        return jnp.sin(2 * hidden).sum()

    return jax.jit(jax.value_and_grad(loss))(tuned)


def assert_same(got, want):
    assert abs(float(got[0]) / float(want[0]) - 1) < 1e-5
    for path, grad in jax.device_get(got[1]).items():
        worst = np.abs(grad - want[1][path]).max() / np.abs(want[1][path]).max()
        assert worst < 1e-5, f"{path}: {worst}"


@pytest.mark.parametrize(
    ("config", "base", "mesh"),
    [
        pytest.param(MIXTRAL, "nf4", (2, 2, 2), marks=pytest.mark.slow),
        (MIXTRAL, "int8", (1, 4, 2)),
        (GPT_OSS, "nf4", (1, 4, 2)),
        pytest.param(GPT_OSS, "int8", (2, 2, 2), marks=pytest.mark.slow),
    ],
)
def test_loss_and_gradients_are_those_of_the_decoded_weights(config, base, mesh, capfd):
    plain, template, params = make(config, base)
    experts = [path for path in params if ".experts." in path and path.endswith(".codes")]
    assert len(experts) == (2 if config is GPT_OSS else 3)
    tokens = np.random.default_rng(2).integers(0, 64, (8, 16), np.int32)
    want = loss_and_gradients(plain, decoded(params, base, plain), tokens)
    assert_same(loss_and_gradients(template, params, tokens), want)
    mesh = sharding.make_mesh(*mesh)
    places = sharding.shardings(P.describe(template), mesh)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, places)
        given = jax.device_put(tokens, sharding.batch_sharding(mesh))
        assert_same(loss_and_gradients(template, placed, given), want)
    assert "Involuntary" not in capfd.readouterr().err
    codes = placed[experts[0]]
    assert codes.sharding.shard_shape(codes.shape)[1] == 8 // mesh.shape["fsdp"]


def test_a_step_holds_no_decoded_experts():
    """The backward pass decodes again: neither 16-bit nor fp32 weights are kept in between."""
    _, template, params = make(MIXTRAL, "nf4")
    tokens = jnp.zeros((1, 8), jnp.int32)
    wholes = {(8, 128, 64), (8, 64, 128)}

    def loss(scale):
        model = P.bind(template, params | {"norm.scale": scale})
        return model.routed(tokens, None, None, tokens >= 0)[0].sum()

    _, kept = jax.vjp(loss, params["norm.scale"])
    shapes = {tuple(x.shape[-3:]) for x in jax.tree.leaves(kept) if x.dtype == jnp.float32}
    assert not shapes & wholes, shapes


def test_experts_whose_width_is_no_multiple_of_a_block_are_named():
    model = Decoder(read_decoder(MIXTRAL | {"intermediate_size": 96}), key=jax.random.key(0))
    message = r"layers\.mlp\.experts\.down_proj has 96 inputs, which is no multiple of 64"
    with pytest.raises(UserError, match=message):
        quantise(model, "nf4")
