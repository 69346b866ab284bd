"""CLIP's text encoders against transformers: states, pooled vectors, gradients; fp32 on CPU."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig as HFConfig
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.text_encoders import clip
from jaxft.models.text_encoders.clip import CLIPText, CLIPTextConfig
from jaxft.weights import rules

EOS = 95
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "projection_dim": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
    "eos_token_id": 2,
}
# The shapes of the published encoders, shrunk: act, depth (odd for SD 2's 23), projection.
FAMILIES = {
    "sd15": {"hidden_act": "quick_gelu", "architectures": ["CLIPTextModel"]},
    "sd21": {"hidden_act": "gelu", "num_hidden_layers": 5, "architectures": ["CLIPTextModel"]},
    "sdxl 1": {"hidden_act": "quick_gelu", "architectures": ["CLIPTextModel"]},
    "sdxl 2": {
        "hidden_act": "gelu",
        "num_attention_heads": 2,
        "architectures": ["CLIPTextModelWithProjection"],
    },
}
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


@partial(jax.jit, static_argnums=(2, 3), compiler_options=QUICK)
def encode(model, ids, skip=0, dtype=jnp.float32):
    return model(ids, skip=skip, dtype=dtype)


def make(**config):
    """The same random weights as a transformers model and as ours."""
    torch.manual_seed(0)
    config = {**TINY, **config}
    cls = {"CLIPTextModel": CLIPTextModel}.get(
        config.get("architectures", ["CLIPTextModel"])[0], CLIPTextModelWithProjection
    )
    hf_config = HFConfig(**{k: v for k, v in config.items() if k != "architectures"})
    hf = cls._from_config(hf_config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for tensor in hf.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    cfg = CLIPTextConfig.from_hf(config)
    template = jax.eval_shape(lambda: CLIPText(cfg, key=jax.random.key(0)))
    state = {k: v.detach().numpy() for k, v in hf.named_parameters()}
    return hf, P.bind(template, load(cfg, template, state))


def random(cfg):
    """A random model of ours."""
    template = jax.eval_shape(lambda: CLIPText(cfg, key=jax.random.key(0)))
    rng = np.random.default_rng(0)
    leaves = P.describe(template).items()
    made = {path: jnp.array(rng.standard_normal(leaf.shape, np.float32)) for path, leaf in leaves}
    return P.bind(template, made)


def load(cfg, template, state):
    """Parameters by path from torch tensors, through the rules."""
    made = {}
    shapes = {k: v.shape for k, v in state.items()}
    plan = rules.plan(clip.RULES, P.describe(template), shapes, clip.sizes(cfg), clip.ignore(cfg))
    for entry in plan:
        parts = [rules.to_jax(state[k], entry.layout, clip.sizes(cfg)) for k in entry.keys]
        made[entry.path] = jnp.asarray(np.stack(parts) if entry.stacked else parts[0])
    return made


def prompts(pad, rows=3, length=16, seed=0):
    """Begin, words, end, padding: as SD's tokenizers make them, of several lengths."""
    rng = np.random.default_rng(seed)
    ids = np.full((rows, length), pad, np.int32)
    for row, words in enumerate((0, 5, length - 2)[:rows]):
        ids[row, : words + 2] = [94, *rng.integers(3, 90, words), EOS]
    return ids


def reference(hf, ids, grad=False):
    with torch.set_grad_enabled(grad):
        return hf(torch.tensor(ids).long(), output_hidden_states=True)


def pooled(out):
    return out.text_embeds if hasattr(out, "text_embeds") else out.pooler_output


def close(got, wanted, tolerance=1e-5):
    wanted = wanted.detach().numpy()
    assert got.shape == wanted.shape and np.abs(wanted).max() > 0.5
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_all_outputs(family):
    hf, model = make(**FAMILIES[family])
    ids = prompts(pad=EOS)
    out, theirs = encode(model, ids, 0), reference(hf, ids)
    close(out.normed, theirs.last_hidden_state)
    close(out.hidden, theirs.hidden_states[-1])
    close(out.pooled, pooled(theirs))


def test_d14_gelu_is_exact_and_quick_gelu_is_not_it():
    ids = prompts(pad=EOS)
    outs = {act: encode(make(hidden_act=act)[1], ids, 0).normed for act in ("gelu", "quick_gelu")}
    assert np.abs(outs["gelu"] - outs["quick_gelu"]).max() > 1e-3


