"""VQ tokenizers against transformers' JanusVQVAE and diffusers' VQModel; fp32 on CPU."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import VQModel as DiffusersVQ
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from transformers import JanusVQVAE, JanusVQVAEConfig

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vqgan
from jaxft.models.autoencoders.vq_config import VQConfig
from jaxft.models.autoencoders.vqgan import (
    VQModel,
    codebook_usage,
    losses,
    straight_through,
    unit_codebook,
)
from jaxft.nn.norm import GroupNorm
from jaxft.weights import rules, transfer
from tests.models.autoencoders.test_vq_config import VQ_8, VQ_16

# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CODES, SIZE, GRID = 64, (16, 24), (8, 12)
JANUS = {
    "model_type": "janus_vqgan",
    "embed_dim": 4,
    "num_embeddings": CODES,
    "latent_channels": 8,
    "base_channels": 64,  # two a group: alone in its group a channel's bias has no gradient
    "channel_multiplier": [1, 2],
    "num_res_blocks": 1,
    "num_patches": 8,
    "initializer_range": 0.04,  # 1 / sqrt(fan in): keeps the activations of order 1
}
# taming's f16 in small: attention at the last level alone, latents as wide as the codes.
DIFFUSERS = {
    "_class_name": "VQModel",
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "latent_channels": 6,
    "num_vq_embeddings": CODES,
    "norm_num_groups": 4,
    "vq_embed_dim": 5,
}
# Which rows HF's own search is given, and what jaxft is told.
MODES = {
    "janus l2": {**JANUS},
    "janus plain": {**JANUS, "codebook_l2_norm": False},
    "diffusers": DIFFUSERS,
}
encode = jax.jit(VQModel.encode, compiler_options=QUICK)
decode_codes = jax.jit(VQModel.decode_codes, compiler_options=QUICK)


def stock(config):
    """A model of their class."""
    if "_class_name" in config:
        return DiffusersVQ.from_config(config)
    return JanusVQVAE(JanusVQVAEConfig.from_dict(config))


def oracle(config):
    """A random model whose norms and biases matter, its codebook's rows far from unit length."""
    torch.manual_seed(0)
    hf = stock(config)
    with torch.no_grad():
        for name, tensor in hf.named_parameters():
            scale = 1.0 if name.endswith("embedding.weight") else 0.1 * (tensor.ndim == 1)
            tensor.add_(scale * torch.randn_like(tensor))
        hf.quant_conv.weight.mul_(20.0)  # so that many codes are in use
    return hf.float().eval()


def make(mode):
    """The same random weights as their model and as ours."""
    hf, cfg = oracle(MODES[mode]), VQConfig.from_hf(MODES[mode])
    template = jax.eval_shape(lambda: VQModel(cfg, key=jax.random.key(0)))
    return hf, P.bind(template, load(template, numpy(hf.state_dict()), vqgan.rules(cfg)))


def numpy(state):
    return {k: v.detach().numpy() for k, v in state.items()}


def load(template, state, table):
    """Parameters by path from tensors of one layout."""
    shapes = {k: v.shape for k, v in state.items()}
    plan = rules.plan(table, P.describe(template), shapes, {}, vqgan.IGNORE)
    return {e.path: jnp.asarray(rules.to_jax(state[e.keys[0]], e.layout, {})) for e in plan}


def written(model, table):
    """What a checkpoint made from parameters alone holds."""
    params, plan = P.flatten(model), rules.expected(table, P.describe(model))
    return {e.keys[0]: rules.to_torch(np.asarray(params[e.path]), e.layout, {}) for e in plan}


