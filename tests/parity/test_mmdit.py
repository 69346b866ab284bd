"""The MMDiT of SD 3 and 3.5 against diffusers: outputs, gradients and weights, fp32."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models.normalization import AdaLayerNormContinuous, SD35AdaLayerNormZeroX
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.params import CONSTANT_ROLE
from jaxft.core.sharding import make_mesh, shardings
from jaxft.models import flops, registry
from jaxft.models.denoisers.mmdit import mmdit
from jaxft.models.denoisers.mmdit.mmdit import MMDiT
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.nn.conv import CONV_REMAT
from jaxft.weights import rules, transfer
from jaxft.weights.folders.diffusers import open_component

# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
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
    theirs = SD3Transformer2DModel(**config).eval()
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return theirs


@cache
def template(cfg):
    return jax.eval_shape(lambda: MMDiT(cfg, key=jax.random.key(0)))


def to_params(cfg, state):
    """A torch state dict as parameters, through the weight table."""
    shapes, sizes = {key: tensor.shape for key, tensor in state.items()}, mmdit.sizes(cfg)
    params = {}
    for entry in rules.plan(mmdit.rules(cfg), P.describe(template(cfg)), shapes, sizes):
        parts = [rules.to_jax(state[key], entry.layout, sizes) for key in entry.keys]
        params[entry.path] = np.stack(parts) if entry.stacked else parts[0]
    return params


def to_state(cfg, params):
    """Parameters (or their gradients) under the torch names, from the parameters alone."""
    state = {}
    for entry in rules.expected(mmdit.rules(cfg), P.describe(template(cfg))):
        array = np.asarray(params[entry.path])
        parts = array if entry.stacked else [array]
        for key, part in zip(entry.keys, parts, strict=True):
            state[key] = rules.to_torch(part, entry.layout, mmdit.sizes(cfg))
    return state


def numpy_state(theirs):
    return {key: tensor.numpy() for key, tensor in theirs.state_dict().items()}


def random(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


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


def run_ours(cfg, params, inputs, **how):
    """Compiled without the compiler's optimisations."""

    def forward(params, inputs):
        return P.bind(template(cfg), params)(*inputs, **how)

    return np.asarray(jax.jit(forward).lower(params, inputs).compile(QUICK)(params, inputs))


def worst(ours, theirs):
    theirs = np.asarray(theirs)
    return np.abs(np.asarray(ours, np.float32) - theirs).max() / np.abs(theirs).max()


def gradients(cfg, params, inputs, **how):
    """One forward and backward pass of ours: output and gradients by path."""
    cotangent = random(*inputs[0].shape[:3], cfg.out_channels, seed=9)

    def loss(params, inputs):
        out = P.bind(template(cfg), params)(*inputs, **how)
        return (out * cotangent).sum(), out

    step = jax.jit(jax.grad(loss, has_aux=True)).lower(params, inputs).compile(QUICK)
    grads, out = step(params, inputs)
    return np.asarray(out), grads


def torch_gradients(theirs, inputs):
    out = run_torch(theirs, *inputs)
    (out * torch.from_numpy(random(*out.shape, seed=9))).sum().backward()
    return out.detach().numpy(), {k: t.grad.numpy() for k, t in theirs.named_parameters()}


def both(name):
    """Config, diffusers' model and the same weights as our parameters."""
    cfg, theirs = MMDiTConfig.from_hf(SMALL[name]), make_torch(SMALL[name])
    return cfg, theirs, to_params(cfg, numpy_state(theirs))


@cache
def trained(name):
    cfg, _, params = both(name)
    out, grads = gradients(cfg, params, make_inputs(cfg))
    return out, to_state(cfg, grads)


@cache
def reference(name):
    return torch_gradients(make_torch(SMALL[name]), make_inputs(MMDiTConfig.from_hf(SMALL[name])))


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
    cfg, theirs, params = both("sd35")
    inputs = make_inputs(cfg, size)
    with torch.no_grad():
        assert worst(run_ours(cfg, params, inputs), run_torch(theirs, *inputs)) < 1e-5


def test_t07_the_table_comes_back_byte_by_byte_and_never_trains():
    cfg = MMDiTConfig.from_hf(SMALL["sd3"])
    state = numpy_state(make_torch(SMALL["sd3"]))
    state["pos_embed.pos_embed"] = random(*state["pos_embed.pos_embed"].shape)
    back = to_state(cfg, to_params(cfg, state))
    assert back["pos_embed.pos_embed"].tobytes() == state["pos_embed.pos_embed"].tobytes()
    leaves = P.describe(template(cfg))
    assert [p for p, leaf in leaves.items() if leaf.role == CONSTANT_ROLE] == [
        "pos_embed.pos_embed"
    ]
    assert "pos_embed.pos_embed" not in dict(make_torch(SMALL["sd3"]).named_parameters())


@pytest.mark.parametrize("size", [8, 128])
def test_t07_a_new_model_draws_diffusers_table(size):
    config = {**TINY, "sample_size": size, "pos_embed_max_size": 12}
    cfg = MMDiTConfig.from_hf(config)
    ours = mmdit.PatchEmbedding(cfg, key=jax.random.key(0)).pos_embed[...]
    theirs = SD3Transformer2DModel(**config).pos_embed.pos_embed
    assert np.abs(np.asarray(ours).reshape(theirs.shape) - theirs.numpy()).max() < 2e-5


