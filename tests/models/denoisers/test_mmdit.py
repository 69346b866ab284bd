"""The MMDiT without weights: published sizes, FLOPs, refusals, and keys of adapters."""

from functools import cache, partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from flax import nnx

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models import flops
from jaxft.models.denoisers import mmdit
from jaxft.models.denoisers.mmdit import MMDiT
from jaxft.models.denoisers.mmdit_config import MMDiTConfig
from jaxft.nn.conv import runner
from jaxft.nn.linear import Adapter
from jaxft.weights import rules

# The compiler's own optimisations are most of the time of these tests.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TINY = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
# The published files, and the number of their parameters without the table of positions.
PUBLISHED = {
    "sd3": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 192,
    },
    "sd35 medium": {
        "num_layers": 24,
        "num_attention_heads": 24,
        "caption_projection_dim": 1536,
        "pos_embed_max_size": 384,
        "dual_attention_layers": tuple(range(13)),
        "qk_norm": "rms_norm",
    },
    "sd35 large": {
        "num_layers": 38,
        "num_attention_heads": 38,
        "caption_projection_dim": 2432,
        "pos_embed_max_size": 192,
        "qk_norm": "rms_norm",
    },
}
PARAMETERS = {"sd3": 2_028_328_000, "sd35 medium": 2_243_171_520, "sd35 large": 8_056_627_520}


@cache
def template(cfg):
    return jax.eval_shape(lambda: MMDiT(cfg, key=jax.random.key(0)))


def abstract(cfg, size, tokens=7):
    """The shapes of one row of inputs."""
    shapes = ((1, *size, cfg.in_channels), (1,), (1, tokens, cfg.context_dim), (1, cfg.pooled_dim))
    return [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes_fit_without_a_byte_allocated(name):
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**PUBLISHED[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    cfg = MMDiTConfig.from_hf(PUBLISHED[name])
    leaves = P.describe(template(cfg))
    entries = rules.plan(mmdit.rules(cfg), leaves, shapes, mmdit.sizes(cfg))
    assert sum(len(entry.keys) for entry in entries) == len(shapes)
    assert entries == rules.expected(mmdit.rules(cfg), leaves)
    count = sum(int(np.prod(leaf.shape)) for leaf in leaves.values() if not leaf.role)
    assert count == sum(tensor.numel() for tensor in theirs.parameters()) == PARAMETERS[name]
    assert [len(one.layers) for one in cfg.runs] == {
        "sd3": [23, 1], "sd35 medium": [13, 10, 1], "sd35 large": [37, 1],
    }[name]  # fmt: skip


def test_latents_of_another_size_are_refused():
    cfg = MMDiTConfig.from_hf(TINY)
    for size, words in (((8, 7), "8 x 7 are no multiple"), ((18, 8), "larger than 16")):
        with pytest.raises(UserError, match=words):
            template(cfg)(*abstract(cfg, size))


def test_unknown_remat_is_refused():
    cfg = MMDiTConfig.from_hf(TINY)
    with pytest.raises(UserError, match="none, dots, full"):
        template(cfg)(*abstract(cfg, (8, 8)), remat="offload")


def test_flops_of_sd35_medium_are_as_published_at_512_px():
    cfg = MMDiTConfig.from_hf(PUBLISHED["sd35 medium"])
    inputs = abstract(cfg, (64, 64), 333)
    made = flops.count(lambda model, inputs: model(*inputs), template(cfg), inputs)
    assert abs(made / 2.44e12 - 1) < 0.01


def test_adapter_dropout_is_keyed_by_row_and_by_block():
    cfg = MMDiTConfig.from_hf({**TINY, "num_layers": 3})

    @partial(jax.jit, compiler_options=QUICK)
    def with_adapter():
        model = MMDiT(cfg, key=jax.random.key(0))
        to_q = model.runs[0].attn.to_q
        to_q.lora_a = nnx.data(nnx.Param(jnp.ones((2, 16, 2)), axes=("embed", "lora")))
        to_q.lora_b = nnx.data(nnx.Param(jnp.ones((2, 2, 16)), axes=("lora", "heads")))
        to_q.adapter = Adapter(1.0, 0.5, 7)
        return model

    @partial(jax.jit, compiler_options=QUICK)
    def block_by_block(model, tokens, time, keys):
        for i in range(2):
            block = jax.tree.map(itemgetter(i), model.runs[0])
            tokens = block(tokens, time, jnp.stack([jax.random.fold_in(key, i) for key in keys]))
        return jax.tree.map(itemgetter(0), model.runs[1])(tokens, time, None)[0]

    random = np.random.default_rng(0)
    x, text, time = (
        np.repeat(random.standard_normal(shape, np.float32), 2, 0)
        for shape in ((1, 5, 16), (1, 7, 16), (1, 16))
    )
    model, keys = with_adapter(), jax.random.split(jax.random.key(1), 2)

    @partial(jax.jit, compiler_options=QUICK)
    def run(keys):
        return model._blocks((x, text), time, keys, runner("none"))

    first, second = run(keys)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(run(keys), block_by_block(model, (x, text), time, keys), atol=1e-5)
    np.testing.assert_allclose(run(keys[::-1])[1], first, atol=1e-6)
