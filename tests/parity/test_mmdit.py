"""The MMDiT of SD 3 and 3.5 against diffusers: outputs, gradients and weights, fp32."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, SD35AdaLayerNormZeroX

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.params import CONSTANT_ROLE
from jaxft.models.denoisers.mmdit import mmdit
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.nn.conv import CONV_REMAT
from tests.parity.twins import (
    QUICK,
    Twin,
    assert_a_sharded_folder_comes_back,
    assert_bf16_is_as_near_as_autocast_and_sharded_rows_equal_one_device,
    assert_flops_are_torchs,
    assert_round_trip_is_bitwise,
    moved,
    numpy_state,
    random,
    worst,
)

TINY = {
    "sample_size": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
SMALL = {
    "sd3": {**TINY, "num_layers": 3},
    "sd35": {**TINY, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
    "sd35 large": {**TINY, "qk_norm": "rms_norm"},
    # Plain, dual, plain, and a last block that is dual too.
    "any order": {
        **TINY,
        "num_layers": 4,
        "dual_attention_layers": (1, 3),
        "qk_norm": "rms_norm",
    },
    "one block": {**TINY, "num_layers": 1, "in_channels": 4, "out_channels": 8},
}


def make_torch(config):
    """diffusers' random transformer, its norms and biases moved off one and zero."""
    torch.manual_seed(0)
    return moved(SD3Transformer2DModel(**config))


def make_inputs(cfg, size=(8, 8), batch=2):
    latents = random(batch, *size, cfg.in_channels, seed=1)
    times = np.array([1000.0, 12.5, 714.2][:batch], np.float32)
    context = random(batch, 7, cfg.context_dim, seed=2)
    return latents, times, context, random(batch, cfg.pooled_dim, seed=3)


def run_torch(theirs, latents, times, context, pooled):
    """NCHW inside, NHWC outside; keeps the graph."""
    image = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    text, pooled, times = map(torch.from_numpy, (context, pooled, times))
    return theirs(image, text, pooled, times).sample.permute(0, 2, 3, 1)


@cache
def both(name):
    return Twin(mmdit.ARCHITECTURE, SMALL[name], make_torch(SMALL[name]), run_torch)


@cache
def trained(name):
    return both(name).gradients(make_inputs(both(name).cfg))


@cache
def reference(name):
    return both(name).reference(make_inputs(both(name).cfg))


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_diffusers(name):
    assert worst(trained(name)[0], reference(name)[0]) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_diffusers_tensor_by_tensor(name):
    ours, theirs = trained(name)[1], reference(name)[1]
    assert ours.keys() == theirs.keys() | {"pos_embed.pos_embed"}
    unused = {key for key in theirs if not theirs[key].any()}
    errors = {key: worst(ours[key], theirs[key]) for key in theirs.keys() - unused}
    assert not {key: error for key, error in errors.items() if not error < 1e-4}
    assert len(unused) < 4 and not any(ours[key].any() for key in unused)


@pytest.mark.parametrize("size", [(8, 12), (16, 4), (2, 2)])
def test_t07_positions_are_cropped_in_the_middle_of_the_table(size):
    one = both("sd35")
    inputs = make_inputs(one.cfg, size)
    assert worst(one.ours(inputs), one.wanted(inputs)) < 1e-5


def test_t07_the_table_comes_back_byte_by_byte_and_never_trains():
    one, name = both("sd3"), "pos_embed.pos_embed"
    state = numpy_state(one.theirs)
    state[name] = random(*state[name].shape)
    assert one.to_state(one.to_params(state))[name].tobytes() == state[name].tobytes()
    leaves = P.describe(one.template)
    assert [path for path, leaf in leaves.items() if leaf.role == CONSTANT_ROLE] == [name]
    assert name not in dict(one.theirs.named_parameters())


@pytest.mark.parametrize("size", [8, 128])
def test_t07_a_new_model_draws_diffusers_table(size):
    config = {**TINY, "sample_size": size, "pos_embed_max_size": 12}
    cfg = MMDiTConfig.from_hf(config)
    ours = mmdit.PatchEmbedding(cfg, key=jax.random.key(0)).pos_embed[...]
    theirs = SD3Transformer2DModel(**config).pos_embed.pos_embed
    assert np.abs(np.asarray(ours).reshape(theirs.shape) - theirs.numpy()).max() < 2e-5


def test_t08_the_order_of_text_tokens_does_not_matter_but_their_number_does():
    one = both("sd35")
    latents, times, context, pooled = inputs = make_inputs(one.cfg)
    out = one.ours(inputs)
    assert worst(one.ours((latents, times, context[:, ::-1], pooled)), out) < 1e-5
    padded = np.concatenate([context, 0 * context], axis=1)  # keys with the bias of the embedder
    assert worst(one.ours((latents, times, padded, pooled)), out) > 1e-3


def test_t09_chunks_are_shift_scale_gate_and_two_chunks_are_scale_shift():
    torch.manual_seed(0)
    x, time = random(2, 5, 16), random(2, 16, seed=1)
    dual, last = SD35AdaLayerNormZeroX(16), AdaLayerNormContinuous(16, 16, False, 1e-6)
    with torch.no_grad():
        normed, gate, *mlp, second, gate2 = dual(torch.from_numpy(x), torch.from_numpy(time))
        final = last(torch.from_numpy(x), torch.from_numpy(time))
    chunks = modulated(dual.linear, 9, time)
    assert worst(mmdit.adaptive_layer_norm(x, chunks[0], chunks[1], 1e-6), normed) < 1e-5
    assert worst(mmdit.adaptive_layer_norm(x, chunks[6], chunks[7], 1e-6), second) < 1e-5
    wanted = (gate, *mlp, gate2)
    for chunk, theirs in zip((*chunks[2:6], chunks[8]), wanted, strict=True):
        assert worst(chunk, theirs) < 1e-5
    scale, shift = modulated(last.linear, 2, time)
    assert worst(mmdit.adaptive_layer_norm(x, shift, scale, 1e-6), final) < 1e-5


