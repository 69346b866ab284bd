"""The face that both kinds of autoencoder show: which one, its losses, what an export writes."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import JanusVQVAE

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.autoencoders import vqgan
from jaxft.models.autoencoders.vqgan import Quantized
from jaxft.tasks.autoencoder.codec import CODEBOOK_PATH, _stray, open_codec
from jaxft.tasks.autoencoder.exports import side_files
from jaxft.weights import transfer
from jaxft.weights.folders.diffusers import open_component
from tests.tiny_autoencoders import make_janus, make_vae, make_vqmodel

QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
MAKE = {"vae": make_vae, "vqmodel": make_vqmodel, "janus": make_janus}
X = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)


def opened(folder):
    """(source, codec, leaves, parameters, module) of a folder."""
    source = open_component(str(folder), "vae")
    codec = open_codec(source.config, f"{folder}/config.json")
    template = jax.eval_shape(lambda: codec.module(codec.cfg, key=jax.random.key(0)))
    leaves = {f"vae.{path}": leaf for path, leaf in P.describe(template).items()}
    part, places = codec.part(source), shardings(leaves, one_device_mesh())
    params = transfer.load(part, leaves, places, "float32", set(leaves))
    return source, codec, leaves, params, template


def bound(template, params):
    own = {path.removeprefix("vae."): array for path, array in params.items()}
    return P.bind(template, own)


@pytest.mark.parametrize("name", MAKE)
def test_kinds(tmp_path, name):
    codec = opened(MAKE[name](tmp_path / name))[1]
    wanted = {
        "vae": ("AutoencoderKL", 0, "diffusion_pytorch_model"),
        "vqmodel": ("VQModel", 16, "diffusion_pytorch_model"),
        "janus": ("janus_vqgan", 16, "model"),
    }
    assert (codec.kind, codec.codes, codec.stem) == wanted[name]


@pytest.mark.parametrize("config", [{"model_type": "llama"}, {"_class_name": "AutoencoderTiny"}])
def test_other_models_are_refused(config):
    with pytest.raises(UserError, match=r"here/config\.json: .* is not supported.*AutoencoderKL"):
        open_codec(config, "here/config.json")


def test_revival_moves_unused_codes_alone_and_towards_the_latents(tmp_path):
    _, codec, _, params, template = opened(make_vqmodel(tmp_path / "vq"))
    start = params[CODEBOOK_PATH]

    @jax.jit
    def run(table, x):
        made = codec.reconstruct(bound(template, {**params, CODEBOOK_PATH: table}), x, None, "none")
        return made.latent["revive"][0], made.codes

    (value, codes), slope = run(start, X), jax.grad(lambda t: run(t, X)[0])(start)
    used = np.isin(np.arange(16), codes)
    assert 0 < used.sum() < 16, "the test wants both kinds"
    moved = np.abs(slope).max(axis=1) > 0
    np.testing.assert_array_equal(moved, ~used)
    assert run(start - 10 * slope, X)[0] < value


def test_revival_brings_dead_codes_into_use(tmp_path):
    """Half of the codebook lies in a clump where no latent comes; each step sees new latents."""
    params, template = opened(make_vqmodel(tmp_path / "vq", codes=32))[3:]
    keys = jax.random.split(jax.random.key(0), 600)
    clump = 3 + 0.05 * jax.random.normal(jax.random.key(1), (16, 4))
    start, tx = jnp.concatenate([latents(keys[0])[0, 0], clump]), optax.adam(0.02)

    def look(table, z):
        model = bound(template, {**params, CODEBOOK_PATH: table})
        codes = model.quantize.nearest(z, l2=False)
        return model, Quantized(codes, model.quantize(codes, unit=False), z)

    def loss(table, z, revive):
        model, found = look(table, z)
        return vqgan.losses(z, found.quantized).codebook.mean() + revive * _stray(model, found)

    @jax.jit
    def train(revive):
        def body(carry, key):
            table, state = carry
            updates, state = tx.update(jax.grad(loss)(table, latents(key), revive), state)
            return (optax.apply_updates(table, updates), state), None

        table = jax.lax.scan(body, (start, tx.init(start)), keys)[0][0]
        return look(table, latents(keys[0]))[1].codes

    used = [len(np.unique(train(revive))) for revive in (0.0, 1.0)]
    assert used[0] <= 16 and used[1] >= 28


def latents(key):
    return 0.5 * jax.random.normal(key, (2, 16, 16, 4)) * jnp.array([4.0, 1.0, 1.0, 1.0])


def test_janus_exports_find_our_codes(tmp_path):
    """transformers searches by the rows as they lie in the file: only of unit length will do."""
    source, codec, leaves, params, template = opened(make_janus(tmp_path / "janus"))
    made = jax.jit(codec.reconstruct, compiler_options=QUICK, static_argnums=(2, 3))(
        bound(template, params), X, None, "none"
    )
    written = codec.exported(params)
    out = transfer.export(codec.part(source), leaves, written, {}, None)
    lengths = jnp.linalg.norm(written[CODEBOOK_PATH], axis=-1)
    np.testing.assert_allclose(lengths, 1.0, rtol=1e-6)
    hf = JanusVQVAE.from_pretrained(tmp_path / "janus")
    hf.load_state_dict({key: torch.tensor(array) for key, array in out.tensors})
    with torch.no_grad():
        tokens = hf.encode(torch.tensor(X).permute(0, 3, 1, 2)).image_tokens
    np.testing.assert_array_equal(tokens.reshape(made.codes.shape), made.codes)


def test_side_files(tmp_path):
    folder = make_vae(tmp_path / "vae")
    (folder / "parity.json").write_text("{}")
    source = open_component(str(folder), "vae")
    codec = open_codec(source.config, "config.json")
    job = SimpleNamespace(opened=SimpleNamespace(codec=codec, source=source), dtype="source")
    whole, rewritten = (side_files(job, touched) for touched in (set(), {"vae."}))
    assert set(rewritten) == {"config.json", "LICENSE"}
    assert set(whole) == {*rewritten, "diffusion_pytorch_model.safetensors"}
    config = rewritten["config.json"]
    assert isinstance(config, bytes) and json.loads(config) == source.config
