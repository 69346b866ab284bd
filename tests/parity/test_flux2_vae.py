"""The VAE of FLUX.2 against diffusers: latents, pictures, statistics, fp32."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline

from jaxft.core.errors import UserError
from jaxft.core.params import CONSTANT_ROLE, bind, describe
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae import VAE
from jaxft.models.autoencoders.vae_config import FLUX2_DEFAULTS, VAEConfig
from jaxft.weights import transfer
from jaxft.weights.folders.diffusers import open_component
from tests.parity.twins import random, worst
from tests.tiny_klein import make_flux2_vae

pytestmark = pytest.mark.usefixtures("one_thread")


class Opened:
    def __init__(self, folder):
        self.theirs = make_flux2_vae()
        self.theirs.save_pretrained(folder)
        source = open_component(str(folder), "vae")
        self.cfg = VAEConfig.from_hf(source.config)
        template = jax.eval_shape(lambda: VAE(self.cfg, key=jax.random.key(0)))
        self.leaves = describe(template)
        table = vae.RULES, {}, vae.VAE_IGNORE
        self.part = transfer.Part("", source.name, source.tensors, *table)
        places = shardings(self.leaves, one_device_mesh())
        wanted = set(self.leaves)
        self.params = transfer.load(self.part, self.leaves, places, jnp.float32, wanted)
        self.ours = bind(template, self.params)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return Opened(tmp_path_factory.mktemp("vae"))


def channels_first(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def test_t31_latents_are_patches_that_the_statistics_normalise(one):
    """The pipeline's own function, on pictures that are not square."""
    pictures = np.tanh(random(2, 16, 24, 3, seed=1))
    pipe = object.__new__(Flux2KleinPipeline)
    pipe.vae = one.theirs
    with torch.no_grad():
        cells = pipe._encode_vae_image(channels_first(pictures), None)
        wanted = pipe._unpatchify_latents(cells).permute(0, 2, 3, 1)
    moments = one.ours.encode(jnp.asarray(pictures))
    made = one.ours.scale(moments.mean)
    assert made.shape == (2, 8, 12, 4) and cells.shape == (2, 16, 4, 6)
    assert worst(made, wanted) < 1e-5
    assert worst(moments.mean, wanted) > 1e-2
    with torch.no_grad():
        posterior = one.theirs.encode(channels_first(pictures)).latent_dist
    assert worst(moments.logvar, posterior.logvar.permute(0, 2, 3, 1)) < 1e-5


def test_t31_pictures_are_decoded_after_the_inverse(one):
    latents = random(2, 8, 12, 4, seed=2)
    pipe, bn = Flux2KleinPipeline, one.theirs.bn
    cells = pipe._patchify_latents(channels_first(latents))
    std = torch.sqrt(bn.running_var + 1e-4)[:, None, None]
    with torch.no_grad():
        whole = pipe._unpatchify_latents(cells * std + bn.running_mean[:, None, None])
        wanted = one.theirs.decode(whole).sample.permute(0, 2, 3, 1)
    unscaled = one.ours.unscale(jnp.asarray(latents))
    assert worst(one.ours.decode(unscaled), wanted) < 1e-5
    assert worst(one.ours.scale(unscaled), latents) < 1e-5


def test_t31_statistics_never_train_and_leave_byte_for_byte(one):
    assert {p for p, leaf in one.leaves.items() if leaf.role == CONSTANT_ROLE} == {
        "bn.mean",
        "bn.var",
    }
    made = dict(transfer.export(one.part, one.leaves, one.params, {}, None).tensors)
    state = one.theirs.state_dict()
    assert made.keys() == state.keys() and state["bn.num_batches_tracked"] == 7
    assert all(made[key].tobytes() == x.numpy().tobytes() for key, x in state.items())


def test_every_key_of_diffusers_is_read_and_defaults_agree():
    signature = inspect.signature(AutoencoderKLFlux2.__init__).parameters
    theirs = {key: p.default for key, p in signature.items() if key != "self"}
    assert {**theirs, "_class_name": "AutoencoderKLFlux2"} == FLUX2_DEFAULTS
    cfg = VAEConfig.from_hf({"_class_name": "AutoencoderKLFlux2"})
    assert (cfg.latent_channels, cfg.factor, cfg.norm_eps) == (32, 8, 1e-4)
    assert "norm_eps" not in repr(VAEConfig.from_hf({}))  # it would rename caches of latents


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"decoder_block_out_channels": [64, 128]}, "decoder_block_out_channels=.*expected null"),
        ({"patch_size": [1, 1]}, r"patch_size=\[1, 1\] is not supported; expected \[2, 2\]"),
        ({"batch_norm_eps": None}, "batch_norm_eps=null"),
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
    ],
)
def test_other_values_are_refused_by_key_and_file(change, words):
    with pytest.raises(UserError, match=words) as caught:
        VAEConfig.from_hf({**FLUX2_DEFAULTS, **change}, "k/vae/config.json")
    assert str(caught.value).startswith("k/vae/config.json: ")
