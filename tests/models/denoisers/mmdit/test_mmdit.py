"""The MMDiT without weights: published sizes, FLOPs, refusals, and keys of adapters."""

from functools import cache, partial
from operator import itemgetter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel

from jaxft.core import params as P
from jaxft.core.configs.schema import Lora
from jaxft.core.errors import UserError
from jaxft.models import flops
from jaxft.models.denoisers.mmdit import mmdit
from jaxft.models.denoisers.mmdit.mmdit import MMDiT
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.nn import lora
from jaxft.nn.conv import runner
from jaxft.weights import rules, transfer
from jaxft.weights.adapters import peft

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
    cfg, draw = MMDiTConfig.from_hf(TINY), np.random.default_rng(0).standard_normal

    def build():
        model = MMDiT(cfg, key=jax.random.key(0))
        targets = Lora(rank=2, alpha=2.0, dropout=0.5, targets=r"runs\.0\.attn\.to_q")
        lora.add(model, targets, jax.random.key(1))
        return model

    @partial(jax.jit, compiler_options=QUICK)
    def block_by_block(model, tokens, time, keys):
        for i in range(2):
            block = jax.tree.map(itemgetter(i), model.runs[0])
            tokens = block(tokens, time, jnp.stack([jax.random.fold_in(key, i) for key in keys]))
        return jax.tree.map(itemgetter(0), model.runs[1])(tokens, time, None)[0]

    shapes = (1, 5, 16), (1, 7, 16), (1, 16)
    x, text, time = (np.repeat(draw(shape, np.float32), 2, 0) for shape in shapes)
    leaves = P.describe(blank := jax.eval_shape(build)).items()
    model = P.bind(blank, {path: 0.1 * draw(leaf.shape, np.float32) for path, leaf in leaves})
    keys = jax.random.split(jax.random.key(1), 2)

    @partial(jax.jit, compiler_options=QUICK)
    def run(keys):
        return model._blocks((x, text), time, keys, runner("none"))

    first, second = run(keys)
    assert np.abs(first - second).max() > 1e-3
    np.testing.assert_allclose(run(keys), block_by_block(model, (x, text), time, keys), atol=1e-5)
    np.testing.assert_allclose(run(keys[::-1])[1], first, atol=1e-6)


def test_adapters_of_all_projections_have_the_names_and_shapes_of_diffusers_modules():
    config = {**TINY, "dual_attention_layers": (0,), "qk_norm": "rms_norm"}
    cfg = MMDiTConfig.from_hf(config)

    def build():
        model = MMDiT(cfg, key=jax.random.key(0))
        lora.add(model, Lora(rank=2, targets=".*"), jax.random.key(1))
        return model

    leaves = P.describe(jax.eval_shape(build))
    part = transfer.Part("", "here", None, mmdit.rules(cfg), mmdit.sizes(cfg))
    found = {slot.module: slot for slot in peft.slots(part, leaves)}
    with torch.device("meta"):
        theirs = dict(SD3Transformer2DModel(**config).named_modules())
    kinds = (torch.nn.Linear, torch.nn.Conv2d)
    assert found.keys() == {name for name, module in theirs.items() if isinstance(module, kinds)}
    for name, slot in found.items():
        low, up = (leaves[f"{slot.path}.lora_{side}"].shape for side in "ab")
        outputs, inputs = theirs[name].weight.shape[:2]
        assert low[-2:] == (inputs, 2) and up[-2:] == (2, outputs), name
