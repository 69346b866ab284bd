"""Convolutions, norms, resampling and the resnet block against torch, fp32 on CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flax import nnx

from jaxft.core import params as P
from jaxft.core.sharding import make_mesh, shardings
from jaxft.nn.conv import (
    ALL_SIDES,
    BOTTOM_RIGHT,
    REPLICATED_KERNEL,
    Conv,
    Downsample,
    ResnetBlock,
    Upsample,
)
from jaxft.nn.linear import Adapter
from jaxft.nn.norm import GroupNorm, LayerNorm, adaptive_layer_norm

KEY = jax.random.key(0)
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def made(build):
    """A module with random numbers in it; nothing runs but numpy."""
    template = jax.eval_shape(build)
    leaves = P.describe(template).items()
    arrays = {path: image(*leaf.shape, seed=i) for i, (path, leaf) in enumerate(leaves)}
    return P.bind(template, arrays)


def run(module, *args):
    """One compilation, without the compiler's optimisations."""
    call = jax.jit(lambda module, args: module(*args))
    return call.lower(module, args).compile(QUICK)(module, args)


def image(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def nchw(x):
    return torch.from_numpy(np.asarray(x).transpose(0, 3, 1, 2).copy())


def nhwc(x):
    return x.detach().numpy().transpose(0, 2, 3, 1)


def oihw(kernel):
    return torch.from_numpy(np.asarray(kernel).transpose(3, 2, 0, 1).copy())


def close(ours, theirs, tolerance=1e-5):
    theirs = np.asarray(theirs)
    np.testing.assert_allclose(np.asarray(ours), theirs, atol=tolerance * np.abs(theirs).max())


def torch_conv(module, x, **how):
    bias = torch.from_numpy(np.asarray(module.bias[...]))
    return nhwc(F.conv2d(nchw(x), oihw(module.kernel[...]), bias, **how))


@pytest.mark.parametrize("size, stride, padding", [(3, 1, 1), (1, 1, 0), (3, 2, 1), (5, 3, 2)])
def test_d19_conv_is_torchs_with_the_kernel_transposed(size, stride, padding):
    module = made(lambda: Conv(6, 8, size, key=KEY, stride=stride, padding=padding))
    x = image(2, 9, 7, 6)
    close(run(module, x), torch_conv(module, x, stride=stride, padding=padding))


def test_d09_downsampling_pads_all_sides_in_the_unet_and_two_in_the_vae():
    for y, width in [(8, 8), (7, 9)]:
        x = image(2, y, width, 4)
        unet = made(lambda: Downsample(4, ALL_SIDES, key=KEY))
        vae = made(lambda: Downsample(4, BOTTOM_RIGHT, key=KEY))
        close(run(unet, x), torch_conv(unet.conv, x, stride=2, padding=1))
        padded = np.pad(x, ((0, 0), (0, 1), (0, 1), (0, 0)))
        close(run(vae, x), torch_conv(vae.conv, padded, stride=2))
        assert run(unet, x).shape[1:3] == ((y + 1) // 2, (width + 1) // 2)
        assert run(vae, x).shape[1:3] == (y // 2, width // 2)


@pytest.mark.parametrize("size", [(6, 8), (5, 8), (6, 7), (5, 7)])
def test_d18_upsampling_is_nearest_and_reaches_odd_sizes(size):
    x, module = image(2, 3, 4, 5), made(lambda: Upsample(5, key=KEY))
    theirs = F.interpolate(nchw(x), size=size, mode="nearest")
    ours = jax.jit(lambda module, x: module(x, size))(module, x)
    close(ours, torch_conv(module.conv, nhwc(theirs), padding=1))


@pytest.mark.parametrize("eps", [1e-5, 1e-6])
def test_d13_group_norm_has_the_eps_it_was_given(eps):
    x = 1e-3 * image(2, 5, 3, 64)  # a variance near eps tells them apart
    module = made(lambda: GroupNorm(64, groups=32, eps=eps))
    scale, bias = (torch.from_numpy(np.array(p[...])) for p in (module.scale, module.bias))
    ours = run(module, x)
    close(ours, nhwc(F.group_norm(nchw(x), 32, scale, bias, eps)))
    other = nhwc(F.group_norm(nchw(x), 32, scale, bias, 1.1e-5 - eps))
    assert np.abs(np.asarray(ours) - other).max() > 0.1


def test_d13_norms_survive_a_mean_far_from_zero():
    x = 1000 + image(2, 4, 4, 64)
    exact = x.astype(np.float64).reshape(2, 16, 32, 2)
    exact = (exact - exact.mean((1, 3), keepdims=True)) / exact.std((1, 3), keepdims=True)
    module = made(lambda: GroupNorm(64, groups=32, eps=1e-5))
    exact = exact.reshape(x.shape) * module.scale[...] + module.bias[...]
    close(run(module, x), exact, 1e-3)


def test_d13_norms_take_their_statistics_in_fp32():
    x = (3 + image(2, 16, 16, 32)).astype(jnp.bfloat16)
    for build in (lambda: GroupNorm(32, groups=32, eps=1e-5), lambda: LayerNorm(32, eps=1e-5)):
        module = made(build)
        ours = run(module, x)
        assert ours.dtype == jnp.bfloat16
        close(ours.astype(jnp.float32), run(module, x.astype(np.float32)), 2**-8)


def test_d13_layer_norm_is_torchs():
    x, module = 1e-3 * image(2, 5, 24), made(lambda: LayerNorm(24, eps=1e-5))
    scale, bias = (torch.from_numpy(np.array(p[...])) for p in (module.scale, module.bias))
    close(run(module, x), F.layer_norm(torch.from_numpy(x), (24,), scale, bias, 1e-5).numpy())


def test_t09_adaptive_layer_norm_is_torchs_with_one_scale_and_shift_a_row():
    x, shift, scale = image(2, 5, 24), image(2, 24), image(2, 24)[::-1]
    normed = F.layer_norm(torch.from_numpy(x), (24,), eps=1e-6).numpy()
    wanted = normed * (1 + scale[:, None]) + shift[:, None]
    close(adaptive_layer_norm(x, shift, scale, 1e-6), wanted)
    half = adaptive_layer_norm(jnp.bfloat16(x), jnp.bfloat16(shift), jnp.bfloat16(scale), 1e-6)
    assert half.dtype == jnp.bfloat16
    close(half.astype(jnp.float32), wanted, 2**-6)


@pytest.mark.parametrize("channels", [64, 96])
def test_resnet_block_is_diffusers(channels):
    from diffusers.models.resnet import ResnetBlock2D

    torch.manual_seed(0)
    theirs = ResnetBlock2D(in_channels=64, out_channels=channels, temb_channels=16, eps=1e-5)
    ours = jax.eval_shape(
        lambda: ResnetBlock(64, channels, key=KEY, groups=32, eps=1e-5, time_dim=16)
    )
    state = {k: v.numpy() for k, v in theirs.state_dict().items()}
    arrays = {}
    for path in P.describe(ours):
        name, leaf = path.rpartition(".")[::2]
        tensor = state[f"{name}.{'bias' if leaf == 'bias' else 'weight'}"]
        arrays[path] = tensor.transpose(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    x, time = image(2, 6, 5, 64), image(2, 16)
    with torch.no_grad():
        close(run(P.bind(ours, arrays), x, time), nhwc(theirs(nchw(x), torch.from_numpy(time))))
    assert len(arrays) == len(state)


def with_adapter(size, stride=1, dropout=0.0):
    """4 to 6 channels, rank 2."""

    def build():
        module = Conv(4, 6, size, key=KEY, stride=stride, padding=size // 2, bias=False)
        a, b = jnp.zeros((size, size, 4, 2)), jnp.zeros((2, 6))
        module.lora_a = nnx.data(nnx.Param(a, axes=(None, None, None, "lora")))
        module.lora_b = nnx.data(nnx.Param(b, axes=("lora", "embed")))
        module.adapter = Adapter(1.5, dropout, 7)
        return module

    return made(build)


@pytest.mark.parametrize("size, stride", [(3, 1), (3, 2), (1, 1)])
def test_conv_lora_is_pefts(size, stride):
    from peft import LoraConfig, inject_adapter_in_model

    module, x = with_adapter(size, stride), image(2, 6, 7, 4)
    holder = torch.nn.Sequential(torch.nn.Conv2d(4, 6, size, stride, size // 2, bias=False))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=3, target_modules=["0"]), holder)
    holder[0].base_layer.weight.data = oihw(module.kernel[...])
    holder[0].lora_A["default"].weight.data = oihw(module.lora_a[...])
    holder[0].lora_B["default"].weight.data = oihw(module.lora_b[...][None, None])
    close(run(module, x), nhwc(holder(nchw(x))))


def test_conv_lora_dropout_needs_keys_and_depends_on_the_row_alone():
    module, x = with_adapter(3, dropout=0.5), image(3, 5, 5, 4)
    keys = jax.random.split(KEY, 3)
    dropped = run(module, x, keys)
    assert not np.allclose(dropped, run(module, x))
    # Another batch is another program, whose sums some processors round otherwise.
    alone = run(module, x[1:2], keys[1:2])[0]
    np.testing.assert_allclose(dropped[1], alone, rtol=1e-5, atol=1e-5)


def test_conv_kernels_shard_one_channel_dim_and_narrow_ones_stay_whole():
    mesh = make_mesh(fsdp=8)
    wide = shardings(P.describe(made(lambda: Conv(4, 320, 3, key=KEY))), mesh)
    assert wide["kernel"].spec[3] == "fsdp" and wide["bias"].is_fully_replicated
    narrow = shardings(
        P.describe(made(lambda: Conv(320, 4, 3, key=KEY, axes=REPLICATED_KERNEL))), mesh
    )
    assert all(sharding.is_fully_replicated for sharding in narrow.values())
