"""The transformer of FLUX.1 without weights: published sizes, FLOPs, refusals, keys of adapters."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models import flops
from jaxft.models.denoisers.flux import flux
from jaxft.models.denoisers.flux.flux import FluxTransformer
from jaxft.models.denoisers.flux.flux_config import FluxConfig
from jaxft.weights import rules
from tests.models.denoisers.adapters import (
    assert_adapters_have_the_names_and_shapes_of_modules,
    assert_dropout_is_keyed_by_row_and_block,
)

TINY = {
    "in_channels": 16,
    "num_layers": 2,
    "num_single_layers": 3,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 12,
    "axes_dims_rope": (4, 6, 6),
    "guidance_embeds": True,
}
# The published files are the class defaults. The number of their parameters.
PARAMETERS = {"dev": 11_901_408_320, "schnell": 11_891_178_560}


@cache
def template(cfg):
    return jax.eval_shape(lambda: FluxTransformer(cfg, key=jax.random.key(0)))


def abstract(cfg, size, tokens=7):
    """The shapes of one row of inputs."""
    shapes = ((1, *size, cfg.in_channels), (1,), (1, tokens, cfg.context_dim), (1, cfg.pooled_dim))
    guidance = [jax.ShapeDtypeStruct((1,), jnp.float32)] if cfg.guidance else []
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes] + guidance


@pytest.mark.parametrize("name", PARAMETERS)
def test_published_sizes_fit_without_a_byte_allocated(name):
    config = {"guidance_embeds": name == "dev"}
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**config)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    cfg = FluxConfig.from_hf(config)
    leaves = P.describe(template(cfg))
    entries = rules.plan(flux.rules(cfg), leaves, shapes, {})
    assert sum(len(entry.keys) for entry in entries) == len(shapes)
    assert entries == rules.expected(flux.rules(cfg), leaves)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves.values())
    assert count == sum(tensor.numel() for tensor in theirs.parameters()) == PARAMETERS[name]


def test_odd_latents_are_refused():
    cfg = FluxConfig.from_hf(TINY)
    with pytest.raises(UserError, match=r"8 x 7 are no multiple of .* 2 x 2"):
        template(cfg)(*abstract(cfg, (8, 7)))


def test_unknown_remat_is_refused():
    cfg = FluxConfig.from_hf(TINY)
    with pytest.raises(UserError, match="none, dots, full"):
        template(cfg)(*abstract(cfg, (8, 8)), remat="offload")


@pytest.mark.parametrize(("side", "count"), [(64, 21.5e12), (128, 74.4e12)])
def test_flops_of_dev_are_as_published(side, count):
    cfg = FluxConfig.from_hf({"guidance_embeds": True})
    inputs = abstract(cfg, (side, side), 512)
    made = flops.count(lambda model, inputs: model(*inputs), template(cfg), inputs)
    assert abs(made / count - 1) < 0.01


def test_adapter_dropout_is_keyed_by_row_and_by_block():
    cfg = FluxConfig.from_hf(TINY)
    draw = np.random.default_rng(0).standard_normal
    inputs = [draw(one.shape, np.float32) for one in abstract(cfg, (4, 4))]
    targets = r"(doubles|singles)\.attn\.to_q"
    assert_dropout_is_keyed_by_row_and_block(flux.ARCHITECTURE, cfg, targets, inputs)


def test_adapters_of_all_projections_have_the_names_and_shapes_of_diffusers_modules():
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(**TINY)
    cfg = FluxConfig.from_hf(TINY)
    assert_adapters_have_the_names_and_shapes_of_modules(flux.ARCHITECTURE, cfg, theirs)
