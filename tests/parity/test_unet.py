"""The UNets of SD 1.5, 2.1 and SDXL against diffusers: outputs, gradients and weights, fp32."""

from functools import cache
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import FeedForward
from diffusers.models.embeddings import get_timestep_embedding
from flax import nnx

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.sharding import make_mesh, shardings
from jaxft.models.denoisers import unet
from jaxft.models.denoisers.unet import Added, UNet
from jaxft.models.denoisers.unet_config import UNetConfig
from jaxft.nn.conv import CONV_REMAT, runner
from jaxft.nn.linear import Adapter
from jaxft.nn.norm import GroupNorm
from jaxft.weights import rules
from tests.parity.twins import (
    QUICK,
    Twin,
    assert_round_trip_is_bitwise,
    numpy_state,
    random,
    worst,
)
from tests.parity.unets import FULL, SHRUNK, SMALL, TINY, make_torch


@cache
def template(cfg):
    return jax.eval_shape(lambda: UNet(cfg, key=jax.random.key(0)))


def twin(config):
    return Twin(unet.ARCHITECTURE, config, make_torch(config), run_torch)


@cache
def both(name):
    return twin(SHRUNK[name])


def make_inputs(cfg, size=(8, 8), batch=2):
    latents = random(batch, *size, cfg.in_channels, seed=1)
    timesteps = np.array([999, 1, 500][:batch], np.int32)
    context = random(batch, 7, cfg.context_dims[0], seed=2)
    added = None
    if cfg.added_dim is not None:
        ids = np.array([[1024, 768, 0, 128, 512, 640]] * batch, np.float32)
        added = Added(random(batch, cfg.added_dim - 6 * cfg.added_time_dim, seed=3), ids)
    return latents, timesteps, context, added


def run_torch(theirs, latents, timesteps, context, added):
    """NCHW inside, NHWC outside; keeps the graph."""
    more = None
    if added is not None:
        text, ids = map(torch.from_numpy, added)
        more = {"text_embeds": text, "time_ids": ids}
    image = torch.from_numpy(latents.transpose(0, 3, 1, 2).copy())
    out = theirs(
        image, torch.from_numpy(timesteps), torch.from_numpy(context), None, None, None, None, more
    )
    return out.sample.permute(0, 2, 3, 1)


@cache
def trained(name):
    return both(name).gradients(make_inputs(both(name).cfg))


@cache
def reference(name):
    return both(name).reference(make_inputs(both(name).cfg))


@pytest.mark.parametrize("name", SHRUNK)
def test_forward_is_diffusers(name):
    assert worst(trained(name)[0], reference(name)[0]) < 1e-5


@pytest.mark.parametrize("name", SHRUNK)
def test_gradients_are_diffusers_tensor_by_tensor(name):
    ours, theirs = trained(name)[1], reference(name)[1]
    assert ours.keys() == theirs.keys()
    errors = {key: worst(ours[key], theirs[key]) for key in theirs}
    bad = {key: error for key, error in errors.items() if not error < 1e-3}
    assert not bad


def test_remat_changes_no_gradient_and_saves_memory():
    cfg = UNetConfig.from_hf({**TINY, "transformer_layers_per_block": 3})
    block = jax.jit(lambda: unet.MidBlock(cfg, key=jax.random.key(0)))()
    x, time, context = random(1, 8, 8, 64), random(1, cfg.time_dim), random(1, 7, 24)
    grads, memory = {}, {}
    for remat in ("none", *CONV_REMAT):

        def loss(block, remat=remat):
            shared = unet.Shared(time, context, None, runner(remat))
            return jnp.square(block(x, shared)).sum()

        step = jax.jit(jax.grad(loss)).lower(block).compile(QUICK)
        memory[remat] = step.memory_analysis().temp_size_in_bytes
        grads[remat] = P.flatten(step(block))
    for remat in CONV_REMAT:
        assert max(worst(grads[remat][p], grads["none"][p]) for p in grads["none"]) < 1e-4
    assert memory["none"] > 1.3 * memory["dots"] > 1.5 * memory["full"]


@pytest.mark.parametrize("name", SHRUNK)
def test_d19_round_trip_is_bitwise_and_every_tensor_has_one_place(name):
    assert_round_trip_is_bitwise(both(name))


def test_d19_unknown_missing_and_misshaped_tensors_are_all_named():
    one = both("sd15")
    state = numpy_state(one.theirs)
    del state["mid_block.resnets.0.conv1.weight"]
    state["mid_block.odd.weight"] = np.zeros(3)
    state["conv_in.weight"] = state["conv_in.weight"][:, :3]
    with pytest.raises(UserError) as error:
        one.to_params(state)
    text = str(error.value)
    assert "missing tensor mid_block.resnets.0.conv1.weight" in text
    assert "unexpected tensor mid_block.odd.weight" in text and "tensor conv_in.weight" in text


