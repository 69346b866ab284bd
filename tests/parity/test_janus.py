"""Janus against transformers' JanusForConditionalGeneration: composed loss, gradients, codes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import JanusForConditionalGeneration

from jaxft.core import params as P
from jaxft.core.errors import UserError
from jaxft.models.autoencoders import vqgan
from jaxft.models.autoencoders.vqgan import VQModel
from jaxft.models.decoders.families import llama
from jaxft.models.decoders.generation.sampling import Sampling
from jaxft.models.pipelines import janus
from jaxft.models.pipelines.image_decode import generate_codes
from jaxft.models.pipelines.janus import VISION_DEFAULTS, VQ_DEFAULTS, Janus, JanusConfig
from jaxft.weights import rules, transfer
from tests.tiny_janus import CODES, GRID, PRO_1B, PRO_7B, make_model, published

BOS, PAD, BOI = 0, 3, 5
PROMPTS = [[0, 7, 20, 21, 8, 34, 5], [0, 7, 99, 8, 34, 5], [0, 7, 30, 31, 32, 33, 40, 8, 34, 5]]


@pytest.fixture(scope="module")
def pair():
    """The same random weights as their model and as ours."""
    hf = make_model()
    cfg = JanusConfig.from_hf(hf.config.to_dict())
    template = jax.eval_shape(lambda: Janus(cfg, key=jax.random.key(0)))
    state = {key: tensor.detach().numpy() for key, tensor in hf.state_dict().items()}
    return hf, P.bind(template, to_jax(template, cfg, state))


def to_jax(template, cfg, tensors):
    """Parameters by path of tensors by torch key; every tensor has its place or is carried."""
    sizes, shapes = llama.sizes(cfg.text), {key: one.shape for key, one in tensors.items()}
    made = {}
    for entry in rules.plan(janus.RULES, P.describe(template), shapes, sizes, janus.CARRIED):
        parts = [rules.to_jax(tensors[key], entry.layout, sizes) for key in entry.keys]
        made[entry.path] = jnp.asarray(np.stack(parts) if entry.stacked else parts[0])
    return made


def codes_of(rows, seed=0):
    return np.random.default_rng(seed).integers(0, CODES, (rows, GRID**2))


def composed(hf, prompt, codes):
    """Losses (B, S) of codes after one prompt: the modules of transformers, put together."""
    model = hf.model
    text = model.language_model.embed_tokens(torch.tensor([prompt] * len(codes)))
    images = model.generation_aligner(model.generation_embeddings(torch.tensor(codes[:, :-1])))
    hidden = model.language_model(inputs_embeds=torch.cat([text, images], 1)).last_hidden_state
    logits = model.generation_head(hidden[:, len(prompt) - 1 :])
    return F.cross_entropy(logits.transpose(1, 2), torch.tensor(codes), reduction="none")


def test_p3_composed_loss_and_gradients_per_tensor(pair):
    hf, model = pair
    prompt, codes = PROMPTS[0], codes_of(3)
    weights = np.random.default_rng(1).uniform(0.5, 1.0, codes.shape).astype(np.float32)
    hf.zero_grad()
    losses = composed(hf, prompt, codes)
    (losses * torch.tensor(weights)).sum().backward()
    assert losses.mean().item() > 0.8 * np.log(CODES)
    tokens = np.concatenate([np.tile(prompt, (3, 1)), codes[:, :-1]], 1)
    images = np.arange(tokens.shape[1])[None] >= len(prompt) + np.zeros((3, 1), int)

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def gradients(params):
        bound = P.bind(model, params)
        embeds = bound.embed(jnp.asarray(tokens), jnp.asarray(images), jnp.float32)
        hidden = bound.decoder.hidden(embeds=embeds)[0][:, len(prompt) - 1 :]
        return bound.cross_entropy(hidden, jnp.asarray(codes), jnp.asarray(weights), 0.0)

    (total, sums), got = gradients(P.flatten(model))
    wanted = (losses.detach().numpy() * weights).sum()
    assert float(total) == pytest.approx(wanted, rel=1e-6)
    assert float(sums["weight"]) == pytest.approx(weights.sum(), rel=1e-6)
    grads = {k: v.grad.numpy() for k, v in hf.named_parameters() if v.grad is not None}
    for path, grad in to_jax(model, model.cfg, grads).items():  # no tensor too few or too many
        error = np.linalg.norm(got[path] - grad) / np.linalg.norm(grad)
        assert error < 1e-5, f"{path}: {error:.1e}"


def theirs(hf, prompts, guidance):
    width = max(map(len, prompts))
    rows = [[PAD] * (width - len(ids)) + ids for ids in prompts]
    mask = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
    hf.generation_config.generation_kwargs = {"boi_token_id": BOI}
    return hf.generate(
        torch.tensor(rows),
        attention_mask=torch.tensor(mask),
        generation_mode="image",
        guidance_scale=guidance,
        do_sample=False,
    ).numpy()


def ours(model, prompts, guidance):
    width = max(map(len, prompts))
    null = [[i if i in (BOS, BOI) else PAD for i in ids] for ids in prompts]
    rows = np.array([[PAD] * (width - len(ids)) + ids for ids in prompts + null])
    mask = np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts * 2])
    keys = jax.random.split(jax.random.key(0), len(prompts))
    call = jax.jit(
        partial(generate_codes, count=GRID**2, how=Sampling(), dtype=jnp.float32, guidance=guidance)
    )
    return np.asarray(call(model, rows, mask, keys))


@pytest.mark.parametrize("guidance", [5, 1.5])
def test_p3_greedy_codes_equal_generate(pair, guidance):
    """Prompts of unequal lengths, padded on the left."""
    hf, model = pair
    expected = theirs(hf, PROMPTS, guidance)
    assert expected.shape == (3, GRID**2) and len(np.unique(expected)) > 5
    assert len({tuple(row) for row in expected}) == 3, "rows are to differ"
    np.testing.assert_array_equal(ours(model, PROMPTS, guidance), expected)


def part_of(shapes, sizes):
    """What an export writes from headers alone; no tensor is read for its shape."""

    class Headers:
        def keys(self):
            return list(shapes)

        def info(self, key):
            return shapes[key], np.dtype(np.float32)

    return transfer.Part("", "x", Headers(), janus.RULES, sizes, janus.CARRIED)


@pytest.mark.parametrize(
    ("shape", "tensors", "millions"),
    [(PRO_1B, 964, 2076.6), (PRO_7B, 1018, 7407.8)],
    ids=["1B", "7B"],
)
def test_published_sizes_by_shape(shape, tensors, millions):
    """Every tensor is a parameter's, the tokenizer's or carried; none is allocated."""
    config = published(*shape)
    with torch.device("meta"):
        hf = JanusForConditionalGeneration(config)
    shapes = {key: tuple(one.shape) for key, one in hf.state_dict().items()}
    assert len(shapes) == tensors
    assert sum(map(np.prod, shapes.values())) / 1e6 == pytest.approx(millions, abs=0.1)
    cfg = JanusConfig.from_hf(config.to_dict())
    assert cfg.grid == 24 and cfg.vq.factor == 16
    template = jax.eval_shape(lambda: Janus(cfg, key=jax.random.key(0)))
    sizes = llama.sizes(cfg.text)
    planned = rules.plan(janus.RULES, P.describe(template), shapes, sizes, janus.CARRIED)
    own = {key for entry in planned for key in entry.keys}
    vq = {k.removeprefix(janus.VQ): v for k, v in shapes.items() if k.startswith(janus.VQ)}
    tokenizer = jax.eval_shape(lambda: VQModel(cfg.vq, key=jax.random.key(0)))
    found = rules.plan(vqgan.rules(cfg.vq), P.describe(tokenizer), vq, {})
    assert sum(len(entry.keys) for entry in found) == len(vq)
    carried = shapes.keys() - own - {janus.VQ + key for key in vq}
    blind = ("model.vision_model.", "model.aligner.", "lm_head.weight")
    assert all(key.startswith(blind) for key in carried)
    assert len(own) == 9 * shape[0] + 2 + 1 + 8
    written = transfer.export(part_of(shapes, sizes), P.describe(template), {}, {}, None).infos
    assert written == {key: (shape, np.dtype(np.float32)) for key, shape in shapes.items()}


BAD = [
    ({"model_type": "llama"}, "model_type='llama'"),
    ({"vq_config": {"projection_dim": 7}}, "vq_config.projection_dim=7 must be"),
    ({"vq_config": {"hidden_act": "relu"}}, "vq_config.hidden_act='relu'"),
    ({"vision_config": {"num_image_tokens": 5}}, "num_image_tokens=5 is not the 6x6"),
]


@pytest.mark.parametrize(("change", "words"), BAD, ids=str)
def test_a_config_that_is_not_computed(pair, change, words):
    config = pair[0].config.to_dict()
    for key, value in change.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=r"^here: ") as error:
        JanusConfig.from_hf(config, "here")
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("section", ["vision_config", "vq_config"])
@pytest.mark.parametrize("value", [None, "2", 0])
def test_sizes_that_are_no_numbers_are_named(section, value):
    keys = {"vision_config": VISION_DEFAULTS, "vq_config": VQ_DEFAULTS}[section].keys()
    for key in keys - {"hidden_act"}:
        config = {"model_type": "janus", section: {key: value}}
        with pytest.raises(UserError, match=f"{section}.{key}={value!r}; expected a whole number"):
            JanusConfig.from_hf(config)
