"""The transformer of Z-Image without weights: published sizes, refusals, keys of adapters."""

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
from jaxft.models.denoisers.zimage.zimage import ZImageTransformer
from jaxft.models.denoisers.zimage.zimage_config import ZImageConfig
from jaxft.weights import rules
from tests.models.denoisers.adapters import (
    assert_adapters_have_the_names_and_shapes_of_modules,
    assert_dropout_is_keyed_by_row_and_block,
)

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
    cfg = ZImageConfig.from_hf(TINY)
    draw = np.random.default_rng(0).standard_normal
    inputs = [draw(one.shape, np.float32) for one in abstract(cfg, (4, 4))[:3]]
    targets = r".*\.attention\.to_q"
    assert_dropout_is_keyed_by_row_and_block(
        zimage.ARCHITECTURE, cfg, targets, [*inputs, np.array([7])]
    )


def test_adapters_of_all_projections_have_the_names_and_shapes_of_diffusers_modules():
    with torch.device("meta"):
        theirs = ZImageTransformer2DModel(**TINY)
    cfg = ZImageConfig.from_hf(TINY)
    assert_adapters_have_the_names_and_shapes_of_modules(zimage.ARCHITECTURE, cfg, theirs)
