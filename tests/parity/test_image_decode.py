"""The guided sampler against stock transformers' generate, code for code."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM
from transformers.generation import UnbatchedClassifierFreeGuidanceLogitsProcessor

from jaxft import load
from jaxft.core.sharding import one_device_mesh
from jaxft.kernels import loops
from jaxft.models import registry
from jaxft.models.decoders.decoder import Decoder
from jaxft.models.decoders.generation.sampling import Sampling, pick
from jaxft.models.pipelines import image_decode
from jaxft.models.pipelines.image_decode import Unified, generate_codes
from jaxft.tasks.image_tokens.layout import extended, left_padded, null_prompt

TEXT, CODES, COUNT = 320, 24, 20
GREEDY = Sampling()
LAYOUT = extended(TEXT, CODES, (4, 5), "")
PROMPTS = [[5, 6, 7, 8, 9, 10, 11], [12], [20, 21, 22], [30, 31, 32, 33]]


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def folder(request, make_folder):
    changes = {"vocab_size": LAYOUT.vocab_size, "initializer_range": 0.3}
    return make_folder(tied=request.param, **changes)


def ours(folder, guidance, how=GREEDY, seed=0, prompts=PROMPTS):
    model = load(str(folder)).model
    null = [null_prompt(LAYOUT, ids) for ids in prompts]
    tokens, mask = left_padded(LAYOUT, prompts + null)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(prompts)))
    with jax.set_mesh(one_device_mesh()):
        made = jax.jit(
            lambda model, scale: generate_codes(
                Unified(model, LAYOUT.image_offset, CODES), tokens, mask, keys,
                count=COUNT, guidance=scale, how=how, dtype=jnp.float32,
            )
        )(model, guidance)  # fmt: skip
    return np.asarray(made)


def stock(folder, guidance):
    """transformers alone: generate with guidance, negative prompts, and text suppressed."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    width = max(map(len, PROMPTS)) + 1
    rows = [[*ids, LAYOUT.boi] for ids in PROMPTS]
    tokens = torch.tensor([[LAYOUT.pad] * (width - len(ids)) + ids for ids in rows])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in rows])
    made = model.generate(
        tokens,
        attention_mask=mask,
        max_new_tokens=COUNT,
        do_sample=False,
        guidance_scale=guidance,
        negative_prompt_ids=torch.tensor([[LAYOUT.null, LAYOUT.boi]] * len(rows)),
        negative_prompt_attention_mask=torch.ones(len(rows), 2, dtype=torch.long),
        suppress_tokens=list(range(LAYOUT.image_offset)),
        pad_token_id=LAYOUT.pad,
    )
    return made[:, width:].numpy() - LAYOUT.image_offset


@pytest.mark.parametrize(
    ("smallest_span", "unstacked"),
    [(COUNT, loops.UNSTACKED_BYTES), (6, loops.UNSTACKED_BYTES), (COUNT, -1)],
    ids=["whole", "spans", "stacked layers"],
)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_greedy_codes_equal_stock_generate(folder, guidance, smallest_span, unstacked, monkeypatch):
    """P4, prompts of unequal lengths padded on the left."""
    monkeypatch.setattr(loops, "SMALLEST_CACHE_SPAN", smallest_span)
    monkeypatch.setattr(loops, "UNSTACKED_BYTES", unstacked)
    expected = stock(folder, guidance)
    assert expected.shape == (len(PROMPTS), COUNT) and expected.min() >= 0
    assert len({tuple(row) for row in expected}) == len(PROMPTS), "rows are to differ"
    np.testing.assert_array_equal(ours(folder, guidance), expected)


