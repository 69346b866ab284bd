"""The transformer of FLUX.2 klein against diffusers: outputs, gradients and weights, fp32."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.denoisers.flux import flux2
from tests.parity.twins import (
    ExactSinusoids,
    Twin,
    assert_a_sharded_folder_comes_back,
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
    "axes_dims_rope": (4, 4, 4, 4),
    "guidance_embeds": False,
}
SMALL = {
    "usual": TINY,
    "one block": {**TINY, "num_layers": 1, "num_single_layers": 1, "axes_dims_rope": (2, 4, 4, 6)},
    "other numbers": {**TINY, "mlp_ratio": 2.5, "rope_theta": 100, "eps": 1e-4},
}


def make_torch(config, exact=True):
    """diffusers' random transformer. exact: with sinusoids that are rounded once."""
    torch.manual_seed(0)
    theirs = moved(Flux2Transformer2DModel(**config))
    if exact:
        theirs.time_guidance_embed.time_proj = ExactSinusoids()
    return theirs


def make_inputs(size=(8, 12), rows=7):
    latents, context = random(2, *size, 4, seed=1), random(2, rows, 24, seed=2)
    return latents, np.array([0.9875, 0.2858], np.float32), context


def run_torch(theirs, latents, sigma, context):
    """As Flux2KleinPipeline calls it; NHWC outside; keeps the graph."""
    pipe, text = Flux2KleinPipeline, torch.from_numpy(context)
    cells = pipe._patchify_latents(torch.from_numpy(latents.transpose(0, 3, 1, 2).copy()))
    places = pipe._prepare_latent_ids(cells)
    out = theirs(
        pipe._pack_latents(cells), text, torch.from_numpy(sigma),
        places, pipe._prepare_text_ids(text), return_dict=False,
    )[0]  # fmt: skip
    made = pipe._unpack_latents_with_ids(out, places, *cells.shape[2:])
    return pipe._unpatchify_latents(made).permute(0, 2, 3, 1)


@cache
def both(name):
    return Twin(flux2.ARCHITECTURE, SMALL[name], make_torch(SMALL[name]), run_torch)


@cache
def trained(name):
    return both(name).gradients(make_inputs())


@cache
def reference(name):
    return both(name).reference(make_inputs())


@pytest.mark.parametrize("name", SMALL)
def test_t30_forward_is_diffusers(name):
    assert worst(trained(name)[0], reference(name)[0]) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_t30_gradients_are_diffusers_tensor_by_tensor(name):
    ours, theirs = trained(name)[1], reference(name)[1]
    assert ours.keys() == theirs.keys() and all(x.any() for x in theirs.values())
    errors = {key: worst(ours[key], theirs[key]) for key in theirs}
    assert not {key: error for key, error in errors.items() if not error < 1e-4}


@pytest.mark.parametrize(("size", "rows"), [((8, 16), 1), ((16, 4), 12), ((2, 2), 33)])
def test_latents_and_texts_of_any_size(size, rows):
    one, inputs = both("usual"), make_inputs(size, rows)
    assert worst(one.ours(inputs), one.wanted(inputs)) < 1e-5


def test_t30_no_tensor_is_a_bias_and_one_modulation_is_that_of_all_blocks():
    leaves = P.describe(both("usual").template)
    assert not any(path.endswith(".bias") for path in leaves)
    modulations = {p: leaf.shape for p, leaf in leaves.items() if "modulation" in p}
    assert modulations == {
        "image_modulation.linear.kernel": (32, 6 * 32),
        "text_modulation.linear.kernel": (32, 6 * 32),
        "single_modulation.linear.kernel": (32, 3 * 32),
    }
    fused = leaves["singles.to_qkv_mlp_proj.kernel"].shape
    assert fused == (3, 32, 3 * 32 + 2 * 3 * 32)
    assert leaves["singles.to_out.kernel"].shape == (3, 32 + 3 * 32, 32)


