"""The perceptual distances against plain torch, values and gradients, and which files are taken."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.critics.perceptual import DEMO, LpipsVGG16, distance, open_perceptual
from jaxft.weights import transfer
from tests.parity.test_efficientnet import oracle as lite0_oracle
from tests.parity.test_efficientnet import random_weights as lite0_weights

# torchvision's vgg16().features: "M" is a pooling, every convolution has its ReLU behind it.
LAYERS = [64, 64, "M", 128, 128, "M", 256, 256, 256, "M", 512, 512, 512, "M", 512, 512, 512]
CUTS = (4, 9, 16, 23, 30)  # where the lpips package ends its slices


def vgg_weights(seed=0):
    """VGG16 in torchvision's names and LPIPS's heads, random."""
    torch.manual_seed(seed)
    w, place, inputs = {}, 0, 3
    for layer in LAYERS:
        if layer == "M":
            place += 1
            continue
        spread = (2 / inputs / 9) ** 0.5
        w[f"features.{place}.weight"] = spread * torch.randn(layer, inputs, 3, 3)
        w[f"features.{place}.bias"] = 0.1 * torch.randn(layer)
        inputs, place = layer, place + 2
    for k, width in enumerate((64, 128, 256, 512, 512)):
        w[f"lin{k}.model.1.weight"] = torch.rand(1, width, 1, 1)
    return w


def merged(w):
    """The same in the names of the lpips package's state dict, heads twice and buffers too."""
    renamed = {}
    for key, tensor in w.items():
        if key.startswith("features."):
            place = int(key.split(".")[1])
            key = (
                f"net.slice{1 + sum(place >= cut for cut in CUTS)}.{key.removeprefix('features.')}"
            )
        else:
            renamed[key.replace("lin", "lins.", 1)] = tensor.clone()
        renamed[key] = tensor
    buffers = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}
    return {**renamed, **buffers, "scaling_layer.scale": torch.ones(1, 3, 1, 1)}


def lpips(w, x, y):
    """LPIPS v0.1 of NCHW images in [-1, 1], from the paper and its reference implementation."""
    shift = torch.tensor([-0.030, -0.088, -0.188])[:, None, None]
    scale = torch.tensor([0.458, 0.448, 0.450])[:, None, None]

    def features(z):
        z, place, found = (z - shift.to(z)) / scale.to(z), 0, []
        for layer in LAYERS:
            if layer == "M":
                found.append(z)
                z, place = F.max_pool2d(z, 2), place + 1
                continue
            weight, bias = w[f"features.{place}.weight"], w[f"features.{place}.bias"]
            z, place = F.relu(F.conv2d(z, weight, bias, padding=1)), place + 2
        return [*found, z]

    heads = [w[f"lin{k}.model.1.weight"] for k in range(5)]
    return weighed(features(x), features(y), heads)


def lite0(w, x, y):
    """The same form on EfficientNet-Lite0's last block of each resolution, channels averaged."""
    a, b = ([lite0_oracle(w, z)[0][i] for i in (0, 2, 4, 10, 15)] for z in (x, y))
    return weighed(a, b, [torch.full((1, m.shape[1], 1, 1), 1 / m.shape[1]).to(m) for m in a])


def weighed(a, b, heads):
    def unit(z):
        return z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10)

    maps = [F.conv2d((unit(p) - unit(q)) ** 2, h) for p, q, h in zip(a, b, heads, strict=True)]
    return sum(m.mean((1, 2, 3)) for m in maps)