@pytest.mark.parametrize("name", FULL)
def test_d19_published_sizes_fit_without_a_byte_allocated(name):
    config, tensors, parameters = FULL[name]
    with torch.device("meta"):
        theirs = UNet2DConditionModel(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    cfg = UNetConfig.from_hf(config)
    leaves = P.describe(template(cfg))
    entries = rules.plan(unet.rules(cfg), leaves, shapes, {})
    assert sum(len(entry.keys) for entry in entries) == len(shapes) == tensors
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == parameters
    assert entries == rules.expected(unet.rules(cfg), leaves)


@pytest.mark.parametrize("channels", [8, 9])
def test_inpainting_and_edit_models_have_wider_inputs(channels):
    check_forward({**TINY, "in_channels": channels})


def check_forward(config, size=(8, 8), batch=2):
    one = twin(config)
    inputs = make_inputs(one.cfg, size, batch)
    assert worst(one.ours(inputs), one.wanted(inputs)) < 1e-5


def test_d09_d18_odd_latents_round_up_on_the_way_down_and_are_cut_on_the_way_up():
    plain = {"down_block_types": ["DownBlock2D"] * 3, "up_block_types": ["UpBlock2D"] * 3}
    check_forward({**SMALL, **plain, "block_out_channels": [32, 64, 64]}, size=(9, 14))


def test_d13_epsilons_differ_from_norm_to_norm():
    model = template(UNetConfig.from_hf(SHRUNK["sdxl"]))
    found = {}
    for path, module in nnx.iter_modules(model):
        if hasattr(module, "eps"):
            found[".".join(map(str, path))] = module.eps
    wide = [p for p in found if p.endswith(("attentions.0.norm", "attentions.1.norm"))]
    assert len(wide) == 4 and all(found.pop(path) == 1e-6 for path in wide)
    assert len(found) > 20 and set(found.values()) == {1e-5}


def test_d14_geglu_takes_the_value_first_and_the_exact_gelu():
    torch.manual_seed(0)
    theirs = FeedForward(8)
    with torch.no_grad():
        theirs.net[0].proj.weight.mul_(8)  # gates of several units: there tanh is off
    state = numpy_state(theirs)
    names = {"proj": "net.0.proj", "out": "net.2"}
    params = {f"{ours}.kernel": state[f"{name}.weight"].T for ours, name in names.items()}
    params |= {f"{ours}.bias": state[f"{name}.bias"] for ours, name in names.items()}
    ours = P.bind(jax.eval_shape(lambda: unet.FeedForward(8, key=jax.random.key(0))), params)
    x = random(4, 5, 8)
    with torch.no_grad():
        out = theirs(torch.from_numpy(x)).numpy()
    assert worst(ours(x, None), out) < 1e-6
    value, gate = np.split(np.asarray(ours.proj(x)), 2, -1)
    assert worst(ours.out(value * jax.nn.gelu(gate)), out) > 1e-5
    assert worst(ours.out(gate * jax.nn.gelu(value, approximate=False)), out) > 0.1


def test_d15_timesteps_and_time_ids_have_cosines_first_and_the_text_comes_before_the_ids():
    cfg, model = both("sdxl").cfg, P.bind(both("sdxl").template, both("sdxl").params)
    _, timesteps, _, added = make_inputs(cfg)

    def sinusoid(numbers, dim):
        return get_timestep_embedding(torch.from_numpy(numbers), dim, True, 0).numpy()

    ids = sinusoid(added.time_ids.reshape(-1), cfg.added_time_dim).reshape(2, -1)
    joined = np.concatenate([added.text_embeds, ids], -1)
    want = model.time_embedding(sinusoid(timesteps, 64)) + model.add_embedding(joined)
    assert worst(model._time(timesteps, added, jnp.float32, None), want) < 1e-5
    assert worst(model._time(timesteps, added, jnp.bfloat16, None), want) < 2e-2


def test_d15_added_conditions_are_asked_for_and_refused():
    for name, given in (("sdxl", False), ("sd15", True)):
        cfg = UNetConfig.from_hf(SHRUNK[name])
        inputs = make_inputs(UNetConfig.from_hf(SHRUNK["sdxl"] if given else SHRUNK[name]))
        added = inputs[3] if given else None
        with pytest.raises(ValueError, match="addition_embed_type"):
            template(cfg)(*make_inputs(cfg)[:3], added)


def test_d16_linear_and_conv_projections_differ_in_the_rank_of_the_key_alone():
    conv, linear = (twin({**SMALL, "use_linear_projection": flag}) for flag in (False, True))
    state = numpy_state(conv.theirs)
    flat = {k: v[..., 0, 0] if ".proj_" in k and v.ndim == 4 else v for k, v in state.items()}
    ours, other = conv.params, linear.to_params(flat)
    assert all((ours[path] == other[path]).all() for path in ours)
    assert sum(flat[key].ndim != state[key].ndim for key in state) == 2 * 4
    with pytest.raises(UserError, match="proj_in"):
        linear.to_params(state)


def test_d16_queries_keys_and_values_have_no_bias_and_outputs_have():
    paths = P.describe(template(UNetConfig.from_hf(SHRUNK["sdxl"])))
    biased = {path.rsplit(".", 2)[1] for path in paths if ".attn" in path and "bias" in path}
    assert biased == {"to_out"}


def test_d17_attention_logits_and_softmax_are_fp32_in_bf16():
    eye = np.eye(32, dtype=np.float32)
    params = {"to_q.kernel": 4 * eye, "to_k.kernel": 4 * eye, "to_v.kernel": eye}
    params |= {"to_out.kernel": eye, "to_out.bias": 0 * eye[0]}  # logits of a hundred
    module = P.bind(
        jax.eval_shape(lambda: unet.UNetAttention(32, 32, 1, key=jax.random.key(0))), params
    )
    x = random(1, 64, 32).astype(jnp.bfloat16).astype(np.float32)
    exact, half = module(x, x, None), module(jnp.bfloat16(x), jnp.bfloat16(x), None)
    assert half.dtype == jnp.bfloat16
    assert worst(half, exact) < 1e-2


def test_d20_norms_have_norm_num_groups_groups():
    model = template(UNetConfig.from_hf(FULL["sd15"][0]))
    assert {m.groups for _, m in nnx.iter_modules(model) if isinstance(m, GroupNorm)} == {32}


def test_unknown_remat_is_refused():
    cfg = UNetConfig.from_hf(SMALL)
    with pytest.raises(ValueError, match="none, dots, full"):
        template(cfg)(*make_inputs(cfg), remat="offload")


def test_bf16_stays_near_fp32_and_sharded_rows_equal_one_device():
    one = twin(TINY)
    inputs = make_inputs(one.cfg)
    alone = one.ours(inputs)
    assert worst(one.ours(inputs, dtype=jnp.bfloat16), alone) < 5e-2
    mesh = make_mesh(data=2, fsdp=2, tensor=2)
    with jax.set_mesh(mesh):
        placed = jax.device_put(one.params, shardings(P.describe(one.template), mesh))
        assert worst(one.ours(inputs, placed), alone) < 1e-5


def test_adapter_dropout_is_keyed_by_row_and_by_block():
    cfg = UNetConfig.from_hf({**TINY, "transformer_layers_per_block": 2})

    @jax.jit
    def with_adapter():
        model = unet.Transformer2D(cfg, 0, key=jax.random.key(0))
        proj = model.transformer_blocks.ff.proj
        proj.lora_a = nnx.data(nnx.Param(jnp.ones((2, 64, 2)), axes=("embed", "lora")))
        proj.lora_b = nnx.data(nnx.Param(jnp.ones((2, 2, 512)), axes=("lora", "mlp")))
        proj.adapter = Adapter(1.0, 0.5, 7)
        return model

    @jax.jit
    def block_by_block(model, keys):
        tokens = model.proj_in(model.norm(x).reshape(2, 16, 64))
        for i in range(2):
            block = jax.tree.map(itemgetter(i), model.transformer_blocks)
            row_keys = jnp.stack([jax.random.fold_in(key, i) for key in keys])
            tokens = block(tokens, context, row_keys)
        return x + model.proj_out(tokens).reshape(x.shape)

    model, keys = with_adapter(), jax.random.split(jax.random.key(1), 2)
    x, context = (np.repeat(a, 2, 0) for a in (random(1, 4, 4, 64), random(1, 7, 24)))
    run = jax.jit(lambda keys: model(x, unet.Shared(x, context, keys, runner("none"))))
    first, second = run(keys)
    assert worst(first, second) > 1e-3
    assert worst(run(keys), block_by_block(model, keys)) < 1e-5
    np.testing.assert_array_equal(run(keys[::-1])[1], first)


@pytest.mark.slow
def test_full_size_sd15_is_diffusers(tmp_path):
    """Output and every gradient; torch's wait on disk, so that one model is held at a time."""
    one = twin(FULL["sd15"][0])
    inputs = make_inputs(one.cfg, size=(32, 32), batch=1)
    wanted, grads = one.reference(inputs)
    for key in list(grads):
        np.save(tmp_path / f"{key}.npy", grads.pop(key))
    assert one.params
    one.theirs = None
    made, grads = one.gradients(inputs)
    errors = {key: worst(grads[key], np.load(tmp_path / f"{key}.npy")) for key in grads}
    print(f"{len(errors)} tensors: output {worst(made, wanted):.1e}, {max(errors.values()):.1e}")
    assert len(errors) == FULL["sd15"][1] and worst(made, wanted) < 1e-5
    assert max(errors.values()) < 1e-3
