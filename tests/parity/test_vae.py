"""AutoencoderKL against diffusers: moments, images, gradients, all spellings; fp32 on CPU."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vae
from jaxft.models.autoencoders.vae import VAE, Moments
from jaxft.models.autoencoders.vae_config import VAEConfig
from jaxft.nn.conv import CONV_REMAT
from jaxft.weights import rules

# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def config(widths=(8, 16), **more):
    """The published configs, shrunk in width and depth."""
    levels = len(widths)
    return {
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "block_out_channels": list(widths),
        "norm_num_groups": 4,
        **more,
    }


FAMILIES = {
    "sd": config((8, 16, 16), layers_per_block=2),  # 1 and 2
    "sdxl": config((8, 16), scaling_factor=0.13025),
    "16 channels": config(
        latent_channels=16,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "no attention": config((8,), mid_block_add_attention=False),
}
encode = jax.jit(VAE.encode, compiler_options=QUICK)
decode = jax.jit(VAE.decode, compiler_options=QUICK)
sample = jax.jit(vae.sample, compiler_options=QUICK)


def make(family):
    """The same random weights as a diffusers model and as ours."""
    torch.manual_seed(0)
    hf = AutoencoderKL.from_config(FAMILIES[family]).float().eval()
    with torch.no_grad():
        for tensor in hf.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    cfg = VAEConfig.from_hf(FAMILIES[family])
    template = jax.eval_shape(lambda: VAE(cfg, key=jax.random.key(0)))
    state = {k: v.numpy() for k, v in hf.state_dict().items()}
    return hf, P.bind(template, load(template, state, vae.RULES))


def load(template, state, table):
    """Parameters by path from torch tensors, through the rules."""
    shapes = {k: v.shape for k, v in state.items()}
    plan = rules.plan(table, P.describe(template), shapes, vae.sizes(template.cfg))
    return {e.path: jnp.asarray(rules.to_jax(state[e.keys[0]], e.layout, {})) for e in plan}


def written(model, table):
    """What a checkpoint made from parameters alone holds."""
    params, plan = P.flatten(model), rules.expected(table, P.describe(model))
    return {e.keys[0]: rules.to_torch(np.asarray(params[e.path]), e.layout, {}) for e in plan}


def images(size=(16, 24), channels=3, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (2, *size, channels)).astype(np.float32)


def first(x):
    """NHWC numpy as NCHW torch."""
    return torch.tensor(x).permute(0, 3, 1, 2)


def last(x):
    return x.detach().permute(0, 2, 3, 1).numpy()


def close(got, wanted, tolerance=1e-5):
    assert got.shape == wanted.shape and np.abs(wanted).max() > 0.1
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_encode_and_decode(family):
    hf, model = make(family)
    x = images()
    with torch.no_grad():
        theirs = hf.encode(first(x)).latent_dist
        back = hf.decode(theirs.mean).sample
    moments = encode(model, x)
    assert moments.mean.dtype == moments.logvar.dtype == jnp.float32
    close(moments.mean, last(theirs.mean))
    close(moments.logvar, last(theirs.logvar))
    close(decode(model, last(theirs.mean)), last(back))
    assert moments.mean.shape[1] * model.cfg.factor == 16


def test_d07_scaling_factor_and_its_default():
    cfg = {name: VAEConfig.from_hf(FAMILIES[name]) for name in FAMILIES}
    assert cfg["sd"].scaling_factor == 0.18215 and cfg["sdxl"].scaling_factor == 0.13025
    z = jnp.array(images((4, 4), 4))
    np.testing.assert_allclose(cfg["sdxl"].scale(z), 0.13025 * z, rtol=1e-6)
    shifted = cfg["16 channels"].scale(z)
    np.testing.assert_allclose(shifted, (z - 0.1159) * 0.3611, rtol=1e-5, atol=1e-6)
    for one in cfg.values():
        np.testing.assert_allclose(one.unscale(one.scale(z)), z, rtol=1e-5, atol=1e-6)


def test_d07_latents_mean_and_std():
    """As diffusers' SDXL pipeline decodes: latents * std / scaling_factor + mean."""
    mean, std = [0.1, -0.2, 0.3, 0.0], [0.5, 1.0, 2.0, 4.0]
    cfg = VAEConfig.from_hf(config(latents_mean=mean, latents_std=std, scaling_factor=0.5))
    z = jnp.array(images((4, 4), 4))
    np.testing.assert_allclose(cfg.unscale(z), z * np.array(std) / 0.5 + np.array(mean), rtol=1e-5)
    np.testing.assert_allclose(cfg.unscale(cfg.scale(z)), z, rtol=1e-5, atol=1e-6)


