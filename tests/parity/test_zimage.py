"""The transformer of Z-Image against diffusers: outputs, gradients and weights, fp32."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.denoisers.zimage import zimage
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
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 6, 6],
    "axes_lens": [128, 32, 32],
}
SMALL = {
    "usual": TINY,
    "one block": {**TINY, "n_layers": 1, "n_refiner_layers": 1, "norm_eps": 1e-6},
    "no norms": {**TINY, "qk_norm": False, "t_scale": 500.0, "rope_theta": 100.0},
}
LENGTHS = [7, 40]  # of the captions of a batch: 32 and 64 with their pads


def make_torch(config, exact=True):
    """diffusers' random transformer. exact: with sinusoids that are rounded once."""
    torch.manual_seed(0)
    theirs = moved(ZImageTransformer2DModel(**config))
    if exact:
        sinusoids = ExactSinusoids()
        theirs.t_embedder.timestep_embedding = lambda t, dim: sinusoids(t)
    return theirs


def make_inputs(size=(8, 12), lengths=LENGTHS, rows=64):
    """Latents, sigmas, padded text and its lengths."""
    batch = len(lengths)
    latents, context = random(batch, *size, 4, seed=1), random(batch, rows, 16, seed=2)
    sigma = np.array([0.9875, 0.2858, 0.5][:batch], np.float32)
    return latents, sigma, context, np.array(lengths, np.int32)


def run_torch(theirs, latents, sigma, context, lengths):
    """As ZImagePipeline calls it; NHWC outside; keeps the graph."""
    images = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())[:, :, None]
    texts = [torch.from_numpy(text[:n].copy()) for text, n in zip(context, lengths, strict=True)]
    times = torch.from_numpy(np.float32(1) - sigma)
    out = theirs(list(images), times, texts, return_dict=False)[0]
    return -torch.stack(out)[:, :, 0].permute(0, 2, 3, 1)


@cache
def both(name):
    return Twin(zimage.ARCHITECTURE, SMALL[name], make_torch(SMALL[name]), run_torch)


@cache
def trained(name):
    return both(name).gradients(make_inputs())


@cache
def reference(name):
    return both(name).reference(make_inputs())


@pytest.mark.parametrize("name", SMALL)
def test_forward_is_diffusers(name):
    assert worst(trained(name)[0], reference(name)[0]) < 1e-5


@pytest.mark.parametrize("name", SMALL)
def test_gradients_are_diffusers_tensor_by_tensor(name):
    ours, theirs = trained(name)[1], reference(name)[1]
    assert ours.keys() == theirs.keys() and all(x.any() for x in theirs.values())
    errors = {key: worst(ours[key], theirs[key]) for key in theirs}
    assert not {key: error for key, error in errors.items() if not error < 1e-4}


@pytest.mark.parametrize("size", [(8, 16), (16, 4), (2, 2)])
def test_t26_latents_of_any_size_are_filled_up_and_placed_as_diffusers_does(size):
    """8 x 16 latents are 32 tokens, which need no pad."""
    one, inputs = both("usual"), make_inputs(size)
    assert worst(one.ours(inputs), one.wanted(inputs)) < 1e-5


def test_t24_time_runs_from_noise_to_data_and_the_output_is_negated():
    one = both("usual")
    latents, sigma, *text = make_inputs()
    turned = -run_torch(one.theirs, latents, np.float32(1) - sigma, *text).detach().numpy()
    assert worst(one.ours((latents, sigma, *text)), turned) > 1e-2
    stock = make_torch(SMALL["usual"], exact=False)
    with torch.no_grad():
        wanted = run_torch(stock, latents, sigma, *text)
    assert worst(one.ours((latents, sigma, *text)), wanted) < 1e-4


@pytest.mark.parametrize("lengths", [[1, 64], [32, 33], [31, 8]])
def test_t26_a_caption_is_filled_up_to_a_multiple_of_32_by_learned_pads(lengths):
    one, inputs = both("usual"), make_inputs(lengths=lengths)
    out = one.ours(inputs)
    assert worst(out, one.wanted(inputs)) < 1e-5
    other = {**one.params, "context_pad_token": one.params["context_pad_token"] + 1}
    changed = np.abs(one.ours(inputs, other) - out).max(axis=(1, 2, 3)) > 1e-4
    np.testing.assert_array_equal(changed, np.array(lengths) % 32 > 0)


def test_t26_a_sample_is_the_same_in_any_batch_and_whatever_follows_its_caption():
    one = both("usual")
    latents, sigma, context, lengths = make_inputs()
    out = one.ours((latents, sigma, context, lengths))
    alone = one.ours((latents[:1], sigma[:1], context[:1, :20], lengths[:1]))
    assert worst(alone, out[:1]) < 1e-5
    dirty = context.copy()
    dirty[0, 7:] = 9.0
    np.testing.assert_array_equal(one.ours((latents, sigma, dirty, lengths)), out)


