"""The transformer of FLUX.1 against diffusers: outputs, gradients and weights, fp32."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.denoisers.flux import flux
from tests.parity.twins import (
    ExactSinusoids,
    Twin,
    assert_a_sharded_folder_comes_back,
    assert_bf16_is_as_near_as_autocast_and_sharded_rows_equal_one_device,
    assert_flops_are_torchs,
    assert_remat_changes_no_gradient,
    assert_round_trip_is_bitwise,
    moved,
    numpy_state,
    random,
    worst,
)

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


def make_torch(config, exact=True):
    """diffusers' random transformer. exact: with sinusoids that are rounded once."""
    torch.manual_seed(0)
    theirs = moved(FluxTransformer2DModel(**config))
    if exact:
        theirs.time_text_embed.time_proj = ExactSinusoids()
    return theirs


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


@cache
def both(name):
    return Twin(flux.ARCHITECTURE, SMALL[name], make_torch(SMALL[name]), run_torch)


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
    assert ours.keys() == theirs.keys() and all(x.any() for x in theirs.values())
    errors = {key: worst(ours[key], theirs[key]) for key in theirs}
    assert not {key: error for key, error in errors.items() if not error < 1e-4}


@pytest.mark.parametrize("size", [(8, 12), (16, 4), (2, 2)])
@pytest.mark.parametrize("name", ["dev", "schnell"])
def test_t15_t16_latents_of_any_size_are_packed_and_placed_as_the_pipeline_does(name, size):
    one = both(name)
    inputs = make_inputs(one.cfg, size)
    assert worst(one.ours(inputs), one.wanted(inputs)) < 1e-5


def test_t15_a_token_holds_each_channels_two_by_two_pixels():
    latents = np.arange(2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 4, 6, 3)
    image = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    packed = FluxPipeline._pack_latents(image, 2, 3, 4, 6)
    np.testing.assert_array_equal(flux.pack(jnp.asarray(latents)), packed)
    np.testing.assert_array_equal(packed[0, 0, :4], latents[0, :2, :2, 0].ravel())
    np.testing.assert_array_equal(flux.unpack(flux.pack(latents), 4, 6), latents)


def test_t16_places_are_rows_and_columns_and_text_has_none():
    one = both("dev")
    cos, sin = flux.rotation(one.cfg, 3, 5)
    places = FluxPipeline._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32)
    wanted = one.theirs.pos_embed(torch.cat([places, torch.zeros(2, 3)]))
    np.testing.assert_allclose(np.repeat(cos, 2, 1), wanted[0][:15], atol=1e-7)
    np.testing.assert_allclose(np.repeat(sin, 2, 1), wanted[1][:15], atol=1e-7)
    assert (wanted[0][15:] == 1).all() and not wanted[1][15:].any()


def test_t16_the_order_of_text_tokens_does_not_matter_but_that_of_pixels_does():
    one = both("schnell")
    latents, sigma, context, *rest = make_inputs(one.cfg)
    out = one.ours((latents, sigma, context, *rest))
    assert worst(one.ours((latents, sigma, context[:, ::-1], *rest)), out) < 1e-5
    rolled = one.ours((np.roll(latents, 2, axis=2), sigma, context, *rest))
    assert worst(np.roll(rolled, -2, axis=2), out) > 1e-3


def test_t17_sigma_and_guidance_are_taken_as_they_are():
    """diffusers' model multiplies both by 1000 itself, and so does ours."""
    one = both("dev")
    latents, sigma, context, pooled, guidance = inputs = make_inputs(one.cfg)
    model = P.bind(one.template, one.params)
    with torch.no_grad():
        scaled = [torch.from_numpy(1000 * x) for x in (sigma, guidance)]
        wanted = one.theirs.time_text_embed(*scaled, torch.from_numpy(pooled))
        stock = run_torch(make_torch(SMALL["dev"], exact=False), *inputs)
    assert worst(model.time(jnp.asarray(sigma), pooled, guidance, jnp.float32, None), wanted) < 1e-5
    out = one.ours(inputs)
    assert worst(out, stock) < 1e-4
    assert worst(one.ours((latents, 1000 * sigma, context, pooled, guidance)), out) > 1e-3


def test_t18_dev_has_a_guidance_and_schnell_has_none():
    one = both("dev")
    *inputs, guidance = make_inputs(one.cfg)
    other = np.full_like(guidance, 2.5)
    out = one.ours((*inputs, other))
    assert worst(out, one.ours((*inputs, guidance))) > 1e-4
    assert worst(out, one.wanted((*inputs, other))) < 1e-5
    with pytest.raises(TypeError):
        one.wanted((*inputs, None))
    assert not any("guidance" in path for path in P.describe(both("schnell").template))
    assert any("guidance" in path for path in P.describe(one.template))


def test_t19_a_single_block_puts_attention_before_the_mlp():
    """Exchanging the two halves of its output projection changes the picture."""
    one, name = both("one block"), "singles.proj_out.kernel"
    kernel, inputs = one.params[name], make_inputs(one.cfg)
    assert kernel.shape == (1, 5 * one.cfg.dim, one.cfg.dim)
    turned = {**one.params, name: np.roll(kernel, one.cfg.dim, axis=1)}
    assert worst(one.ours(inputs, turned), one.ours(inputs)) > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_bitwise_and_every_tensor_has_one_place(name):
    assert_round_trip_is_bitwise(both(name))


def test_a_sharded_folder_in_bf16_comes_back_bitwise(tmp_path):
    assert_a_sharded_folder_comes_back(both("dev"), make_torch(SMALL["dev"]).bfloat16(), tmp_path)


def test_unknown_missing_and_misshaped_tensors_are_all_named():
    state = numpy_state(both("dev").theirs)
    del state["single_transformer_blocks.1.attn.to_q.bias"]
    state["proj_out.bias"] = np.zeros(3)
    with pytest.raises(UserError) as error:
        both("schnell").to_params(state)
    text = str(error.value)
    assert "missing tensor single_transformer_blocks.1.attn.to_q.bias" in text
    assert "unexpected tensor time_text_embed.guidance_embedder" in text and "proj_out.bias" in text


def test_remat_changes_no_gradient():
    assert_remat_changes_no_gradient(both("dev"), make_inputs(both("dev").cfg))


def test_bf16_is_as_near_to_fp32_as_diffusers_and_sharded_rows_equal_one_device():
    one = both("dev")
    assert_bf16_is_as_near_as_autocast_and_sharded_rows_equal_one_device(one, make_inputs(one.cfg))


def test_flops_are_torchs():
    assert_flops_are_torchs(both("dev"), make_inputs(both("dev").cfg))
