"""EfficientNet-Lite0 against a plain torch forward pass with the same weights; fp32 on CPU."""

import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
import torch.nn.functional as F

import jaxft
from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.core.sharding import one_device_mesh, shardings
from jaxft.models.critics import efficientnet
from jaxft.models.critics.efficientnet import EfficientNetLite0
from jaxft.weights import rules, transfer
from jaxft.weights.files.tensor_files import TensorFiles

# (blocks, kernel, stride, expansion, in, out), from the paper's table and not from our code.
TABLE = [
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
]
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TEMPLATE = jax.eval_shape(lambda: EfficientNetLite0(key=jax.random.key(0)))
stages = jax.jit(EfficientNetLite0.stages, compiler_options=QUICK)
pooled = jax.jit(EfficientNetLite0.pooled, compiler_options=QUICK)
DEMO = Path(jaxft.__file__).parent / "demo" / "efficientnet-lite0"


def random_weights(seed=0):
    """Tensors named and shaped as the published checkpoint's, with lively norms."""
    torch.manual_seed(seed)
    w = {}

    def conv(name, out, inputs, size):
        w[f"{name}.weight"] = torch.randn(out, inputs, size, size) * (2 / inputs / size**2) ** 0.5

    def norm(name, width):
        w[f"{name}.weight"] = torch.rand(width) + 0.5
        w[f"{name}.bias"] = 0.3 * torch.randn(width)
        w[f"{name}.running_mean"] = 0.3 * torch.randn(width)
        w[f"{name}.running_var"] = torch.rand(width) + 0.5
        w[f"{name}.num_batches_tracked"] = torch.tensor(0)

    conv("_conv_stem", 32, 3, 3)
    norm("_bn0", 32)
    i = 0
    for blocks, size, _, expansion, inputs, out in TABLE:
        for _ in range(blocks):
            wide = inputs * expansion
            if expansion > 1:
                conv(f"_blocks.{i}._expand_conv", wide, inputs, 1)
                norm(f"_blocks.{i}._bn0", wide)
            conv(f"_blocks.{i}._depthwise_conv", wide, 1, size)
            norm(f"_blocks.{i}._bn1", wide)
            conv(f"_blocks.{i}._project_conv", out, wide, 1)
            norm(f"_blocks.{i}._bn2", out)
            inputs, i = out, i + 1
    conv("_conv_head", 1280, 320, 1)
    norm("_bn1", 1280)
    w["_fc.weight"], w["_fc.bias"] = torch.randn(1000, 1280), torch.randn(1000)
    return w


def same(x, weight, stride, groups=1):
    """TensorFlow's "same": the odd row or column is added at the bottom and right."""
    k, (height, width) = weight.shape[-1], x.shape[-2:]
    down = max((math.ceil(height / stride) - 1) * stride + k - height, 0)
    right = max((math.ceil(width / stride) - 1) * stride + k - width, 0)
    x = F.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2))
    return F.conv2d(x, weight, None, stride, 0, 1, groups)


def oracle(w, images):
    """(block outputs, last map) of NCHW images in [-1, 1]."""

    def norm(x, name):
        mean, var = w[f"{name}.running_mean"], w[f"{name}.running_var"]
        return F.batch_norm(x, mean, var, w[f"{name}.weight"], w[f"{name}.bias"], False, 0, 1e-3)

    x = ((images * 127.5 + 127.5) - 127) / 128
    x = F.relu6(norm(same(x, w["_conv_stem.weight"], 2), "_bn0"))
    outputs = []
    for blocks, _, stride, expansion, _, _ in TABLE:
        for j in range(blocks):
            p, y = f"_blocks.{len(outputs)}.", x
            if expansion > 1:
                y = F.relu6(norm(F.conv2d(y, w[f"{p}_expand_conv.weight"]), f"{p}_bn0"))
            y = same(y, w[f"{p}_depthwise_conv.weight"], 1 if j else stride, y.shape[1])
            y = F.relu6(norm(y, f"{p}_bn1"))
            y = norm(F.conv2d(y, w[f"{p}_project_conv.weight"]), f"{p}_bn2")
            x = x + y if j else y
            outputs.append(x)
    return outputs, F.relu6(norm(F.conv2d(x, w["_conv_head.weight"]), "_bn1"))