def test_t26_places_are_those_of_diffusers():
    one = both("usual")
    images, texts = [torch.zeros(4, 1, 6, 10)], [torch.zeros(40, 16)]
    made = one.theirs.patchify_and_embed(images, texts, 2, 1)
    wanted = one.theirs.rope_embedder(torch.cat([made[3][0], made[4][0][:64]]))
    found = zimage.places(one.cfg, (3, 5), jnp.array([40]), 96)
    cos, sin = (np.asarray(x[0]) for x in found.rope)
    count = len(wanted)
    assert count == 32 + 64
    np.testing.assert_allclose(cos[:count], wanted.real, atol=1e-6)
    np.testing.assert_allclose(sin[:count], wanted.imag, atol=1e-6)
    np.testing.assert_array_equal(found.segments[0], [1] * count + [0] * 32)


def test_t26b_a_token_holds_pixel_after_pixel_with_its_channels():
    latents = np.arange(4 * 6 * 3, dtype=np.float32).reshape(1, 4, 6, 3)
    image = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())[0][:, None]
    packed, _, _ = both("usual").theirs._patchify_image(image, 2, 1)
    np.testing.assert_array_equal(zimage.pack_pixels(jnp.asarray(latents))[0], packed)
    np.testing.assert_array_equal(packed[0, :6], latents[0, 0, :2].ravel())
    again = zimage.unpack_pixels(zimage.pack_pixels(latents), 4, 6)
    np.testing.assert_array_equal(again, latents)


def test_t27_a_blocks_gates_pass_a_tanh_and_its_scales_do_not():
    """A silu before the modulation, or a gate without tanh, would give another block."""
    one = both("usual")
    theirs, names = one.theirs.layers[1], "layers."
    block = P.bind(one.template, one.params).layers
    own = jax.tree.map(lambda x: x[1], block)
    x, time = random(2, 5, 32, seed=4), 3 * random(2, 32, seed=5)
    rope = np.ones((5, 8), np.float32), np.zeros((5, 8), np.float32)
    out = own(jnp.asarray(x), jnp.asarray(time), None, zimage.Places(rope))
    places = torch.ones(2, 5, 8, dtype=torch.complex64)
    with torch.no_grad():
        wanted = theirs(torch.from_numpy(x), None, places, torch.from_numpy(time))
    assert worst(out, wanted) < 1e-5
    leaves = P.describe(one.template)
    assert leaves[f"{names}modulation.kernel"].shape == (2, 32, 128)
    assert not any(path.startswith("context_refiner.modulation") for path in leaves)
    wide = zimage.ARCHITECTURE.config({}, "config.json")
    assert wide.mlp_dim == 10240 and wide.dim == 3840


@pytest.mark.parametrize("name", SMALL)
def test_round_trip_is_bitwise_and_every_tensor_has_one_place(name):
    assert_round_trip_is_bitwise(both(name))


def test_a_sharded_folder_in_bf16_comes_back_bitwise(tmp_path):
    theirs = make_torch(TINY).bfloat16()
    assert_a_sharded_folder_comes_back(both("usual"), theirs, tmp_path)


def test_unknown_and_missing_tensors_are_all_named():
    one = both("usual")
    state = numpy_state(one.theirs)
    del state["layers.1.attention.to_q.weight"]
    with pytest.raises(UserError) as error:
        one.to_params({**state, "siglip_pad_token": np.zeros((1, 32))})
    text = str(error.value)
    assert "missing tensor layers.1.attention.to_q.weight" in text
    assert "unexpected tensor siglip_pad_token" in text


def test_remat_changes_no_gradient():
    assert_remat_changes_no_gradient(both("one block"), make_inputs())


def test_bf16_is_as_near_to_fp32_as_diffusers():
    one, inputs = both("usual"), make_inputs()
    alone, half = one.ours(inputs), one.ours(inputs, dtype=jnp.bfloat16)
    theirs = make_torch(SMALL["usual"]).bfloat16()  # as the pipeline is loaded
    images = torch.from_numpy(inputs[0].transpose(0, 3, 1, 2).copy()).bfloat16()[:, :, None]
    texts = [torch.from_numpy(x[:n].copy()).bfloat16() for x, n in zip(*inputs[2:], strict=True)]
    with torch.no_grad():
        made = theirs(list(images), torch.from_numpy(1 - inputs[1]), texts, return_dict=False)[0]
    usual = -torch.stack(made)[:, :, 0].permute(0, 2, 3, 1).float().numpy()
    assert half.dtype == jnp.bfloat16
    error = np.abs(np.asarray(half, np.float32) - alone).mean()
    assert error < 1.5 * np.abs(usual - alone).mean()
    with pytest.raises(UserError, match="latents of 3 x 4 are no multiple"):
        one.ours(make_inputs((3, 4)))