def load(spec):
    """The network of a spec under the prefix it has in a task, as a task loads it."""
    opened = open_perceptual(str(spec))
    template = jax.eval_shape(lambda: opened.module(key=jax.random.key(0)))
    leaves = {f"perceptual.{path}": leaf for path, leaf in P.describe(template).items()}
    places = shardings(leaves, one_device_mesh())
    params = transfer.load(opened.part(), leaves, places, "float32", set(leaves))
    own = {path.removeprefix("perceptual."): array for path, array in params.items()}
    return P.bind(template, own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("perceptual")


@pytest.fixture(scope="module")
def vgg(folder):
    w = vgg_weights()
    save_file(w, folder / "vgg.safetensors")
    return w, load(folder / "vgg.safetensors")


def images(seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (2, 16, 24, 3)).astype(np.float32)


def first(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def total(x, network, y):
    found = distance(network, x, y)
    return found.sum(), found


slopes = jax.jit(jax.grad(total, has_aux=True))
# Where most of the time is the compiler's own optimisations.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
slopes_quick = jax.jit(jax.grad(total, has_aux=True), compiler_options=QUICK)
distance_quick = jax.jit(distance, compiler_options=QUICK)


def compare(w, network, oracle, slopes, dtype):
    """Values and gradients with respect to x within 1e-5 of torch in `dtype`."""
    x, y = images(), np.clip(images() + 0.3 * images(seed=1), -1, 1)
    theirs = first(x).to(dtype).requires_grad_()
    wide = {k: v.to(dtype) if v.is_floating_point() else v for k, v in w.items()}
    wanted = oracle(wide, theirs, first(y).to(dtype))
    wanted.sum().backward()
    slope = theirs.grad.permute(0, 2, 3, 1).numpy()
    gradient, found = slopes(x, network, y)
    assert found.shape == (2,) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, wanted.detach().numpy(), rtol=1e-5)
    assert np.abs(gradient - slope).max() < 1e-5 * np.abs(slope).max()


def test_lpips_and_its_gradient(vgg):
    """In fp64, from which torch's own fp32 gradient is 0.9e-5 off."""
    assert vgg[1].name == "lpips-vgg16"
    compare(*vgg, lpips, slopes, torch.float64)


def test_effnet_distance_and_its_gradient(folder):
    w = lite0_weights()
    save_file(w, folder / "lite0.safetensors")
    network = load(folder / "lite0.safetensors")
    assert network.name == "effnet-lite0"
    compare(w, network, lite0, slopes_quick, torch.float32)


def test_the_lpips_packages_layout_is_the_same_network(vgg, folder):
    save_file(merged(vgg[0]), folder / "merged.safetensors")
    again = P.flatten(load(folder / "merged.safetensors"))
    for path, array in P.flatten(vgg[1]).items():
        np.testing.assert_array_equal(array, again[path])


def test_heads_under_their_second_name_alone(vgg, folder):
    """safetensors' save_model keeps one of two names of a shared tensor."""
    kept = {k: v for k, v in merged(vgg[0]).items() if not k.startswith("lin0")}
    kept = {k: v for k, v in kept.items() if k.startswith("lins.") or not k.startswith("lin")}
    save_file(kept, folder / "second.safetensors")
    np.testing.assert_array_equal(load(folder / "second.safetensors").heads()[3], vgg[1].heads()[3])


def test_demo_network_tells_images_apart():
    network, x, noise = load(DEMO), images(), images(1)
    same, near, far = (distance_quick(network, x, x + much * noise) for much in (0, 0.02, 0.5))
    np.testing.assert_array_equal(same, 0)
    assert (near > 0).all() and (far > near).all()


def test_pixels_without_features_have_a_finite_gradient(vgg):
    """All channels off: torch's sqrt at 0 would give NaN, ours gives 0."""
    dead = {path: jnp.zeros_like(array) for path, array in P.flatten(vgg[1]).items()}
    gradient, found = slopes(images(), P.bind(vgg[1], dead), images(1))
    np.testing.assert_array_equal(gradient, 0)
    np.testing.assert_array_equal(found, 0)


def test_half_precision_images_are_measured_in_fp32():
    network = load(DEMO)
    x, y = (jnp.asarray(images(seed), jnp.bfloat16) for seed in (0, 1))
    wide = distance_quick(network, x.astype(jnp.float32), y.astype(jnp.float32))
    np.testing.assert_allclose(distance_quick(network, x, y), wide, rtol=1e-6)


def without(w, start):
    return {key: tensor for key, tensor in w.items() if not key.startswith(start)}


def test_files_that_do_not_fit(vgg, folder):
    w = vgg[0]
    alex = {"net.slice1.0.weight": torch.zeros(64, 3, 11, 11), "net.slice2.3.bias": torch.zeros(9)}
    cases = {
        "no_heads": (without(w, "lin"), r"read as lpips-vgg16.* missing tensor lin0\.model\.1"),
        "cut": (without(merged(w), "net.slice5"), r"missing tensor net\.slice5\.24\.weight"),
        "alex": (alex, r"unexpected tensor net\.slice2\.3\.bias; missing tensor"),
        "clip": ({"visual.proj": torch.zeros(2)}, r"expected features\.0\.weight.* found visual"),
    }
    for name, (tensors, words) in cases.items():
        save_file(tensors, folder / f"{name}.safetensors")
        with pytest.raises(UserError, match=words) as caught:
            open_perceptual(str(folder / f"{name}.safetensors"))
        assert f"{name}.safetensors" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match=r"no such file or folder; expected demo:efficientnet-lite0"
    ):
        open_perceptual(str(folder / "nowhere"))


def test_torchvisions_classifier_is_not_needed(vgg, folder):
    save_file({**vgg[0], "classifier.0.bias": torch.zeros(7)}, folder / "whole.safetensors")
    assert open_perceptual(str(folder / "whole.safetensors")).module is LpipsVGG16


def test_images_that_do_not_fit(vgg):
    with pytest.raises(UserError, match="images have 4 channels, expected 3"):
        distance(vgg[1], jnp.zeros((1, 32, 32, 3)), jnp.zeros((1, 32, 32, 4)))
    with pytest.raises(UserError, match="15x32 pixels: expected at least 16x16"):
        distance(vgg[1], *(jnp.zeros((1, 15, 32, 3)),) * 2)