@pytest.mark.parametrize("skip", [0, 1, 2])
def test_d21_sd1_takes_the_final_norm_of_the_chosen_layer(skip):
    """diffusers' clip_skip: hidden_states[-(skip + 1)], then the final norm."""
    hf, model = make(**FAMILIES["sd15"])
    ids = prompts(pad=EOS)
    theirs = reference(hf, ids)
    wanted = hf.final_layer_norm(theirs.hidden_states[-(skip + 1)])
    out = encode(model, ids, skip)
    close(out.normed, wanted)
    close(out.pooled, pooled(theirs))


def test_d22_sd2_has_one_layer_less_and_the_final_norm():
    cfg = CLIPTextConfig.from_hf(
        {
            "hidden_act": "gelu",
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_hidden_layers": 23,
            "projection_dim": 512,
            "architectures": ["CLIPTextModel"],
        }
    )
    assert (cfg.num_layers, cfg.head_dim, cfg.hidden_act) == (23, 64, "gelu")
    assert cfg.projection_dim is None and cfg.vocab_size == 49408 and cfg.max_positions == 77


@pytest.mark.parametrize("family", ["sdxl 1", "sdxl 2"])
def test_d23_sdxl_takes_the_raw_penultimate_layer(family):
    hf, model = make(**FAMILIES[family])
    ids = prompts(pad=0)
    theirs, out = reference(hf, ids), encode(model, ids, 1)
    close(out.hidden, theirs.hidden_states[-2])
    close(out.pooled, pooled(theirs))
    assert out.pooled.shape[-1] == (24 if family == "sdxl 2" else 32)


def test_d23_the_class_of_model_index_decides_on_the_projection():
    bare = {k: v for k, v in TINY.items() if k != "architectures"}
    assert CLIPTextConfig.from_hf(bare).projection_dim is None
    assert CLIPTextConfig.from_hf(bare, projects=True).projection_dim == 24
    both = {**bare, "architectures": ["CLIPTextModelWithProjection"]}
    assert CLIPTextConfig.from_hf(both).projection_dim == 24
    assert CLIPTextConfig.from_hf(both, projects=False).projection_dim is None


def test_d24_true_end_token_is_the_first_one():
    hf, model = make(eos_token_id=EOS - 10, **FAMILIES["sdxl 2"])
    ids = prompts(pad=EOS - 10)
    ids[ids == EOS] = EOS - 10
    ids[:, 1] = EOS  # a higher id, which the legacy rule would take
    close(encode(model, ids, 0).pooled, pooled(reference(hf, ids)))


def test_d24_legacy_config_takes_the_highest_id():
    hf, model = make(**FAMILIES["sdxl 2"])
    ids = prompts(pad=0)
    ids[2, 4] = EOS  # the first of two
    close(encode(model, ids, 0).pooled, pooled(reference(hf, ids)))


def test_d24_added_tokens_are_no_end_token():
    """A legacy config whose vocabulary textual inversion extended: the first 49407 counts."""
    config = {**TINY, "vocab_size": 49410, "hidden_size": 8, "intermediate_size": 8}
    cfg = CLIPTextConfig.from_hf(config)
    assert not cfg.takes_highest_id
    model = random(cfg)
    ids = np.array([[49406, 7, 49409, 49407, 49407, 0]], np.int32)
    out = encode(model, ids)
    np.testing.assert_array_equal(out.pooled, out.normed[:, 3])


@pytest.mark.parametrize("pad", [0, EOS])
def test_d25_d26_padding_is_attended_to_and_causal(pad):
    """What pads matters after it and never before: no padding mask, a causal one."""
    hf, model = make(**FAMILIES["sd15"])
    ids, other = prompts(pad=pad), prompts(pad=17)
    out, changed = encode(model, ids, 0).normed, encode(model, other, 0).normed
    close(out, reference(hf, ids).last_hidden_state)
    np.testing.assert_array_equal(out[1, :7], changed[1, :7])
    assert np.abs(out[1, 8:] - changed[1, 8:]).max() > 1e-2


