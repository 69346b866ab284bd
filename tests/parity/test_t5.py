"""The encoder of T5 v1.1 against transformers: hidden states, gradients and weights, fp32."""

import json
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from transformers import T5Config as HFConfig
from transformers import T5EncoderModel, T5ForConditionalGeneration
from transformers.models.t5.modeling_t5 import T5Attention

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.sharding import make_mesh, shardings
from jaxft.models import registry
from jaxft.models.text_encoders import t5
from jaxft.models.text_encoders.t5 import T5Encoder, T5EncoderConfig
from jaxft.weights import rules, transfer
from jaxft.weights.folders.diffusers import open_component

TINY = {
    "vocab_size": 96,
    "d_model": 32,
    "d_kv": 12,  # 4 heads x 12 are not d_model
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 20,
    "feed_forward_proj": "gated-gelu",
}
XXL = {
    "d_model": 4096,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def make_torch(**changes):
    """transformers' random encoder, its norms moved off one."""
    torch.manual_seed(0)
    config = HFConfig(**{**TINY, **changes})
    theirs = T5EncoderModel._from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return theirs


@cache
def template(cfg):
    return jax.eval_shape(lambda: T5Encoder(cfg, key=jax.random.key(0)))


def numpy_state(theirs):
    return {key: tensor.detach().numpy() for key, tensor in theirs.named_parameters()}


def to_params(cfg, state):
    shapes, sizes = {key: tensor.shape for key, tensor in state.items()}, t5.sizes(cfg)
    params = {}
    for entry in rules.plan(t5.RULES, P.describe(template(cfg)), shapes, sizes, t5.IGNORE):
        parts = [rules.to_jax(state[key], entry.layout, sizes) for key in entry.keys]
        params[entry.path] = np.stack(parts) if entry.stacked else parts[0]
    return params


def to_state(cfg, params):
    state = {}
    for entry in rules.expected(t5.RULES, P.describe(template(cfg))):
        array = np.asarray(params[entry.path])
        for key, part in zip(entry.keys, array if entry.stacked else [array], strict=True):
            state[key] = rules.to_torch(part, entry.layout, t5.sizes(cfg))
    return state


def make(**changes):
    theirs, cfg = make_torch(**changes), T5EncoderConfig.from_hf({**TINY, **changes})
    return theirs, cfg, to_params(cfg, numpy_state(theirs))


@partial(jax.jit, static_argnums=(0, 3), compiler_options=QUICK)
def encode(cfg, params, ids, dtype=jnp.float32):
    return P.bind(template(cfg), params)(ids, dtype=dtype)


def prompts(rows=3, length=24, seed=0):
    """Words, the end 1, padding 0: of several lengths."""
    random = np.random.default_rng(seed)
    ids = np.zeros((rows, length), np.int32)
    for row, words in enumerate((0, 6, length - 1)[:rows]):
        ids[row, : words + 1] = [*random.integers(3, 96, words), 1]
    return ids


def reference(theirs, ids):
    with torch.no_grad():
        return theirs(torch.tensor(ids).long()).last_hidden_state.numpy()


def worst(ours, theirs):
    theirs = np.asarray(theirs, np.float32)
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("changes", [{}, {"num_heads": 1, "d_kv": 7}, {"num_layers": 10}])
def test_last_hidden_state_is_transformers(changes):
    theirs, cfg, params = make(**changes)
    ids = prompts()
    assert worst(encode(cfg, params, ids), reference(theirs, ids)) < 1e-5


def test_gradients_are_transformers_tensor_by_tensor():
    theirs, cfg, params = make()
    ids = prompts()
    out = theirs(torch.tensor(ids).long()).last_hidden_state
    cotangent = np.random.default_rng(9).standard_normal(out.shape, np.float32)
    (out * torch.from_numpy(cotangent)).sum().backward()
    wanted = {key: tensor.grad.numpy() for key, tensor in theirs.named_parameters()}

    @partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def gradients(params):
        return (P.bind(template(cfg), params)(ids) * cotangent).sum()

    ours = to_state(cfg, gradients(params))
    assert ours.keys() == wanted.keys()
    assert not {key: e for key in wanted if not (e := worst(ours[key], wanted[key])) < 1e-4}


@pytest.mark.parametrize(("buckets", "most"), [(32, 128), (8, 20), (4, 2), (64, 1000), (12, 33)])
def test_t22_distances_have_the_buckets_of_transformers(buckets, most):
    changes = {"relative_attention_num_buckets": buckets, "relative_attention_max_distance": most}
    cfg = T5EncoderConfig.from_hf({**TINY, **changes})
    places = torch.arange(700)
    wanted = T5Attention._relative_position_bucket(
        places[None] - places[:, None], True, buckets, most
    )
    ours = t5.distance_buckets(700, cfg)
    np.testing.assert_array_equal(ours, wanted.numpy())
    assert ours[0, 1] == buckets // 2 + 1 and ours[1, 0] == 1  # the upper half is for later keys


def test_t22_scores_have_no_scale_and_all_layers_share_one_bias():
    theirs, cfg, params = make()
    ids = prompts()
    biases = [key for key in numpy_state(theirs) if "relative_attention_bias" in key]
    assert biases == ["encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight"]
    first = reference(theirs, ids)
    scaled = {**params, "layers.attn.q.kernel": params["layers.attn.q.kernel"] / 12**0.5}
    assert worst(encode(cfg, scaled, ids), first) > 1e-2
    without = {**params, "distance_bias": 0 * params["distance_bias"]}
    assert worst(encode(cfg, without, ids), first) > 1e-2


def test_t22_padding_is_attended_to():
    theirs, cfg, params = make()
    ids = prompts(rows=2)
    out, short = encode(cfg, params, ids), encode(cfg, params, ids[:, :8])
    assert worst(short, reference(theirs, ids[:, :8])) < 1e-5
    assert worst(short[1, :7], out[1, :7]) > 1e-2


def test_t23_bf16_is_as_near_to_fp32_as_transformers_with_wo_in_fp32():
    theirs, cfg, params = make(num_layers=10)
    ids = prompts()
    exact = reference(theirs, ids)
    half = encode(cfg, params, ids, jnp.bfloat16)
    theirs = theirs.to(torch.bfloat16)
    plain = reference_in_bf16(theirs, ids)
    for block in theirs.encoder.block:
        block.layer[1].DenseReluDense.wo.float()
    kept = reference_in_bf16(theirs, ids)
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - exact).mean()
    assert error < 1.1 * np.abs(plain - exact).mean()
    assert error < 1.1 * np.abs(kept - exact).mean()


