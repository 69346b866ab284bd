"""The transformer of FLUX.2 klein without weights: published sizes, keys of adapters."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2Transformer2DModel

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.denoisers.flux import flux2
from jaxft.models.denoisers.flux.flux2 import Flux2Transformer
from jaxft.models.denoisers.flux.flux2_config import Flux2Config
from jaxft.weights import rules
from tests.models.denoisers.adapters import (
    assert_adapters_have_the_names_and_shapes_of_modules,
    assert_dropout_is_keyed_by_row_and_block,
)
from tests.tiny_klein import TRANSFORMER

# The published sizes: layers, single layers, heads, width of the text, parameters.
KLEIN = {
    "4B": (5, 20, 24, 7680, 3_875_544_576),
    "9B": (8, 24, 32, 12288, 9_078_581_248),
}


def published(name):
    layers, singles, heads, width, _ = KLEIN[name]
    return {
        "num_layers": layers,
        "num_single_layers": singles,
        "num_attention_heads": heads,
        "joint_attention_dim": width,
        "guidance_embeds": False,
    }


@cache
def meta(name):
    with torch.device("meta"):
        return Flux2Transformer2DModel(**published(name))


@cache
def template(cfg):
    return jax.eval_shape(lambda: Flux2Transformer(cfg, key=jax.random.key(0)))


def abstract(cfg, size, tokens=7):
    """The shapes of one row of inputs."""
    shapes = ((1, *size, cfg.in_channels), (1,), (1, tokens, cfg.context_dim))
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


def called(model, *inputs):
    return model(*inputs)


@pytest.mark.parametrize("name", KLEIN)
def test_published_sizes_fit_without_a_byte_allocated(name):
    shapes = {key: tuple(tensor.shape) for key, tensor in meta(name).state_dict().items()}
    cfg = Flux2Config.from_hf(published(name))
    leaves = P.describe(template(cfg))
    entries = rules.plan(flux2.rules(cfg), leaves, shapes, {})
    assert sum(len(entry.keys) for entry in entries) == len(shapes)
    assert entries == rules.expected(flux2.rules(cfg), leaves)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    assert count == sum(x.numel() for x in meta(name).parameters()) == KLEIN[name][-1]
    out = jax.eval_shape(called, template(cfg), *abstract(cfg, (128, 96), 512))
    assert out.shape == (1, 128, 96, 32)


def test_odd_sizes_and_unknown_remat_are_refused():
    cfg = Flux2Config.from_hf(TRANSFORMER)
    with pytest.raises(UserError, match="latents of 8 x 7 are no multiple"):
        jax.eval_shape(called, template(cfg), *abstract(cfg, (8, 7)))
    with pytest.raises(UserError, match="none, dots, full"):
        template(cfg)(*abstract(cfg, (8, 8)), remat="offload")


def test_adapter_dropout_is_keyed_by_row_and_by_block():
    cfg = Flux2Config.from_hf(TRANSFORMER)
    draw = np.random.default_rng(0).standard_normal
    inputs = [draw(one.shape, np.float32) for one in abstract(cfg, (4, 4))]
    targets = r"(doubles\.attn\.to_q|singles\.to_qkv_mlp_proj)"
    assert_dropout_is_keyed_by_row_and_block(flux2.ARCHITECTURE, cfg, targets, inputs)


def test_adapters_of_all_projections_have_the_names_and_shapes_of_diffusers_modules():
    with torch.device("meta"):
        theirs = Flux2Transformer2DModel(**TRANSFORMER)
    cfg = Flux2Config.from_hf(TRANSFORMER)
    assert_adapters_have_the_names_and_shapes_of_modules(flux2.ARCHITECTURE, cfg, theirs)