def guided_scores(folder, guidance):
    """Of the first code, by transformers' own processor: log-probabilities of the codes alone."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    null, rows = torch.tensor([[LAYOUT.null, LAYOUT.boi]]), []
    for ids in PROMPTS:
        tokens = torch.tensor([[*ids, LAYOUT.boi]])
        guide = UnbatchedClassifierFreeGuidanceLogitsProcessor(guidance, model, null)
        with torch.no_grad():
            scores = guide(tokens, model(tokens).logits[:, -1])
        rows.append(torch.log_softmax(scores[0, LAYOUT.image_offset :], -1))
    return torch.stack(rows).numpy()


def test_trap15_guidance_comes_before_temperature_and_filters(folder, monkeypatch):
    """What is filtered is u + s(c - u) of the plain logits, whatever the temperature."""
    seen = []

    def spy(logits, keys, how):
        jax.debug.callback(lambda x: seen.append(np.asarray(x)), logits, ordered=True)
        return pick(logits, keys, how)

    monkeypatch.setattr(image_decode, "pick", spy)
    ours(folder, 3.0, Sampling(0.5, 3, 0.9))
    assert len(seen) == COUNT and seen[0].shape == (len(PROMPTS), CODES)
    found = np.asarray(jax.nn.log_softmax(seen[0]))
    np.testing.assert_allclose(found, guided_scores(folder, 3.0), atol=1e-4)


def test_trap15_the_mix_is_fp32_where_the_model_computes_in_bf16(folder, monkeypatch):
    seen = []

    def spy(logits, keys, how):
        seen.append(logits.dtype)
        return pick(logits, keys, how)

    monkeypatch.setattr(image_decode, "pick", spy)
    model = Unified(load(str(folder), "bfloat16").model, LAYOUT.image_offset, CODES)
    tokens, mask = left_padded(LAYOUT, [[5, 6], [LAYOUT.null]])
    keys = jax.random.split(jax.random.key(0), 1)
    draw = partial(generate_codes, model, tokens, mask, keys)
    with jax.set_mesh(one_device_mesh()):
        jax.eval_shape(lambda: draw(count=3, guidance=2.0, how=GREEDY, dtype=jnp.bfloat16))
    assert seen == [np.dtype(np.float32)] * 2, "of the first code, and of the loop"


def test_guidance_moves_what_is_drawn(folder):
    assert (ours(folder, 1.0) != ours(folder, 6.0)).any()


def test_guidance_of_zero_draws_without_the_caption(folder):
    made = ours(folder, 0.0)
    assert (made == made[0]).all()


def test_draws_depend_on_the_row_alone(folder):
    """Hot sampling: every row the same beside others, another seed another image."""
    how = Sampling(1.0, 12, 0.9)
    all_rows = ours(folder, 2.0, how)
    np.testing.assert_array_equal(ours(folder, 2.0, how, prompts=PROMPTS[:2]), all_rows[:2])
    assert (ours(folder, 2.0, how, seed=1) != all_rows).mean() > 0.3
    assert all_rows.min() >= 0 and all_rows.max() < CODES


def test_codes_in_a_gemma_have_its_scaled_embeddings_and_capped_logits():
    config = {"model_type": "gemma2", "vocab_size": 60, "hidden_size": 16, "head_dim": 4}
    sizes = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    cfg = registry.read_decoder({**config, **sizes, "initializer_range": 1.0})
    decoder = Decoder(cfg, key=jax.random.key(0))
    unified, ids = Unified(decoder, 36, CODES), np.arange(36, 56)[None]
    want, _ = decoder.hidden(ids)
    embeds = unified.embed(ids, ids > 0, jnp.float32)
    np.testing.assert_allclose(decoder.hidden(embeds=embeds)[0], want, atol=1e-6)
    np.testing.assert_array_equal(unified.embed_codes(ids - 36, jnp.float32), embeds)
    logits = decoder.logits(want)[0, :, 36:]
    np.testing.assert_allclose(unified.scorer()(want[0]), logits, atol=1e-5)
    loss, _ = unified.cross_entropy(want, ids, np.ones(ids.shape, np.float32), 0.0)
    each = -jax.nn.log_softmax(decoder.logits(want))[0, np.arange(20), ids[0]]
    np.testing.assert_allclose(loss, each.sum(), rtol=1e-5)
