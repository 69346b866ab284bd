"""The transformer of FLUX.1 against diffusers: outputs, gradients and weights, fp32."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.sharding import make_mesh, shardings
from jaxft.models import flops, registry
from jaxft.models.denoisers.flux import flux
from jaxft.models.denoisers.flux.flux import FluxTransformer
from jaxft.models.denoisers.flux.flux_config import FluxConfig
from jaxft.nn.conv import CONV_REMAT
from jaxft.weights import rules, transfer
from jaxft.weights.folders.diffusers import open_component
from tests.parity.test_mmdit import QUICK, numpy_state, random, worst

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
}
SMALL = {
    "dev": {**TINY, "guidance_embeds": True},
    "schnell": TINY,
    "one block": {**TINY, "num_layers": 1, "num_single_layers": 1},
}


class ExactSinusoids(torch.nn.Module):
    """diffusers' `Timesteps`, with frequencies that are rounded to fp32 once.

    Its own are rounded three times, which is 2e-4 rad at 3500, a guidance of 3.5.
    """

    def forward(self, t):
        frequencies = np.exp(-np.log(10000.0) * np.arange(128) / 128).astype(np.float32)
        angles = t[:, None] * torch.from_numpy(frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)


def make_torch(config, exact=True):
    """diffusers' random transformer, its norms and biases moved off one and zero."""
    torch.manual_seed(0)
    theirs = FluxTransformer2DModel(**config).eval()
    if exact:
        theirs.time_text_embed.time_proj = ExactSinusoids()
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    return theirs


@cache
def template(cfg):
    return jax.eval_shape(lambda: FluxTransformer(cfg, key=jax.random.key(0)))


def to_params(cfg, state):
    """A torch state dict as parameters, through the weight table."""
    shapes = {key: tensor.shape for key, tensor in state.items()}
    params = {}
    for entry in rules.plan(flux.rules(cfg), P.describe(template(cfg)), shapes, {}):
        parts = [rules.to_jax(state[key], entry.layout, {}) for key in entry.keys]
        params[entry.path] = np.stack(parts) if entry.stacked else parts[0]
    return params


def to_state(cfg, params):
    """Parameters (or their gradients) under the torch names, from the parameters alone."""
    state = {}
    for entry in rules.expected(flux.rules(cfg), P.describe(template(cfg))):
        array = np.asarray(params[entry.path])
        parts = array if entry.stacked else [array]
        for key, part in zip(entry.keys, parts, strict=True):
            state[key] = rules.to_torch(part, entry.layout, {})
    return state


def make_inputs(cfg, size=(8, 8), batch=2):
    """Latents, sigmas, text, pooled text, and the guidance of models that take one."""
    latents = random(batch, *size, cfg.in_channels, seed=1)
    sigma = np.array([1.0, 0.0125, 0.7142][:batch], np.float32)
    guidance = np.array([3.5, 1.0, 2.0][:batch], np.float32) if cfg.guidance else None
    context = random(batch, 7, cfg.context_dim, seed=2)
    return latents, sigma, context, random(batch, cfg.pooled_dim, seed=3), guidance