def test_t30_the_first_half_passes_the_silu_and_the_second_does_not():
    one = both("usual")
    layer = jax.tree.map(lambda x: jnp.asarray(x[1]), P.bind(one.template, one.params).doubles).ff
    x = random(2, 5, 32, seed=4)
    with torch.no_grad():
        wanted = one.theirs.transformer_blocks[1].ff(torch.from_numpy(x))
    assert worst(layer(jnp.asarray(x), None), wanted) < 1e-5
    turned = jnp.roll(layer.linear_in.kernel[...], 96, axis=1)
    layer.linear_in.kernel[...] = turned
    assert worst(layer(jnp.asarray(x), None), wanted) > 1e-2


def test_t30_text_has_places_of_its_own_on_the_fourth_axis():
    one, (latents, sigma, context) = both("usual"), make_inputs()
    theirs = one.theirs.pos_embed
    pipe = Flux2KleinPipeline
    image = pipe._prepare_latent_ids(torch.zeros(1, 16, 3, 5))[0]
    text = pipe._prepare_text_ids(torch.zeros(1, 7, 24))[0]
    for found, places in zip(flux2.rotations(one.cfg, (3, 5), 7), (image, text), strict=True):
        for own, wanted in zip(found, theirs(places), strict=True):
            np.testing.assert_allclose(own, wanted[:, ::2], atol=1e-6)
    out = one.ours((latents, sigma, context))
    assert worst(one.ours((latents, sigma, context[:, ::-1].copy())), out) > 1e-4


def test_t30_times_are_sigmas_as_for_flux_1():
    one, (latents, sigma, context) = both("usual"), make_inputs()
    stock = make_torch(SMALL["usual"], exact=False)
    with torch.no_grad():
        wanted = run_torch(stock, latents, sigma, context)
        thousands = run_torch(stock, latents, 1000 * sigma, context)
    assert worst(one.ours((latents, sigma, context)), wanted) < 1e-4
    assert worst(thousands, wanted) > 1e-2


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_bitwise_and_every_tensor_has_one_place(name):
    assert_round_trip_is_bitwise(both(name))


def test_a_sharded_folder_in_bf16_comes_back_bitwise(tmp_path):
    theirs = make_torch(TINY).bfloat16()
    assert_a_sharded_folder_comes_back(both("usual"), theirs, tmp_path)


def test_unknown_and_missing_tensors_are_all_named():
    one = both("usual")
    state = numpy_state(one.theirs)
    gone = "single_transformer_blocks.1.attn.to_qkv_mlp_proj.weight"
    del state[gone]
    with pytest.raises(UserError) as error:
        one.to_params({**state, "x_embedder.bias": np.zeros(32)})
    assert f"missing tensor {gone}" in str(error.value)
    assert "unexpected tensor x_embedder.bias" in str(error.value)


def test_remat_changes_no_gradient():
    assert_remat_changes_no_gradient(both("one block"), make_inputs())


def test_bf16_is_as_near_to_fp32_as_diffusers():
    one, inputs = both("usual"), make_inputs()
    alone, half = one.ours(inputs), one.ours(inputs, dtype=jnp.bfloat16)
    theirs, pipe = make_torch(SMALL["usual"]).bfloat16(), Flux2KleinPipeline
    image = torch.from_numpy(inputs[0].transpose(0, 3, 1, 2).copy()).bfloat16()
    cells, text = pipe._patchify_latents(image), torch.from_numpy(inputs[2]).bfloat16()
    places, words = pipe._prepare_latent_ids(cells), pipe._prepare_text_ids(text)
    with torch.no_grad():
        out = theirs(pipe._pack_latents(cells), text, torch.from_numpy(inputs[1]), places, words)[0]
    made = pipe._unpack_latents_with_ids(out, places, *cells.shape[2:])
    usual = pipe._unpatchify_latents(made).permute(0, 2, 3, 1).float().numpy()
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - alone).mean()
    assert error < 1.5 * np.abs(usual - alone).mean()
    with pytest.raises(UserError, match="latents of 3 x 4 are no multiple"):
        one.ours(make_inputs((3, 4)))