def load(w):
    arrays = {key: tensor.numpy() for key, tensor in w.items()}
    shapes = {key: array.shape for key, array in arrays.items()}
    leaves, sizes = P.describe(TEMPLATE), efficientnet.SIZES
    plan = rules.plan(efficientnet.RULES, leaves, shapes, sizes, efficientnet.IGNORE)
    read = {e.path: rules.to_jax(arrays[e.keys[0]], e.layout, sizes) for e in plan}
    return P.bind(TEMPLATE, {path: jnp.asarray(array) for path, array in read.items()})


@pytest.fixture(scope="module")
def pair():
    w = random_weights()
    return w, load(w)


def images(*size, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (2, *size, 3)).astype(np.float32)


def first(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def close(got, wanted, tolerance=1e-5):
    assert got.shape == wanted.shape and np.abs(wanted).max() > 0.1
    assert np.abs(got - wanted).max() < tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("size", [(64, 64), (37, 50)])
def test_stages(pair, size):
    """Odd sizes tell TensorFlow's "same" from torch's symmetric padding."""
    w, model = pair
    x = images(*size)
    outputs, _ = oracle(w, first(x))
    found = stages(model, x)
    assert [stage.shape[-1] for stage in found] == [16, 24, 40, 112, 320]
    for got, block in zip(found, (0, 2, 4, 10, 15), strict=True):
        close(got, outputs[block].permute(0, 2, 3, 1).numpy())
    assert [head.shape for head in model.heads()] == [stage.shape[-1:] for stage in found]
    np.testing.assert_allclose([head.sum() for head in model.heads()], 1, rtol=1e-5)


@pytest.mark.parametrize("size", [(56, 112), (448, 336)], ids=["enlarged", "shrunk"])
def test_resized_as_torch_with_antialiasing(size):
    """Ratios that fp32 holds exactly: elsewhere torch itself is 2e-5 off its own fp64."""
    x = images(*size)
    wanted = F.interpolate(first(x), (224, 224), mode="bilinear", antialias=True)
    close(efficientnet.resized(x), wanted.permute(0, 2, 3, 1).numpy())


def test_pooled_features_of_the_resized_images(pair):
    """Both sides see the same pixels: a change of 1e-6 in them moves these features by 1e-5."""
    w, model = pair
    x = images(64, 48)
    wanted = oracle(w, first(efficientnet.resized(x)))[1].mean((2, 3)).numpy()
    got = pooled(model, x)
    assert got.shape == (2, 1280)
    close(got, wanted)


def test_frozen_norm_is_its_statistics_and_not_the_batch(pair):
    _, model = pair
    x = images(32, 32)
    together, alone = stages(model, x)[-1], stages(model, x[:1])[-1]
    close(together[:1], alone)


def test_classifier_and_counters_are_ignored_and_the_rest_is_not(pair):
    w, _ = pair
    with pytest.raises(UserError, match=r"unexpected tensor _blocks\.16\._bn1\.weight"):
        load({**w, "_blocks.16._bn1.weight": torch.zeros(3)})
    with pytest.raises(UserError, match=r"missing tensor _bn1\.running_var"):
        load({key: tensor for key, tensor in w.items() if key != "_bn1.running_var"})


def test_demo_file_is_whole_small_and_bf16():
    tensors = TensorFiles.open(DEMO)
    assert (DEMO / "model.safetensors").stat().st_size < 7.5e6
    names = tensors.keys()
    assert {tensors.info(key)[1] for key in names} == {np.dtype(ml_dtypes.bfloat16)}
    assert json.loads((DEMO / "config.json").read_text())["model_type"] == "efficientnet-lite0"
    assert "Apache License, Version 2.0" in (DEMO / "LICENSE").read_text()
    part = transfer.Part("", str(DEMO), tensors, efficientnet.RULES, efficientnet.SIZES)
    leaves = P.describe(TEMPLATE)
    params = transfer.load(
        part, leaves, shardings(leaves, one_device_mesh()), "float32", set(leaves)
    )
    found = stages(P.bind(TEMPLATE, params), images(32, 32))
    assert all(np.isfinite(stage).all() for stage in found)