@pytest.mark.parametrize("family", ["sd21", "sdxl 2"])
def test_gradients_per_tensor(family):
    hf, model = make(**FAMILIES[family])
    ids, skip = prompts(pad=EOS), 1
    rng = np.random.default_rng(5)
    theirs = reference(hf, ids, grad=True)
    hidden = theirs.hidden_states[-(skip + 1)]
    norm = getattr(hf, "text_model", hf).final_layer_norm
    outs = (norm(hidden), hidden, pooled(theirs))
    ways = [rng.standard_normal(tuple(out.shape), np.float32) for out in outs]
    sum((out * torch.tensor(way)).sum() for out, way in zip(outs, ways, strict=True)).backward()
    state = {k: v.grad.numpy() for k, v in hf.named_parameters() if v.grad is not None}
    wanted = load(model.cfg, model, state)

    def loss(params):
        outs = P.bind(model, params)(ids, skip=skip)
        return sum(jnp.vdot(a, b) for a, b in zip(outs, ways, strict=True))

    got = jax.jit(jax.grad(loss), compiler_options=QUICK)(P.flatten(model))
    assert set(got) == set(wanted)
    for path, grad in got.items():
        if path.endswith("k_proj.bias"):
            continue  # zero but for rounding: softmax does not see a shift of all keys
        error = np.linalg.norm(grad - wanted[path])
        assert error < 1e-4 * np.linalg.norm(wanted[path]), path


@pytest.mark.parametrize("family", ["sd15", "sdxl 2"])
def test_d19_keys_with_and_without_the_prefix(family):
    """Both spellings load; what has no source is written in the one that all packages read."""
    hf, model = make(**FAMILIES[family])
    cfg, params = model.cfg, P.flatten(model)
    named = {k: v.detach().numpy() for k, v in hf.named_parameters()}
    short = {k.removeprefix("text_model."): v for k, v in named.items()}
    inner = {k for k in short if not k.startswith("text_projection")}
    long = {"text_model." + k if k in inner else k: v for k, v in short.items()}
    long["text_model.embeddings.position_ids"] = np.arange(16)[None]
    for state in (short, long):
        for path, array in load(cfg, model, state).items():
            np.testing.assert_array_equal(array, params[path])
    written = {}
    for entry in rules.expected(clip.RULES, P.describe(model)):
        for i, key in enumerate(entry.keys):
            array = np.asarray(params[entry.path][i] if entry.stacked else params[entry.path])
            written[key] = rules.to_torch(array, entry.layout, clip.sizes(cfg))
    assert set(written) == set(long) - {"text_model.embeddings.position_ids"}
    for key, array in written.items():
        np.testing.assert_array_equal(array, long[key])


def test_d19_unknown_and_missing_tensors_are_errors():
    hf, model = make(**FAMILIES["sd15"])
    state = {k: v.detach().numpy() for k, v in hf.named_parameters()}
    extra = {**state, "text_model.encoder.layers.0.extra.weight": np.zeros(3)}
    with pytest.raises(UserError, match=r"unexpected tensor text_model\.encoder\.layers\.0\.extra"):
        load(model.cfg, model, extra)
    state.pop(next(key for key in state if key.endswith("layers.1.mlp.fc1.bias")))
    with pytest.raises(UserError, match=r"missing tensor .*layers\.1\.mlp\.fc1\.bias"):
        load(model.cfg, model, state)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"hidden_act": "relu"}, "hidden_act='relu' is not one of quick_gelu, gelu"),
        ({"eos_token_id": [2, 3]}, r"eos_token_id=\[2, 3\]"),
        ({"num_attention_heads": 5}, "hidden_size=32 is no multiple"),
    ],
)
def test_bad_configs_name_file_and_key(change, words):
    with pytest.raises(UserError, match=words) as caught:
        CLIPTextConfig.from_hf({**TINY, **change}, where="sd/text_encoder/config.json")
    assert "sd/text_encoder/config.json" in str(caught.value)


def test_bad_calls():
    model = random(CLIPTextConfig.from_hf(TINY))
    with pytest.raises(UserError, match=r"17 tokens are more than .* 16 positions"):
        model(np.zeros((1, 17), np.int32))
    with pytest.raises(UserError, match="clip skip 5 is not between 0 and 4"):
        model(np.zeros((1, 4), np.int32), skip=5)


def test_bf16_follows_fp32():
    _, model = make(**FAMILIES["sd21"])
    ids = prompts(pad=0)
    fp32, half = encode(model, ids, 0), encode(model, ids, 0, jnp.bfloat16)
    assert half.normed.dtype == jnp.bfloat16
    error = np.asarray(half.normed, np.float32) - np.asarray(fp32.normed)
    assert np.abs(error).mean() < 0.03