def images():
    """Noise over a ramp along one diagonal: no flip and no transpose of it is itself."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]] / max(SIZE)
    noise = np.random.default_rng(0).uniform(-0.5, 0.5, (2, *SIZE, 3))
    return (noise + (y + 2 * x)[..., None] / 3 - 0.5).astype(np.float32)


def first(x):
    """NHWC numpy as NCHW torch."""
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def unit(table):
    return torch.nn.functional.normalize(table, dim=-1)


def close(got, wanted, tolerance=1e-5):
    assert got.shape == wanted.shape and np.abs(wanted).max() > 0.1
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


def their_codes(hf, x):
    """The stock search, over the codebook as it is stored; its rows run from the top."""
    with torch.no_grad():
        z = hf.quant_conv(hf.encoder(first(x)))
        found = hf.quantize(z)[2]
    found = found[2] if isinstance(found, tuple) else found
    return found.view(len(x), *GRID).numpy(), last(z)


def their_images(hf, codes):
    with torch.no_grad():
        flat = torch.tensor(np.asarray(codes)).long().flatten(1)
        if isinstance(hf, DiffusersVQ):
            hf.register_to_config(lookup_from_codebook=True)
            shape = (len(codes), *GRID, hf.config.vq_embed_dim)
            return last(hf.decode(flat.flatten(), force_not_quantize=True, shape=shape).sample)
        hf.quantize.quant_state_dims = list(GRID)
        return last(hf.decode(flat))


@pytest.fixture(scope="module", params=MODES)
def pair(request):
    return make(request.param)


def test_p1_codes_and_pixels(pair):
    """Codes equal, in raster order; rows, z and pixels close."""
    hf, model = pair
    got = encode(model, images())
    with torch.no_grad():
        stored = hf.quantize.embedding.weight.clone()
        if model.cfg.l2:  # what our export does for them
            hf.quantize.embedding.weight.copy_(unit(stored))
    codes, z = their_codes(hf, images())
    np.testing.assert_array_equal(got.codes, codes)
    assert got.codes.dtype == jnp.int32 and len(np.unique(codes)) > 5
    lengths = np.linalg.norm(z, axis=-1, keepdims=True)
    close(got.z * (lengths if model.cfg.l2 else 1), z)  # a short z of unit length shows rounding
    table = unit(stored) if model.cfg.kind == "janus_vqgan" else stored
    close(got.quantized, table[codes].numpy())
    close(decode_codes(model, got.codes), their_images(hf, codes))
    with torch.no_grad():
        hf.quantize.embedding.weight.copy_(stored)
    assert model.cfg.factor * codes.shape[1] == SIZE[0]


def test_trap1_plain_search_finds_other_codes_until_rows_have_unit_length():
    hf, model = make("janus l2")
    ours = encode(model, images()).codes
    assert (their_codes(hf, images())[0] == ours).mean() < 0.8
    table = model.quantize.embedding[...]
    exported = unit_codebook(model.cfg, table)
    with torch.no_grad():
        hf.quantize.embedding.weight.copy_(torch.tensor(np.asarray(exported)))
    np.testing.assert_array_equal(their_codes(hf, images())[0], ours)
    assert unit_codebook(model.cfg, exported) is exported
    plain = VQConfig.from_hf(MODES["janus plain"])
    assert unit_codebook(plain, table) is table


@pytest.mark.parametrize("mode", ["janus l2", "diffusers"])
def test_p1_gradients_per_tensor(mode):
    """Through the straight-through estimator, the codebook and the commitment loss included."""
    hf, model = make(mode)
    cfg, x = model.cfg, images()
    way = np.random.default_rng(5).standard_normal(x.shape, np.float32)

    # transformers' swish writes over what autograd saved.
    with torch.autograd.graph.allow_mutation_on_saved_tensors():
        z = hf.quant_conv(hf.encoder(first(x))).permute(0, 2, 3, 1)
        table = hf.quantize.embedding.weight
        z, table = (unit(z), unit(table)) if cfg.l2 else (z, table)
        codes = torch.cdist(z.reshape(-1, z.shape[-1]), table).argmin(-1).view(z.shape[:-1])
        rows = unit(table[codes]) if cfg.unit_lookup else table[codes]
        through = (z + (rows - z).detach()).permute(0, 3, 1, 2)
        out = (hf.decoder(hf.post_quant_conv(through)) * first(way)).mean()
        out = out + ((rows - z.detach()) ** 2).mean() + 0.25 * ((rows.detach() - z) ** 2).mean()
        out.backward()
    wanted = load(model, {k: v.grad.numpy() for k, v in hf.named_parameters()}, vqgan.rules(cfg))

    @partial(jax.jit, compiler_options=QUICK)
    @jax.value_and_grad
    def gradients(params):
        bound = P.bind(model, params)
        found = bound.encode(jnp.array(x))
        terms = losses(found.z, found.quantized)
        y = bound.decode(straight_through(found.z, found.quantized))
        return jnp.mean(y * way) + jnp.mean(terms.codebook) + 0.25 * jnp.mean(terms.commitment)

    value, got = gradients(P.flatten(model))
    assert value == pytest.approx(out.item(), rel=1e-5, abs=5e-6)  # of terms of order 1
    assert set(got) == set(wanted)
    for path, grad in got.items():
        if path.endswith("to_k.bias"):
            continue  # zero but for rounding: softmax does not see a shift of all keys
        error = np.linalg.norm(grad - wanted[path])
        assert error < 1e-4 * np.linalg.norm(wanted[path]), path


def test_trap3_loss_terms_are_those_of_diffusers_without_its_old_mistake():
    hf = make("diffusers")[0]
    hf.quantize.legacy = False
    z = np.random.default_rng(1).standard_normal((2, *GRID, 5), np.float32)
    with torch.no_grad():
        through, loss, (_, _, codes) = hf.quantize(first(z))
        rows = hf.quantize.embedding.weight[codes].view(z.shape).numpy()
    terms = losses(jnp.array(z), jnp.array(rows))
    assert terms.codebook.shape == (2,)
    total = jnp.mean(terms.codebook) + hf.quantize.beta * jnp.mean(terms.commitment)
    assert float(total) == pytest.approx(loss.item(), rel=1e-5)
    close(straight_through(jnp.array(z), jnp.array(rows)), last(through))


def test_trap8_ties_take_the_lowest_code():
    book = vqgan.Codebook(CODES, 5, key=jax.random.key(1))
    book.embedding[...] = jnp.tile(book.embedding[: CODES // 2], (2, 1))
    z = jax.random.normal(jax.random.key(0), (2, *GRID, 5))
    codes = book.nearest(z, l2=False)
    assert codes.max() < CODES // 2 and len(np.unique(codes)) > 5


def test_trap8_quantization_is_in_fp32():
    cfg = VQConfig.from_hf(JANUS)
    shape = jax.ShapeDtypeStruct((1, *SIZE, 3), jnp.bfloat16)
    found = jax.eval_shape(lambda x: VQModel(cfg, key=jax.random.key(0)).encode(x), shape)
    assert found.z.dtype == found.quantized.dtype == jnp.float32
    half = jax.ShapeDtypeStruct((1, *GRID, 4), jnp.bfloat16)
    image = jax.eval_shape(lambda q: VQModel(cfg, key=jax.random.key(0)).decode(q), half)
    assert image.dtype == jnp.bfloat16 and image.shape == (1, *SIZE, 3)


def test_trap8_norms_have_the_eps_of_the_stock_classes():
    """1e-6: at activations of order 1 no picture would show that it is 1e-5."""
    for config in MODES.values():
        cfg = VQConfig.from_hf(config)
        ours = jax.eval_shape(lambda cfg=cfg: VQModel(cfg, key=jax.random.key(0)))
        norms = [one for _, one in nnx.iter_graph(ours) if isinstance(one, GroupNorm)]
        theirs = [one for one in stock(config).modules() if isinstance(one, torch.nn.GroupNorm)]
        assert len(norms) == len(theirs) and {one.eps for one in norms + theirs} == {1e-6}


def test_normalised_has_a_gradient_at_zero():
    x = jnp.array([[0.0, 0.0], [3.0, 4.0]])
    np.testing.assert_allclose(vqgan.normalised(x), [[0, 0], [0.6, 0.8]], rtol=1e-6)
    assert jnp.isfinite(jax.grad(lambda x: vqgan.normalised(x).sum())(x)).all()


def test_codebook_usage():
    alive = codebook_usage(jnp.array([5, 5, 0, 0]))
    assert (float(alive.used), float(alive.perplexity)) == pytest.approx((0.5, 2.0))
    even = codebook_usage(jnp.full((1000,), 7))
    assert (float(even.used), float(even.perplexity)) == pytest.approx((1.0, 1000.0), rel=1e-5)
    none = codebook_usage(jnp.zeros((4,), jnp.int32))
    assert (float(none.used), float(none.perplexity)) == (0.0, 1.0)


class Memory:
    """A checkpoint in memory."""

    def __init__(self, tensors):
        self.tensors = tensors

    def keys(self):
        return self.tensors.keys()

    def info(self, key):
        return self.tensors[key].shape, self.tensors[key].dtype

    def read(self, key):
        return self.tensors[key]


@pytest.mark.parametrize("mode", ["janus l2", "diffusers"])
def test_p5_round_trip_is_bitwise_and_loads_in_the_stock_class(mode, tmp_path):
    hf, model = make(mode)
    state, cfg = numpy(hf.state_dict()), model.cfg
    table = vqgan.rules(cfg)
    part = transfer.Part("vq.", mode, Memory(state), table, {}, vqgan.IGNORE)
    leaves = {f"vq.{path}": leaf for path, leaf in P.describe(model).items()}
    place = NamedSharding(Mesh(np.array(jax.devices()[:1]), ("data",)), PartitionSpec())
    places = dict.fromkeys(leaves, place)
    params = transfer.load(part, leaves, places, "float32", set(leaves))
    # As trained, each tensor passes through the layouts twice; "fresh" has no source to order it.
    for one in (part, part._replace(tensors=None)):
        back = dict(transfer.export(one, leaves, params, {}, None).tensors)
        assert set(back) == set(state)
        for key, tensor in state.items():
            np.testing.assert_array_equal(back[key], tensor)
    theirs = stock(cfg.to_hf())
    theirs.load_state_dict({k: torch.tensor(v) for k, v in back.items()}, strict=True)
    theirs.save_pretrained(tmp_path)
    type(theirs).from_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert VQConfig.from_hf(saved) == cfg


F16 = {
    "_class_name": "VQModel",
    "down_block_types": ["DownEncoderBlock2D"] * 4 + ["AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D"] + ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [128, 128, 256, 256, 512],
    "layers_per_block": 2,
    "latent_channels": 256,
    "num_vq_embeddings": 16384,
    "sample_size": 256,
}


@pytest.mark.parametrize("config, millions", [(VQ_16, 71.9), (VQ_8, 70.1), (F16, 76.1)])
def test_p1_published_sizes_by_shape(config, millions):
    """Every tensor of the full-size model, from the stock class without storage."""
    cfg = VQConfig.from_hf(config)
    with torch.device("meta"):
        hf = stock(config)
    shapes = {k: tuple(v.shape) for k, v in hf.state_dict().items()}
    template = jax.eval_shape(lambda: VQModel(cfg, key=jax.random.key(0)))
    entries = rules.plan(vqgan.rules(cfg), P.describe(template), shapes, {})
    assert len(entries) == len(shapes)
    count = sum(np.prod(shape) for shape in shapes.values())
    assert count / 1e6 == pytest.approx(millions, abs=0.1)
    grid = jax.ShapeDtypeStruct((1, 3, 5), jnp.int32)
    image = jax.eval_shape(lambda model, codes: model.decode_codes(codes), template, grid)
    assert image.shape == (1, 3 * cfg.factor, 5 * cfg.factor, 3)


def transformers_name(key):
    """An original key as transformers' converter renames it."""
    words = key.split(".")
    if words[1] == "mid":
        words[2] = ("block_1", "attn_1", "block_2")[int(words[2])]
    if words[1] == "conv_blocks":
        words[1] = {"encoder": "down", "decoder": "up"}[words[0]]
        words[3] = {"res": "block"}.get(words[3], words[3])
    return ".".join(words)


def test_p8_original_layout_is_a_bijection():
    """As LlamaGen's and Janus's own modules are called, beside transformers' names for them."""
    hf, model = make("janus l2")
    state, table = numpy(hf.state_dict()), vqgan.original_rules(model.cfg)
    original = written(model, table)
    assert "encoder.conv_blocks.1.attn.0.q.weight" in original
    for key, tensor in original.items():
        np.testing.assert_array_equal(tensor, state.pop(transformers_name(key)))
    assert not state
    original["quantize.codebook_used"] = np.zeros(65536, np.float32)
    params = P.flatten(model)
    for path, array in load(model, original, table).items():
        np.testing.assert_array_equal(array, params[path])


def test_unknown_and_missing_tensors_are_errors():
    hf, model = make("janus l2")
    state = numpy(hf.state_dict())
    table = vqgan.rules(model.cfg)
    with pytest.raises(UserError, match=r"unexpected tensor encoder\.extra\.weight"):
        load(model, {**state, "encoder.extra.weight": np.zeros(3)}, table)
    state.pop("quantize.embedding.weight")
    with pytest.raises(UserError, match=r"missing tensor quantize\.embedding\.weight"):
        load(model, state, table)