def reference_in_bf16(theirs, ids):
    with torch.no_grad():
        return theirs(torch.tensor(ids).long()).last_hidden_state.float().numpy()


def test_t23_outputs_beyond_the_range_of_float16_are_no_trouble_in_bf16():
    _, cfg, params = make()
    params["layers.mlp.wo.kernel"] = 1e5 * params["layers.mlp.wo.kernel"]
    ids = prompts()
    exact, half = encode(cfg, params, ids), encode(cfg, params, ids, jnp.bfloat16)
    assert worst(half, exact) < 5e-2


def test_round_trip_is_bitwise_and_every_tensor_has_one_place():
    theirs, cfg, params = make()
    state, back = numpy_state(theirs), to_state(cfg, params)
    assert back.keys() == state.keys()
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)


SPELLINGS = {"first": [t5.SHARED], "second": [t5.TIED_COPY], "both": [t5.SHARED, t5.TIED_COPY]}


@pytest.mark.parametrize("names", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("shard", ["1GB", "10KB"])
def test_folders_with_either_name_of_the_table_come_back_bitwise(tmp_path, names, shard):
    theirs = make_torch()
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    sharded = len(list(tmp_path.glob("model-*.safetensors")))
    assert (sharded > 2) == (shard == "10KB")
    for file in tmp_path.glob("*.safetensors"):
        state = load_file(file)
        if t5.SHARED in state:
            table = state.pop(t5.SHARED)
            save_file(state | {name: table.copy() for name in names}, file, {"format": "pt"})
    source = open_component(str(tmp_path), "text_encoder_3")
    assert set(names) <= set(source.tensors.keys())
    architecture = registry.find(source.config, "text_encoder")
    source, cfg = architecture.opened(source), architecture.config(source.config, "here")
    part, leaves = architecture.part(source, cfg), P.describe(template(cfg))
    places = shardings(leaves, make_mesh(data=8, fsdp=1))
    params = transfer.load(part, leaves, places, jnp.float32, set(leaves))
    ids = prompts()
    assert worst(encode(cfg, params, ids), reference(theirs, ids)) < 1e-5
    made = dict(transfer.export(part, leaves, params, {}, None).tensors)
    state = numpy_state(theirs)
    assert made.keys() == state.keys() - {t5.SHARED} | {names[0]}
    assert all(made[key].tobytes() == state[key].tobytes() for key in made if key in state)
    assert made[names[0]].tobytes() == state[t5.SHARED].tobytes()


def test_the_decoder_of_a_whole_t5_is_left_out():
    torch.manual_seed(0)
    whole = T5ForConditionalGeneration(HFConfig(**TINY)).eval()
    cfg = T5EncoderConfig.from_hf(json.loads(whole.config.to_json_string()))
    params = to_params(cfg, {**numpy_state(whole), "lm_head.weight": np.zeros((96, 32))})
    ids = prompts()
    with torch.no_grad():
        wanted = whole.encoder(torch.tensor(ids).long()).last_hidden_state
    assert worst(encode(cfg, params, ids), wanted) < 1e-5


def test_t5_xxl_fits_without_a_byte_allocated():
    with torch.device("meta"):
        theirs = T5EncoderModel(HFConfig(**XXL))
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.named_parameters()}
    cfg = T5EncoderConfig.from_hf(XXL)
    leaves = P.describe(template(cfg))
    entries = rules.plan(t5.RULES, leaves, shapes, t5.sizes(cfg))
    assert sum(len(entry.keys) for entry in entries) == len(shapes) == 219
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == 4_762_310_656