def test_d08_sampling_from_moments():
    shape = (4, 40, 50, 3)
    mean, logvar = jnp.full(shape, 0.7), jnp.full(shape, 2 * np.log(0.3))
    keys = jax.random.split(jax.random.key(0), 4)
    draw = np.asarray(sample(Moments(mean, logvar), keys))
    assert draw.mean() == pytest.approx(0.7, abs=0.01)
    assert draw.std() == pytest.approx(0.3, rel=0.02)
    again = sample(Moments(mean, logvar), jax.random.split(jax.random.key(1), 4))
    assert np.abs(again - draw).max() > 0.1


def test_d08_logvar_is_clamped():
    model = make("no attention")[1]
    loud = P.flatten(model)
    loud["quant_conv.bias"] = jnp.array([0, 0, 0, 0, 1e3, -1e3, 0, 0], jnp.float32)
    logvar = encode(P.bind(model, loud), images()).logvar
    assert (logvar[..., 0] == 20).all() and (logvar[..., 1] == -30).all()


def test_at_its_limit_a_logvar_has_the_gradient_of_torchs_clamp():
    """1, where jnp.clip's is a half: an encoder without noise states exactly -30."""
    raw = np.array([-31.0, -30.0, -29.0, 19.0, 20.0, 21.0], np.float32)
    theirs = torch.tensor(raw, requires_grad=True)
    torch.clamp(theirs, -30.0, 20.0).sum().backward()
    assert theirs.grad is not None

    def total(values):
        encoder = lambda images, remat: jnp.stack([values, values], axis=-1)  # noqa: E731
        model = SimpleNamespace(encoder=encoder, quant_conv=None)
        return VAE.encode(model, values).logvar.sum()

    np.testing.assert_array_equal(jax.grad(total)(jnp.asarray(raw)), theirs.grad.numpy())


def test_d09_downsampling_pads_bottom_and_right():
    """Odd sizes round down, and their last row and column tell the paddings apart too."""
    hf, model = make("sdxl")
    with torch.no_grad():
        wanted = hf.encode(first(images((17, 23)))).latent_dist.mean
    close(encode(model, images((17, 23))).mean, last(wanted))


def test_d10_norms_have_eps_1e_6():
    """A nearly flat image, whose first norm sees a variance of the size of epsilon."""
    hf, model = make("sdxl")
    flat = 1e-3 * images()
    with torch.no_grad():
        hf.encoder.conv_in.bias.zero_()
        assert 1e-7 < hf.encoder.conv_in(first(flat)).var() < 1e-5
        wanted = hf.encode(first(flat)).latent_dist.mean
    params = P.flatten(model)
    params["encoder.conv_in.bias"] = jnp.zeros_like(params["encoder.conv_in.bias"])
    close(encode(P.bind(model, params), flat).mean, last(wanted))


OLD = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def test_d10_both_attention_spellings_load_and_the_new_one_is_written():
    hf, model = make("sd")
    new = {k: v.numpy() for k, v in hf.state_dict().items()}
    old = {}
    for key, tensor in new.items():
        for ours, theirs in OLD.items():
            key = key.replace(f".{ours}.", f".{theirs}.")
        old[key] = tensor
    assert sum(key.endswith("proj_attn.bias") for key in old) == 2
    params = P.flatten(model)
    for path, array in load(model, old, vae.RULES).items():
        np.testing.assert_array_equal(array, params[path])
    back = written(model, vae.RULES)
    assert set(back) == set(new)
    for key, tensor in back.items():
        np.testing.assert_array_equal(tensor, new[key])
    hf.load_state_dict({k: torch.tensor(v) for k, v in back.items()}, strict=True)