def run_torch(theirs, latents, sigma, context, pooled, guidance):
    """Packed and unpacked by the pipeline's own functions; NHWC outside; keeps the graph."""
    rows, y, x, channels = latents.shape
    image = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    packed = FluxPipeline._pack_latents(image, rows, channels, y, x)
    places = FluxPipeline._prepare_latent_image_ids(rows, y // 2, x // 2, "cpu", torch.float32)
    out = theirs(
        packed,
        torch.from_numpy(context),
        torch.from_numpy(pooled),
        torch.from_numpy(sigma),
        img_ids=places,
        txt_ids=torch.zeros(context.shape[1], 3),
        guidance=None if guidance is None else torch.from_numpy(guidance),
    ).sample
    # The factor of the VAE is 8: so many pixels have latents of this size.
    return FluxPipeline._unpack_latents(out, 8 * y, 8 * x, 8).permute(0, 2, 3, 1)


def run_ours(cfg, params, inputs, **how):
    """Compiled without the compiler's optimisations."""

    def forward(params, inputs):
        return P.bind(template(cfg), params)(*inputs, **how)

    return np.asarray(jax.jit(forward).lower(params, inputs).compile(QUICK)(params, inputs))


def gradients(cfg, params, inputs):
    """One forward and backward pass of ours: output and gradients by path."""
    cotangent = random(*inputs[0].shape, seed=9)

    def loss(params, inputs):
        out = P.bind(template(cfg), params)(*inputs)
        return (out * cotangent).sum(), out

    step = jax.jit(jax.grad(loss, has_aux=True)).lower(params, inputs).compile(QUICK)
    grads, out = step(params, inputs)
    return np.asarray(out), grads


def both(name):
    """Config, diffusers' model and the same weights as our parameters."""
    cfg, theirs = FluxConfig.from_hf(SMALL[name]), make_torch(SMALL[name])
    return cfg, theirs, to_params(cfg, numpy_state(theirs))


@cache
def trained(name):
    cfg, _, params = both(name)
    out, grads = gradients(cfg, params, make_inputs(cfg))
    return out, to_state(cfg, grads)


@cache
def reference(name):
    cfg, theirs = FluxConfig.from_hf(SMALL[name]), make_torch(SMALL[name])
    out = run_torch(theirs, *make_inputs(cfg))
    (out * torch.from_numpy(random(*out.shape, seed=9))).sum().backward()
    return out.detach().numpy(), {k: t.grad.numpy() for k, t in theirs.named_parameters()}


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_diffusers(name):
    assert worst(trained(name)[0], reference(name)[0]) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_diffusers_tensor_by_tensor(name):
    ours, theirs = trained(name)[1], reference(name)[1]
    assert ours.keys() == theirs.keys() and all(x.any() for x in theirs.values())
    errors = {key: worst(ours[key], theirs[key]) for key in theirs}
    assert not {key: error for key, error in errors.items() if not error < 1e-4}


@pytest.mark.parametrize("size", [(8, 12), (16, 4), (2, 2)])
@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_t15_t16_latents_of_any_size_are_packed_and_placed_as_the_pipeline_does(name, size):
    cfg, theirs, params = both(name)
    inputs = make_inputs(cfg, size)
    with torch.no_grad():
        assert worst(run_ours(cfg, params, inputs), run_torch(theirs, *inputs)) < 1e-5


def test_t15_a_token_holds_each_channels_two_by_two_pixels():
    latents = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    image = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    packed = FluxPipeline._pack_latents(image, 2, 3, 4, 6)
    np.testing.assert_array_equal(flux.pack(jnp.asarray(latents)), packed)
    np.testing.assert_array_equal(packed[0, 0, :4], latents[0, :2, :2, 0].ravel())
    np.testing.assert_array_equal(flux.unpack(flux.pack(latents), 4, 6), latents)


def test_t16_places_are_rows_and_columns_and_text_has_none():
    cfg, theirs, _ = both("dev")
    cos, sin = flux.rotation(cfg, 3, 5)
    places = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    wanted = theirs.pos_embed(torch.cat([places, torch.zeros(2, 3)]))
    np.testing.assert_allclose(np.repeat(cos, 2, 1), wanted[0][:15], atol=1e-7)
    np.testing.assert_allclose(np.repeat(sin, 2, 1), wanted[1][:15], atol=1e-7)
    assert (wanted[0][15:] == 1).all() and not wanted[1][15:].any()


def test_t16_the_order_of_text_tokens_does_not_matter_but_that_of_pixels_does():
    cfg, _, params = both("schnell")
    latents, *rest = make_inputs(cfg)
    sigma, context, pooled, guidance = rest
    out = run_ours(cfg, params, (latents, *rest))
    turned = run_ours(cfg, params, (latents, sigma, context[:, ::-1], pooled, guidance))
    assert worst(turned, out) < 1e-5
    moved = run_ours(cfg, params, (np.roll(latents, 2, axis=2), *rest))
    assert worst(np.roll(moved, -2, axis=2), out) > 1e-3


def test_t17_sigma_and_guidance_are_taken_as_they_are():
    """diffusers' model multiplies both by 1000 itself, and so does ours."""
    cfg, theirs, params = both("dev")
    latents, sigma, context, pooled, guidance = make_inputs(cfg)
    model = P.bind(template(cfg), params)
    with torch.no_grad():
        scaled = [torch.from_numpy(1000 * one) for one in (sigma, guidance)]
        wanted = theirs.time_text_embed(*scaled, torch.from_numpy(pooled))
    assert worst(model.time(jnp.asarray(sigma), pooled, guidance, jnp.float32, None), wanted) < 1e-5
    out = run_ours(cfg, params, (latents, sigma, context, pooled, guidance))
    with torch.no_grad():
        stock = run_torch(make_torch(SMALL["dev"], False), *make_inputs(cfg))
    assert worst(out, stock) < 1e-4
    wrong = run_ours(cfg, params, (latents, 1000 * sigma, context, pooled, guidance))
    assert worst(wrong, out) > 1e-3


def test_t18_dev_has_a_guidance_and_schnell_has_none():
    cfg, theirs, params = both("dev")
    *inputs, guidance = make_inputs(cfg)
    out = run_ours(cfg, params, (*inputs, guidance))
    other = np.full_like(guidance, 2.5)
    assert worst(run_ours(cfg, params, (*inputs, other)), out) > 1e-4
    with torch.no_grad():
        wanted = run_torch(theirs, *inputs, other)
        with pytest.raises(TypeError):
            run_torch(theirs, *inputs, None)
    assert worst(run_ours(cfg, params, (*inputs, other)), wanted) < 1e-5
    leaves = P.describe(template(FluxConfig.from_hf(SMALL["schnell"])))
    assert not any("guidance" in path for path in leaves)
    assert any("guidance" in path for path in P.describe(template(cfg)))


def test_t19_a_single_block_puts_attention_before_the_mlp():
    """Exchanging the two halves of its output projection changes the picture."""
    cfg, _, params = both("one block")
    kernel = params["singles.proj_out.kernel"]
    assert kernel.shape == (1, 5 * cfg.dim, cfg.dim)
    turned = {**params, "singles.proj_out.kernel": np.roll(kernel, cfg.dim, axis=1)}
    inputs = make_inputs(cfg)
    assert worst(run_ours(cfg, turned, inputs), run_ours(cfg, params, inputs)) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_bitwise_and_every_tensor_has_one_place(name):
    cfg, theirs, params = both(name)
    state, back = numpy_state(theirs), to_state(cfg, params)
    assert back.keys() == state.keys()
    assert all(back[key].tobytes() == state[key].tobytes() for key in state)
    assert all(back[key].shape == state[key].shape for key in state)


def test_a_sharded_folder_in_bf16_comes_back_bitwise(tmp_path):
    theirs = make_torch(SMALL["dev"]).bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("diffusion_pytorch_model-*.safetensors"))) > 2
    source = open_component(str(tmp_path), "transformer")
    architecture = registry.find(source.config, "denoiser")
    cfg = architecture.config(source.config, "transformer/config.json")
    assert architecture.module is FluxTransformer and cfg == FluxConfig.from_hf(SMALL["dev"])
    part, leaves = architecture.part(source, cfg), P.describe(template(cfg))
    places = shardings(leaves, make_mesh(data=2, fsdp=4))
    params = transfer.load(part, leaves, places, jnp.float32, set(leaves))
    made = dict(transfer.export(part, leaves, params, {}, None).tensors)
    assert made.keys() == theirs.state_dict().keys()
    for key, tensor in theirs.state_dict().items():
        assert made[key].dtype == "bfloat16"
        assert made[key].tobytes() == tensor.view(torch.int16).numpy().tobytes()