def test_sharded_rows_equal_one_device():
    _, cfg, params = make(num_heads=4)
    ids = np.repeat(prompts(), 4, axis=0)
    alone, mesh = encode(cfg, params, ids), make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(P.describe(template(cfg)), mesh))
        forward = jax.jit(lambda params: P.bind(template(cfg), params)(ids))
        assert worst(forward(placed), alone) < 1e-5


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "umt5"}, "model_type='umt5'.*expected t5"),
        ({"feed_forward_proj": "relu"}, "feed_forward_proj='relu'.*gated-gelu"),
        ({"dense_act_fn": "gelu"}, "dense_act_fn='gelu'.*gelu_new"),
        ({"is_gated_act": False}, "is_gated_act=False.*True"),
        ({"num_heads": 0}, "num_heads=0.*from 1 to"),
        ({"d_kv": None}, "d_kv=null"),
        ({"relative_attention_num_buckets": 6}, "num_buckets=6.*multiple of 4"),
        ({"relative_attention_max_distance": 2}, "num_buckets=8.*max_distance=2"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\]"),
    ],
)
def test_other_values_are_refused_by_key_and_file(change, words):
    with pytest.raises(UserError, match=words) as caught:
        T5EncoderConfig.from_hf({**TINY, **change}, "sd3/text_encoder_3/config.json")
    assert "sd3/text_encoder_3/config.json" in str(caught.value)


def test_the_keys_of_an_mlp_have_priority_over_its_name_as_in_transformers():
    split = {"feed_forward_proj": "relu", "is_gated_act": True, "dense_act_fn": "gelu_pytorch_tanh"}
    theirs = HFConfig.from_dict({**TINY, **split})
    assert theirs.is_gated_act and theirs.dense_act_fn == "gelu_pytorch_tanh"
    assert T5EncoderConfig.from_hf({**TINY, **split}) == T5EncoderConfig.from_hf(TINY)


def test_absent_keys_take_the_class_defaults():
    theirs = HFConfig().to_dict()
    assert {key: theirs[key] for key in t5.DEFAULTS} == t5.DEFAULTS