def test_t08_the_order_of_text_tokens_does_not_matter_but_their_number_does():
    cfg, _, params = both("sd35")
    latents, times, context, pooled = make_inputs(cfg)
    out = run_ours(cfg, params, (latents, times, context, pooled))
    assert worst(run_ours(cfg, params, (latents, times, context[:, ::-1], pooled)), out) < 1e-5
    padded = np.concatenate([context, 0 * context], axis=1)  # keys with the bias of the embedder
    assert worst(run_ours(cfg, params, (latents, times, padded, pooled)), out) > 1e-3


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
    cfg, theirs, params = both("sd35")
    model = P.bind(template(cfg), params)
    _, times, _, pooled = make_inputs(cfg)
    with torch.no_grad():
        wanted = theirs.time_text_embed(torch.from_numpy(times), torch.from_numpy(pooled))
    time = model.time_embedding(mmdit.timestep_embedding(times, mmdit.TIME_DIM))
    assert worst(time + model.text_embedding(pooled), wanted) < 1e-5


def test_t14_the_timestep_is_sigma_times_1000():
    cfg, theirs, params = both("sd3")
    latents, _, context, pooled = make_inputs(cfg)
    sigma = np.array([0.7142, 0.0125], np.float32)
    with torch.no_grad():
        wanted = run_torch(theirs, latents, 1000 * sigma, context, pooled)
    ours = run_ours(cfg, params, (latents, 1000 * sigma, context, pooled))
    assert worst(ours, wanted) < 1e-5
    assert worst(run_ours(cfg, params, (latents, sigma, context, pooled)), wanted) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_bitwise_and_every_tensor_has_one_place(name):
    cfg, theirs, params = both(name)
    state, back = numpy_state(theirs), to_state(cfg, params)
    assert back.keys() == state.keys()
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)
    assert all(back[key].shape == state[key].shape for key in state)


def test_a_sharded_folder_of_two_dtypes_comes_back_bitwise(tmp_path):
    """The table of positions stays fp32 in a bf16 file, and is none of the trained tensors."""
    theirs = make_torch(SMALL["sd35"])
    for tensor in theirs.parameters():
        tensor.data = tensor.data.bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    source = open_component(str(tmp_path), "transformer")
    architecture = registry.find(source.config, "denoiser")
    cfg = architecture.config(source.config, "transformer/config.json")
    assert architecture.module is MMDiT and cfg == MMDiTConfig.from_hf(SMALL["sd35"])
    part, leaves = architecture.part(source, cfg), P.describe(template(cfg))
    places = shardings(leaves, make_mesh(data=2, fsdp=4))
    params = transfer.load(part, leaves, places, jnp.float32, set(leaves))
    trained = {path: array for path, array in params.items() if not leaves[path].role}
    made = dict(transfer.export(part, leaves, trained, {}, None).tensors)
    assert made.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert made[key].dtype == str(tensor.dtype).removeprefix("torch.")
        wide = tensor.view(torch.int16) if tensor.dtype == torch.bfloat16 else tensor
        assert made[key].tobytes() == wide.numpy().tobytes()
    assert made["pos_embed.pos_embed"].dtype == np.float32


def test_unknown_missing_and_misshaped_tensors_are_all_named():
    cfg, state = MMDiTConfig.from_hf(SMALL["sd35"]), numpy_state(make_torch(SMALL["sd35"]))
    del state["transformer_blocks.1.attn.add_q_proj.bias"]
    state["transformer_blocks.1.attn.to_add_out.weight"] = np.zeros((16, 16))
    state["transformer_blocks.2.norm1.linear.bias"] = np.zeros(96)
    state["proj_out.bias"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        to_params(cfg, state)
    text = str(error.value)
    assert "missing tensor transformer_blocks.1.attn.add_q_proj.bias" in text
    assert "unexpected tensor transformer_blocks.1.attn.to_add_out.weight" in text
    assert "unexpected tensor transformer_blocks.2.norm1" in text and "proj_out.bias" in text


def test_remat_changes_no_gradient_and_saves_memory():
    cfg = MMDiTConfig.from_hf({**TINY, "num_layers": 10})  # 9 of them in a loop
    leaves = P.describe(template(cfg)).items()
    model = P.bind(template(cfg), {path: 0.1 * random(*leaf.shape) for path, leaf in leaves})
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
    cfg, theirs, params = both("sd35")
    inputs = make_inputs(cfg)
    alone = run_ours(cfg, params, inputs)
    half = run_ours(cfg, params, inputs, dtype=jnp.bfloat16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        usual = run_torch(theirs, *inputs).float().numpy()
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - alone).mean()
    assert error < 1.1 * np.abs(usual - alone).mean()
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(params, shardings(P.describe(template(cfg)), mesh))
        assert worst(run_ours(cfg, placed, inputs), alone) < 1e-5


def test_flops_are_torchs():
    cfg, theirs, _ = both("sd35")
    inputs = make_inputs(cfg)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter has no formula for the CPU's own kernel
    with FlopCounterMode(display=False) as counter, plain, torch.no_grad():
        run_torch(theirs, *inputs)
    ours = flops.count(lambda model: model(*inputs), template(cfg))
    # torch computes attention of the last block's text, which nothing reads.
    dead = 4 * 2 * 7 * (16 + 7) * cfg.dim
    assert ours == counter.get_total_flops() - dead