def test_unknown_missing_and_misshaped_tensors_are_all_named():
    cfg, state = FluxConfig.from_hf(SMALL["schnell"]), numpy_state(make_torch(SMALL["dev"]))
    del state["single_transformer_blocks.1.attn.to_q.bias"]
    state["proj_out.bias"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        to_params(cfg, state)
    text = str(error.value)
    assert "missing tensor single_transformer_blocks.1.attn.to_q.bias" in text
    assert "unexpected tensor time_text_embed.guidance_embedder" in text and "proj_out.bias" in text


def test_remat_changes_no_gradient():
    cfg, _, params = both("dev")
    inputs = make_inputs(cfg)
    grads = {}
    for remat in ("none", *CONV_REMAT):

        def loss(params, remat=remat):
            return jnp.square(P.bind(template(cfg), params)(*inputs, remat=remat)).sum()

        grads[remat] = jax.jit(jax.grad(loss)).lower(params).compile(QUICK)(params)
    for remat in CONV_REMAT:
        assert max(worst(grads[remat][path], g) for path, g in grads["none"].items()) < 1e-4


def test_bf16_is_as_near_to_fp32_as_diffusers_and_sharded_rows_equal_one_device():
    cfg, theirs, params = both("dev")
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
    cfg, theirs, _ = both("dev")
    inputs = make_inputs(cfg)
    plain = sdpa_kernel(SDPBackend.MATH)  # the counter has no formula for the CPU's own kernel
    with FlopCounterMode(display=False) as counter, plain, torch.no_grad():
        run_torch(theirs, *inputs)
    ours = flops.count(lambda model: model(*inputs), template(cfg))
    assert ours == counter.get_total_flops()