def test_d11_force_upcast_is_known_and_bf16_is_finite():
    assert VAEConfig.from_hf(config()).force_upcast
    assert not VAEConfig.from_hf(config(force_upcast=False)).force_upcast
    model = make("sdxl")[1]
    wide, half = encode(model, images()), encode(model, images().astype(jnp.bfloat16))
    assert half.mean.dtype == jnp.float32
    assert np.abs(half.mean - wide.mean).mean() < 0.03 * np.abs(wide.mean).max()


def test_d19_unknown_and_missing_tensors_are_errors():
    hf, model = make("sdxl")
    state = {k: v.numpy() for k, v in hf.state_dict().items()}
    with pytest.raises(UserError, match=r"unexpected tensor encoder\.extra\.weight"):
        load(model, {**state, "encoder.extra.weight": np.zeros(3)}, vae.RULES)
    state.pop("encoder.mid_block.attentions.0.to_k.bias")
    with pytest.raises(UserError, match=r"missing tensor .*to_k\.bias"):
        load(model, state, vae.RULES)


def test_d29_a_draw_depends_on_its_own_key():
    moments = Moments(jnp.zeros((4, 3, 3, 2)), jnp.zeros((4, 3, 3, 2)))
    keys = jax.random.split(jax.random.key(0), 4)
    every = sample(moments, keys)
    alone = sample(jax.tree.map(lambda x: x[2:3], moments), keys[2:3])
    np.testing.assert_array_equal(alone, every[2:3])


def test_gradients_per_tensor():
    hf, model = make("sdxl")
    x, rng = images((8, 8)), np.random.default_rng(5)
    posterior = hf.encode(first(x)).latent_dist
    outs = (posterior.mean, posterior.logvar, hf.decode(posterior.mean).sample)
    ways = [rng.standard_normal(last(out).shape, np.float32) for out in outs]
    sum((out * first(way)).sum() for out, way in zip(outs, ways, strict=True)).backward()
    wanted = load(model, {k: v.grad.numpy() for k, v in hf.named_parameters()}, vae.RULES)

    @partial(jax.jit, compiler_options=QUICK)
    @jax.grad
    def gradients(params):
        bound = P.bind(model, params)
        moments = bound.encode(jnp.array(x))
        outs = (*moments, bound.decode(moments.mean))
        return sum(jnp.vdot(a, b) for a, b in zip(outs, ways, strict=True))

    got = gradients(P.flatten(model))
    assert set(got) == set(wanted)
    for path, grad in got.items():
        if path.endswith("to_k.bias"):
            continue  # zero but for rounding: softmax does not see a shift of all keys
        error = np.linalg.norm(grad - wanted[path])
        assert error < 1e-4 * np.linalg.norm(wanted[path]), path


def test_remat_changes_no_gradient_and_holds_less():
    cfg = VAEConfig.from_hf(config((8, 16)))
    model = jax.jit(lambda: VAE(cfg, key=jax.random.key(0)), compiler_options=QUICK)()
    x = jax.random.uniform(jax.random.key(1), (1, 16, 16, 3))

    def loss(remat, model):
        y = model.decoder.conv_out(model.features(model.encode(x, remat).mean, remat))
        return jnp.sum(jnp.square(y))

    grads, held = {}, {}
    for remat in ("none", *CONV_REMAT):
        one = partial(loss, remat)
        back = jax.eval_shape(lambda model, one=one: jax.vjp(one, model)[1], model)
        held[remat] = sum(leaf.size for leaf in jax.tree.leaves(back))
        grads[remat] = P.flatten(jax.jit(jax.grad(one), compiler_options=QUICK)(model))
    for remat in CONV_REMAT:
        for path, slope in grads["none"].items():
            limit = 1e-4 * float(jnp.abs(slope).max()) + 1e-6
            np.testing.assert_allclose(grads[remat][path], slope, rtol=0, atol=limit)
    assert held["none"] > 1.2 * held["dots"] > 1.2 * held["full"]
