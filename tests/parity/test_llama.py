"""The LLaMA family against transformers: logits, gradients and greedy decoding, fp32 on CPU."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jaxft.core import params as P
from jaxft.core.sharding import batch_sharding, make_mesh, shardings
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder, flops_per_token
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.generation.cache import init_cache
from jaxft.weights import rules

TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 8192,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
    "rope_theta": 5e5,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
jit = partial(jax.jit, compiler_options=QUICK)
VARIANTS = {
    "llama": {"model_type": "llama"},
    "llama tied llama3": {
        "model_type": "llama",
        "tie_word_embeddings": True,
        "rope_parameters": LLAMA3,
    },
    "llama biases linear": {
        "model_type": "llama",
        "attention_bias": True,
        "mlp_bias": True,
        "rope_scaling": {"type": "linear", "factor": 3.0},
    },
    "llama head_dim": {"model_type": "llama", "head_dim": 16, "num_key_value_heads": None},
    "mistral head_dim": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "mistral window": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2 windows yarn": {
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 2,
        "rope_scaling": YARN,
        "rope_theta": 1e6,
    },
    "qwen3 yarn": {"model_type": "qwen3", "rope_scaling": YARN, "rope_theta": 1e6},
    "qwen3 layer_types": {
        "model_type": "qwen3",
        "head_dim": 8,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "smollm3": {"model_type": "smollm3"},
    "olmo2": {"model_type": "olmo2"},
    "smollm3 biases": {
        "model_type": "smollm3",
        "attention_bias": True,
        "mlp_bias": True,
        "no_rope_layers": [1, 0, 0, 1],
        "use_sliding_window": True,
        "sliding_window": 5,
        "tie_word_embeddings": False,
    },
}


def pair(name, **more):
    """The same random weights as a transformers model and as ours."""
    config = {**TINY, **VARIANTS[name], **more}
    torch.manual_seed(0)
    kwargs = {k: v for k, v in config.items() if k != "model_type"}
    hf = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **kwargs), attn_implementation="eager"
    )
    hf = hf.float().eval()
    with torch.no_grad():
        for key, tensor in hf.named_parameters():
            if key.endswith(("bias", "norm.weight")):
                tensor.add_(0.2 * torch.randn_like(tensor))
    cfg = registry.read_decoder(config)
    template = jax.eval_shape(lambda: Decoder(cfg, key=jax.random.key(0)))
    state = {k: v.numpy() for k, v in hf.state_dict().items()}
    return hf, P.bind(template, load(cfg, template, state))


def entries(cfg, template, state):
    leaves = P.describe(template)
    shapes = {k: v.shape for k, v in state.items()}
    return rules.plan(llama.RULES, leaves, shapes, llama.sizes(cfg), llama.ignore(cfg))


def load(cfg, template, state):
    """Parameters by path from torch tensors, through the rules."""
    made = {}
    for entry in entries(cfg, template, state):
        parts = [rules.to_jax(state[k], entry.layout, llama.sizes(cfg)) for k in entry.keys]
        made[entry.path] = jnp.asarray(np.stack(parts) if entry.stacked else parts[0])
    return made


def tokens(batch, length, seed=0):
    return np.random.default_rng(seed).integers(0, TINY["vocab_size"], (batch, length), np.int32)


def rows():
    """Four rows of 21 tokens: plain, plain far out, left-padded near and far."""
    ids, start = tokens(4, 21), np.array([0, 4096, 0, 5000])[:, None]
    mask = np.ones_like(ids)
    mask[2, :6] = mask[3, :1] = 0
    positions = np.maximum(np.cumsum(mask, 1) - 1, 0) + start
    return ids, positions.astype(np.int32), mask


def slopes(mask):
    """A random gradient for every real logit."""
    shape = (*mask.shape, TINY["vocab_size"])
    return mask[..., None] * np.random.default_rng(9).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("name", VARIANTS)
def test_logits_and_gradients_near_far_and_left_padded(name):
    hf, model = pair(name)
    ids, positions, mask = rows()
    out = hf(
        torch.tensor(ids).long(),
        attention_mask=torch.tensor(mask),
        position_ids=torch.tensor(positions).long(),
        use_cache=False,
    ).logits
    (out * torch.tensor(slopes(mask))).sum().backward()

    def loss(model):
        logits = model(ids, positions, mask)
        return (logits * slopes(mask)).sum(), logits

    grads, logits = jit(jax.grad(loss, has_aux=True))(model)
    want = out.detach().numpy()
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(np.asarray(logits)[mask > 0], want[mask > 0], atol=1e-4)
    state = {k: p.grad.numpy() for k, p in hf.named_parameters()}
    theirs = load(model.cfg, model, state)
    for path, got in P.flatten(grads).items():
        worst = np.abs(got - theirs[path]).max() / np.abs(theirs[path]).max()
        assert worst < 1e-3, f"{path}: {worst}"


def test_t3_a_true_long_row():
    hf, model = pair("llama tied llama3", num_hidden_layers=1)
    ids = tokens(1, 4200)
    with torch.no_grad():
        want = hf(torch.tensor(ids).long(), use_cache=False).logits.numpy()
    np.testing.assert_allclose(jax.jit(lambda m: m(ids))(model), want, atol=1e-4)


DECODED = ("llama tied llama3", "mistral window", "qwen2 windows yarn", "qwen3 yarn", "smollm3")


@pytest.mark.parametrize("name", DECODED)
def test_greedy_decoding_with_the_cache_is_token_equal(name):
    hf, model = pair(name)
    prompt, new = tokens(3, 11, seed=1), 12
    mask = np.ones_like(prompt)
    mask[1, :4] = mask[2, :9] = 0
    want = hf.generate(
        torch.tensor(prompt).long(),
        attention_mask=torch.tensor(mask),
        max_new_tokens=new,
        do_sample=False,
        pad_token_id=0,
    )[:, prompt.shape[1] :]

    @jit
    def step(model, ids, segments, cache):
        hidden, cache = model.hidden(ids, segment_ids=segments, cache=cache)
        return model.logits(hidden[:, -1:]).argmax(-1).astype(jnp.int32), cache

    cache = init_cache(model.cfg, 3, prompt.shape[1] + new)
    ids, cache = step(model, prompt, mask, cache)
    got = [ids]
    for _ in range(new - 1):
        ids, cache = step(model, ids, np.ones_like(ids), cache)
        got.append(ids)
    np.testing.assert_array_equal(np.concatenate(got, 1), want.numpy())
    assert len(np.unique(want)) > 6


def test_t10_packed_rows_equal_separate_rows():
    _, model = pair("qwen2 windows yarn")
    ids, segments = tokens(1, 20), np.repeat([[1, 2, 3, 0]], [7, 9, 2, 2], axis=1)
    positions = np.concatenate([np.arange(n) for n in (7, 9, 2, 2)])[None].astype(np.int32)
    call = jit(lambda m, *a: m(*a))
    packed = call(model, ids, positions, segments)
    assert np.isfinite(packed).all()
    for start, end in ((0, 7), (7, 16), (16, 18)):
        alone = call(model, ids[:, start:end])
        np.testing.assert_allclose(packed[:, start:end], alone, atol=1e-5)


def test_remat_and_unroll_change_no_gradient():
    _, model = pair("smollm3")
    ids = tokens(2, 9)

    def loss(model, remat, unroll):
        hidden, _ = model.hidden(ids, remat=remat, unroll=unroll)
        return (model.logits(hidden) * slopes(np.ones_like(ids))).sum()

    grad = jit(jax.grad(loss), static_argnums=(1, 2))
    want = P.flatten(grad(model, "none", 1))
    for remat, unroll in (("dots", 1), ("full", 2), ("offload", 1), ("none", 4)):
        for path, got in P.flatten(grad(model, remat, unroll)).items():
            np.testing.assert_allclose(got, want[path], atol=2e-5 * np.abs(want[path]).max())


def test_an_unknown_remat_names_the_known():
    _, model = pair("llama")
    with pytest.raises(ValueError, match="'some' is not one of none, dots, full, offload"):
        model.hidden(tokens(1, 2), remat="some")
    with pytest.raises(ValueError, match="either tokens or embeds"):
        model.hidden()


def test_t5_bf16_activations_give_fp32_logits_near_the_fp32_ones():
    _, model = pair("qwen3 yarn")
    ids = tokens(2, 17)

    @jit
    def run(model):
        hidden, _ = model.hidden(ids, dtype=jnp.bfloat16)
        return hidden, model.logits(hidden), model(ids)

    hidden, logits, want = run(model)
    assert (hidden.dtype, logits.dtype) == (jnp.bfloat16, jnp.float32)
    rms = float(jnp.sqrt(jnp.mean((logits - want) ** 2) / jnp.mean(want**2)))
    assert 1e-4 < rms < 0.03


def test_embeds_in_place_of_tokens():
    _, model = pair("llama")
    ids = tokens(2, 5)
    pieces = jit(lambda m: (m.hidden(embeds=m.embed_tokens(ids))[0], m.hidden(ids)[0]))(model)
    np.testing.assert_array_equal(*pieces)


def test_t31_rules_give_every_tensor_back_bitwise():
    hf, model = pair("smollm3 biases")
    state = {k: v.numpy() for k, v in hf.state_dict().items()}
    flat, seen = P.flatten(model), set()
    for entry in entries(model.cfg, model, state):
        parts = flat[entry.path] if entry.stacked else [flat[entry.path]]
        for key, part in zip(entry.keys, parts, strict=True):
            back = rules.to_torch(np.asarray(part), entry.layout, llama.sizes(model.cfg))
            np.testing.assert_array_equal(back, state[key])
            seen.add(key)
    assert seen == set(state)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_head_follows_the_config(tied):
    cfg = registry.read_decoder({**TINY, "model_type": "llama", "tie_word_embeddings": tied})
    model = jax.jit(lambda: Decoder(cfg, key=jax.random.key(0)), compiler_options=QUICK)()
    matrix, vocab_first, soft_cap = model.head()
    assert (vocab_first, soft_cap) == (tied, None)
    assert ("lm_head.kernel" in P.describe(model)) == (not tied)
    assert matrix.shape == ((96, 32) if tied else (32, 96))
    names = {key for e in rules.expected(llama.RULES, P.describe(model)) for key in e.keys}
    assert ("lm_head.weight" in names) == (not tied)


@pytest.mark.parametrize(  # one by one, as a CPU likes it; a loop; loops over a period and a rest
    ("name", "layers", "unroll"),
    # O2: the mean of OLMo's norms of q and k is over the heads of all devices.
    [("qwen2", 4, None), ("qwen2", 4, 1), ("smollm3", 9, 1), ("olmo2", 2, 1)],
)
def test_logits_and_gradients_do_not_depend_on_the_mesh(capfd, name, layers, unroll):
    _, model = pair(name, num_hidden_layers=layers)
    ids = tokens(8, 16)

    def loss(params, ids):
        hidden, _ = P.bind(model, params).hidden(ids, remat="full", unroll=unroll)
        return (P.bind(model, params).logits(hidden) ** 2).sum()

    step = jit(jax.value_and_grad(loss))
    want, wanted = step(P.flatten(model), ids)
    mesh = make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(P.flatten(model), shardings(P.describe(model), mesh))
        args = placed, jax.device_put(ids, batch_sharding(mesh))
        compiled = step.lower(*args).compile()
        got, grads = compiled(*args)
    assert abs(got / want - 1) < 1e-5
    for path, grad in grads.items():
        worst = np.abs(grad - wanted[path]).max() / np.abs(wanted[path]).max()
        assert worst < 1e-5, f"{path}: {worst}"
    assert "Involuntary" not in capfd.readouterr().err
    collectives = [line for line in compiled.as_text().splitlines() if re.search(COLLECTIVE, line)]
    assert collectives and not [line for line in collectives if "[8,16," in line]


COLLECTIVE = r"= \S+ (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)\("


def test_flops_count_two_a_weight_and_half_the_attention():
    cfg = registry.read_decoder({**TINY, "model_type": "llama"})
    model = jax.eval_shape(lambda: Decoder(cfg, key=jax.random.key(0)))
    weights = sum(np.prod(x.shape) for p, x in P.describe(model).items() if "kernel" in p)
    attention = 4 * 32 * (100 + 1) / 2 * cfg.num_layers
    assert flops_per_token(cfg, 100) == 2 * weights + attention
    windowed = registry.read_decoder({**TINY, "model_type": "mistral", "sliding_window": 1})
    assert flops_per_token(windowed, 100) == 2 * weights + 4 * 32 * cfg.num_layers
