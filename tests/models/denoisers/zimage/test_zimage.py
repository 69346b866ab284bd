"""The transformer of Z-Image without weights: published sizes, refusals, keys of adapters."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel

from jaxft.core import params as P
from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.models.denoisers.zimage import zimage
from jaxft.models.denoisers.zimage.zimage import ZImageTransformer
from jaxft.models.denoisers.zimage.zimage_config import ZImageConfig
from jaxft.nn import lora
from jaxft.weights import rules, transfer
from jaxft.weights.adapters import peft

TINY = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 1,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 16,
    "axes_dims": [4, 6, 6],
}
PARAMETERS = 6_154_908_736  # of Z-Image and of Z-Image-Turbo, whose files are the class defaults


@cache
def template(cfg):
    return jax.eval_shape(lambda: ZImageTransformer(cfg, key=jax.random.key(0)))


def abstract(cfg, size, tokens=7):
    """The shapes of one row of inputs."""
    shapes = ((1, *size, cfg.in_channels), (1,), (1, tokens, cfg.context_dim))
    floats = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return [*floats, jax.ShapeDtypeStruct((1,), jnp.int32)]


def called(model, *inputs):
    return model(*inputs)


def test_published_sizes_fit_without_a_byte_allocated():
    with torch.device("meta"):
        theirs = ZImageTransformer2DModel()
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    cfg = ZImageConfig.from_hf({})
    leaves = P.describe(template(cfg))
    entries = rules.plan(zimage.rules(cfg), leaves, shapes, {})
    assert sum(len(entry.keys) for entry in entries) == len(shapes)
    assert entries == rules.expected(zimage.rules(cfg), leaves)
    assert sum(int(np.prod(leaf.shape)) for leaf in leaves.values()) == PARAMETERS
    out = jax.eval_shape(called, template(cfg), *abstract(cfg, (128, 96), 512))
    assert out.shape == (1, 128, 96, 16)


def test_odd_sizes_and_unknown_remat_are_refused():
    cfg = ZImageConfig.from_hf(TINY)
    with pytest.raises(UserError, match="latents of 8 x 7 are no multiple"):
        jax.eval_shape(called, template(cfg), *abstract(cfg, (8, 7)))
    with pytest.raises(UserError, match="none, dots, full"):
        template(cfg)(*abstract(cfg, (8, 8)), remat="offload")


def test_adapter_dropout_is_keyed_by_row_and_by_block():
    """Two rows with the same key are alike, and a block's number is in its key."""
    cfg, draw = ZImageConfig.from_hf(TINY), np.random.default_rng(0).standard_normal

    def build():
        model = ZImageTransformer(cfg, key=jax.random.key(0))
        targets = Lora(rank=2, alpha=2.0, dropout=0.5, targets=r".*\.attention\.to_q")
        lora.add(model, targets, jax.random.key(1))
        return model

    leaves = P.describe(blank := jax.eval_shape(build)).items()
    model = P.bind(blank, {path: 0.1 * draw(leaf.shape, np.float32) for path, leaf in leaves})
    shapes = [one.shape for one in abstract(cfg, (4, 4))[:3]]
    inputs = [np.repeat(draw(shape, np.float32), 2, 0) for shape in shapes]
    run = jax.jit(lambda keys: model(*inputs, jnp.array([7, 7]), keys=keys))
    keys = jax.random.split(jax.random.key(1), 2)
    first, second = run(keys)
    assert np.abs(first - second).max() > 1e-5
    np.testing.assert_allclose(run(keys[::-1])[1], first, atol=1e-6)


def test_adapters_of_all_projections_have_the_names_and_shapes_of_diffusers_modules():
    cfg = ZImageConfig.from_hf(TINY)

    def build():
        model = ZImageTransformer(cfg, key=jax.random.key(0))
        lora.add(model, Lora(rank=2, targets=".*"), jax.random.key(1))
        return model

    leaves = P.describe(jax.eval_shape(build))
    part = transfer.Part("", "here", None, zimage.rules(cfg), {})
    found = {slot.module: slot for slot in peft.slots(part, leaves)}
    with torch.device("meta"):
        theirs = dict(ZImageTransformer2DModel(**TINY).named_modules())
    wanted = {name for name, module in theirs.items() if isinstance(module, torch.nn.Linear)}
    assert found.keys() == wanted
    for name, slot in found.items():
        low, up = (leaves[f"{slot.path}.lora_{side}"].shape for side in "ab")
        outputs, inputs = theirs[name].weight.shape
        assert low[-2:] == (inputs, 2) and up[-2:] == (2, outputs), name
