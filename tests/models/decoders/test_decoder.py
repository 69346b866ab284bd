"""Kinds of layers that no transformers class of today's families has, against NumPy; patterns."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core.params import bind, describe, flatten
from jaxft.models import registry
from jaxft.models.decoders import block
from jaxft.models.decoders.block import Context
from jaxft.models.decoders.config import LayerSpec
from jaxft.models.decoders.decoder import Decoder, flops_per_token
from jaxft.nn import rope

TINY = registry.read_decoder(
    {
        "model_type": "llama",
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "initializer_range": 0.3,
    }
)
IDS = np.random.default_rng(0).integers(0, 40, (2, 11), np.int32)
F, S, NONE = LayerSpec(), LayerSpec(window=3), LayerSpec(rope=None)


def made(*layers):
    """A model of these layers, its norms' scales random too."""
    cfg = replace(TINY, layers=layers)
    params = flatten(jax.jit(lambda: Decoder(cfg, key=jax.random.key(0)))())
    rng = np.random.default_rng(1)
    params = {
        path: jnp.asarray(rng.uniform(0.5, 2, x.shape), x.dtype) if "norm" in path else x
        for path, x in params.items()
    }
    template = jax.eval_shape(lambda: Decoder(cfg, key=jax.random.key(0)))
    return bind(template, params)


def layer_by_hand(model, spec):
    """One layer's output on random states by NumPy alone, and by the model."""
    x = np.random.default_rng(2).normal(size=(1, 5, 16)).astype(np.float32)
    p = {path.removeprefix("layers."): np.asarray(v[0], np.float64) for path, v in
         flatten(model).items() if path.startswith("layers.")}  # fmt: skip

    def rms(name, h):
        scale = p.get(f"{name}_layernorm.scale")
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * scale

    def attention(h):
        q, k, v = (np.einsum("td,dnh->tnh", h, p[f"self_attn.{n}_proj.kernel"]) for n in "qkv")
        scores = np.einsum("tnh,sh->nts", q, k[:, 0]) / np.sqrt(8)
        scores = np.where(np.tri(len(h), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("nts,sh->tnh", weights / weights.sum(-1, keepdims=True), v[:, 0])
        return np.einsum("tnh,nhd->td", out, p["self_attn.o_proj.kernel"])

    def mlp(h):
        gate, up = (h @ p[f"mlp.{n}_proj.kernel"] for n in ("gate", "up"))
        return (gate / (1 + np.exp(-gate)) * up) @ p["mlp.down_proj.kernel"]

    h = x[0].astype(np.float64)
    if spec.norms == "pre":
        h = h + attention(rms("input", h))
        h = h + mlp(rms("post_attention", h))
    elif spec.norms == "post":
        h = h + rms("post_attention", attention(h))
        h = h + rms("post_feedforward", mlp(h))
    else:
        h = h + rms("post_attention", attention(rms("input", h)))
        h = h + rms("post_feedforward", mlp(rms("pre_feedforward", h)))
    return x, h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(model.norm.scale[...])


@pytest.mark.parametrize("norms", ["pre", "post", "sandwich"])
def test_norms_stand_where_the_spec_puts_them(norms, quick):
    spec = replace(NONE, norms=norms)
    model = made(spec)
    count = {"pre": 2, "post": 2, "sandwich": 4}[norms]
    assert sum("layernorm" in path for path in describe(model)) == count
    x, want = layer_by_hand(model, spec)
    got, _ = jax.jit(lambda model: model.hidden(embeds=x))(model)
    np.testing.assert_allclose(got[0], want, atol=2e-5)


PATTERNS = {
    "period and a rest": (S, S, F, S, S, F, S),
    "from a layer on": (F,) * 9 + (S,) * 2,
    "positions in some": (F, NONE, F, NONE),
}


def one_by_one(model, ids):
    """The same layers without a scan."""
    x, (turn,) = model.embed_tokens(ids), model.cfg.ropes
    angles = rope.cos_sin(jnp.arange(ids.shape[1])[None], jnp.array(turn.inv_freq), turn.scale)
    context = Context((angles,), None, None, jnp.int32(0))
    for i, spec in enumerate(model.cfg.layers):
        layer = jax.tree.map(lambda leaf, i=i: leaf[i], model.layers)
        x, _, _ = layer(x, spec, i, context)
    return model.logits(model.norm(x))


@pytest.mark.parametrize("name", PATTERNS)
def test_scans_of_a_pattern_run_every_layer_once_and_in_order(name, quick):
    model = made(*PATTERNS[name])
    want = jax.jit(one_by_one)(model, IDS)

    def call(model, remat, unroll):
        return model.logits(model.hidden(IDS, remat=remat, unroll=unroll)[0])

    for remat, unroll in (("none", 1), ("full", 1), ("none", 0)):
        got = jax.jit(call, static_argnums=(1, 2))(model, remat, unroll)
        np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_window_is_no_traced_value():
    """Attention gets Python ints: a traced window would keep every fast kernel away."""
    real, windows = block.attention, []

    def spy(*arrays, **named):
        windows.append(named["window"])
        return real(*arrays, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(block, "attention", spy)
        jax.make_jaxpr(lambda model: model.hidden(IDS, unroll=1)[0])(made(S, F, S, F, S))
    assert windows == [3, None, 3]  # a period once, then what remains of it


def test_flops_count_the_keys_of_each_window():
    full, windowed = (replace(TINY, layers=(spec,)) for spec in (F, replace(S, window=1)))
    assert flops_per_token(full, 9) - flops_per_token(windowed, 9) == 4 * 16 * (5 - 1)


def gradient_program(*layers):
    """The lowered gradients of the loss of a model of these layers."""
    cfg = replace(TINY, layers=layers)
    template = jax.eval_shape(lambda: Decoder(cfg, key=jax.random.key(0)))

    def loss(params, ids):
        return bind(template, params)(ids).astype(jnp.float32).sum()

    ids = jax.ShapeDtypeStruct((2, 11), jnp.int32)
    return jax.jit(jax.grad(loss)).lower(flatten(template), ids)


@pytest.mark.parametrize(
    ("many", "few", "most"),
    [((F,) * 32, (F,) * 4, 1.01), (((S,) * 5 + (F,)) * 5 + (S, S), (S,) * 5 + (F,), 1.5)],
    ids=["32 equal layers and 4", "32 layers of windows 5:1 and 6"],
)
def test_a_deep_model_has_hardly_more_to_compile(many, few, most):
    sizes = [len(gradient_program(*one).as_text().splitlines()) for one in (many, few)]
    assert sizes[0] <= most * sizes[1], sizes