def modulated(linear, chunks, time):
    """Our chunks by torch's projection, of SiLU(time)."""
    params = {
        "linear.kernel": linear.weight.detach().numpy().T,
        "linear.bias": linear.bias.detach(),
    }
    params["linear.bias"] = params["linear.bias"].numpy()
    made = jax.eval_shape(lambda: mmdit.Modulation(16, chunks, key=jax.random.key(0)))
    return P.bind(made, params)(jax.nn.silu(time), None)


@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_t10_queries_of_the_last_text_have_zero_gradients_in_torch_too(name):
    ours, theirs = trained(name)[1], reference(name)[1]
    last = f"transformer_blocks.{SMALL[name]['num_layers'] - 1}.attn."
    unused = {f"{last}add_q_proj.weight", f"{last}add_q_proj.bias"}
    unused |= {f"{last}norm_added_q.weight"} & theirs.keys()
    assert {key for key in theirs if not theirs[key].any()} == unused
    assert {key for key in theirs if not ours[key].any()} == unused


def test_t12_time_is_in_thousandths_with_cosines_first_and_pooled_text_is_added():
    one = both("sd35")
    model = P.bind(one.template, one.params)
    _, times, _, pooled = make_inputs(one.cfg)
    with torch.no_grad():
        wanted = one.theirs.time_text_embed(torch.from_numpy(times), torch.from_numpy(pooled))
    time = model.time_embedding(mmdit.timestep_embedding(times, mmdit.TIME_DIM))
    assert worst(time + model.text_embedding(pooled), wanted) < 1e-5


def test_t14_the_timestep_is_sigma_times_1000():
    one = both("sd3")
    latents, _, *texts = make_inputs(one.cfg)
    sigma = np.array([0.7142, 0.0125], np.float32)
    inputs = latents, 1000 * sigma, *texts
    wanted = one.wanted(inputs)
    assert worst(one.ours(inputs), wanted) < 1e-5
    assert worst(one.ours((latents, sigma, *texts)), wanted) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_bitwise_and_every_tensor_has_one_place(name):
    assert_round_trip_is_bitwise(both(name))


def test_a_sharded_folder_of_two_dtypes_comes_back_bitwise(tmp_path):
    """The table of positions stays fp32 in a bf16 file, and is none of the trained tensors."""
    theirs = make_torch(SMALL["sd35"])
    for tensor in theirs.parameters():
        tensor.data = tensor.data.bfloat16()
    made = assert_a_sharded_folder_comes_back(both("sd35"), theirs, tmp_path)
    assert made["pos_embed.pos_embed"].dtype == np.float32


def test_unknown_missing_and_misshaped_tensors_are_all_named():
    one = both("sd35")
    state = numpy_state(one.theirs)
    del state["transformer_blocks.1.attn.add_q_proj.bias"]
    state["transformer_blocks.1.attn.to_add_out.weight"] = np.zeros((16, 16))
    state["transformer_blocks.2.norm1.linear.bias"] = np.zeros(96)
    state["proj_out.bias"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        one.to_params(state)
    text = str(error.value)
    assert "missing tensor transformer_blocks.1.attn.add_q_proj.bias" in text
    assert "unexpected tensor transformer_blocks.1.attn.to_add_out.weight" in text
    assert "unexpected tensor transformer_blocks.2.norm1" in text and "proj_out.bias" in text


def test_remat_changes_no_gradient_and_saves_memory():
    cfg = MMDiTConfig.from_hf({**TINY, "num_layers": 10})  # 9 of them in a loop
    template = jax.eval_shape(lambda: mmdit.MMDiT(cfg, key=jax.random.key(0)))
    leaves = P.describe(template).items()
    model = P.bind(template, {path: 0.1 * random(*leaf.shape) for path, leaf in leaves})
    inputs = make_inputs(cfg, (16, 16))
    grads, memory = {}, {}
    for remat in ("none", *CONV_REMAT):

        def loss(model, remat=remat):
            return jnp.square(model(*inputs, remat=remat)).sum()

        step = jax.jit(jax.grad(loss)).lower(model).compile(QUICK)
        memory[remat] = step.memory_analysis().temp_size_in_bytes
        grads[remat] = P.flatten(step(model))
    for remat in CONV_REMAT:
        errors = {
            path: worst(grads[remat][path], g) for path, g in grads["none"].items() if g.any()
        }
        assert max(errors.values()) < 1e-4
    assert memory["none"] > 1.2 * memory["dots"] > 1.5 * memory["full"]


def test_bf16_is_as_near_to_fp32_as_diffusers_and_sharded_rows_equal_one_device():
    one = both("sd35")
    assert_bf16_is_as_near_as_autocast_and_sharded_rows_equal_one_device(one, make_inputs(one.cfg))


def test_flops_are_torchs():
    """torch computes attention of the last block's text, which nothing reads."""
    one = both("sd35")
    assert_flops_are_torchs(one, make_inputs(one.cfg), unread=4 * 2 * 7 * (16 + 7) * one.cfg.dim)
