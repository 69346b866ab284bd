"""FLUX.1 as a whole against diffusers': texts, pictures, training."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import FluxPipeline

import jaxft
from jaxft.core.params import bind
from jaxft.models.pipelines.flow.flux import TRAIN_GUIDANCE
from jaxft.models.pipelines.stable_diffusion import Guidance, generate
from tests.parity.flow import PROMPTS, Both, Oracle, assert_equals_torch, trained
from tests.parity.test_diffusion_training import slow
from tests.tiny_diffusion import make_pictures
from tests.tiny_flux import LENGTHS, make_flux

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            work = tmp_path_factory.mktemp(kind)
            made[kind] = Both(work, make_flux(work, kind))
        return made[kind]

    return get


@pytest.mark.parametrize("kind", LENGTHS)
def test_t06_t21_texts_and_pictures_are_those_of_the_pipeline(both, kind):
    """dev has a shift by tokens and guidance 3.5. schnell has neither, and 256 tokens for T5."""
    one = both(kind)
    noise = np.random.default_rng(0).standard_normal((2, 6, 8, 4)).astype(np.float32)
    ids = one.ids(PROMPTS)
    how = Guidance(one.cfg.drawing.guidance)

    @jax.jit
    def draw(params):
        model = bind(one.template, params)
        text = model.encode_text(jnp.asarray(ids), dtype=jnp.float32)
        sampler = one.cfg.process().sampler("euler", 4, noise.shape[1:3])
        return text, generate(model, one.cfg, text, text, noise, sampler, how, jnp.float32)

    text, made = draw(one.params)
    context, pooled = encode(one.pipe, PROMPTS, LENGTHS[kind])
    assert text.context.shape == (2, LENGTHS[kind], 48)
    np.testing.assert_allclose(text.context, context, atol=1e-4)  # sums over 512 keys
    np.testing.assert_allclose(text.pooled, pooled, atol=2e-5)
    latents = FluxPipeline._pack_latents(torch.tensor(noise).permute(0, 3, 1, 2), 2, 4, 6, 8)
    drawn = one.pipe(
        PROMPTS, num_inference_steps=4, guidance_scale=how.scale, height=12, width=16,
        max_sequence_length=LENGTHS[kind], latents=latents, output_type="pt",
    ).images  # fmt: skip
    np.testing.assert_allclose(made / 2 + 0.5, drawn.permute(0, 2, 3, 1), atol=1e-4)
    assert drawn.std() > 0.01


def test_t18_guidance_is_an_input_of_dev_alone_and_costs_no_second_pass(both):
    noise = np.random.default_rng(0).standard_normal((1, 4, 4, 4)).astype(np.float32)

    def picture(one, scale):
        def draw(params):
            model = bind(one.template, params)
            text = model.encode_text(jnp.asarray(one.captions("bread"))[None], dtype=jnp.float32)
            sampler = one.cfg.process().sampler("euler", 1, (4, 4))
            how = Guidance(scale)
            return generate(model, one.cfg, text, None, noise, sampler, how, jnp.float32)

        return np.asarray(jax.jit(draw)(one.params))

    dev, schnell = both("dev"), both("schnell")
    assert np.abs(picture(dev, 1.0) - picture(dev, 3.5)).max() > 1e-4
    np.testing.assert_array_equal(picture(schnell, 1.0), picture(schnell, 3.5))


def test_defaults_and_description_are_those_of_the_kind(both):
    dev, schnell = both("dev").cfg, both("schnell").cfg
    assert dev.drawing == (28, 3.5) and schnell.drawing == (4, 0.0)
    assert dev.describe() == "FLUX.1 with guidance as an input, flow matching"
    assert "distilled to 4 steps" in schnell.describe() and "\n" not in schnell.describe()


@pytest.mark.parametrize("kind", LENGTHS)
def test_it_loads_as_a_python_object(both, kind):
    one = both(kind)
    loaded = jaxft.load(str(one.folder))
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    sigma = np.array([0.9, 0.25], np.float32)
    made = loaded(jnp.asarray(latents), jnp.asarray(sigma), PROMPTS)
    channels_first = torch.tensor(latents).permute(0, 3, 1, 2)
    with torch.no_grad():
        context, pooled = encode(one.pipe, PROMPTS, LENGTHS[kind])
        wanted = velocity(one.pipe, channels_first, torch.tensor(sigma), context, pooled)
    np.testing.assert_allclose(made, wanted.permute(0, 2, 3, 1), atol=5e-5)
    pictures = loaded.sample(PROMPTS, steps=2, size=16)
    assert pictures.shape == (2, 16, 16, 3) and pictures.std() > 1


def velocity(pipe, latents, sigma, context, pooled, guidance=TRAIN_GUIDANCE):
    """diffusers' transformer on latents [B, C, Y, X], packed as the pipeline packs them."""
    rows, channels, y, x = latents.shape
    takes = pipe.transformer.config.guidance_embeds
    out = pipe.transformer(
        FluxPipeline._pack_latents(latents, rows, channels, y, x),
        timestep=sigma,
        guidance=torch.full_like(sigma, guidance) if takes else None,
        encoder_hidden_states=context,
        pooled_projections=pooled,
        txt_ids=torch.zeros(context.shape[1], 3),
        img_ids=FluxPipeline._prepare_latent_image_ids(rows, y // 2, x // 2, "cpu", context.dtype),
    ).sample
    return FluxPipeline._unpack_latents(out, 2 * y, 2 * x, 2)


def encode(pipe, words, tokens):
    with torch.no_grad():
        return pipe.encode_prompt(words, device="cpu", max_sequence_length=tokens)[:2]


# The targets of diffusers' train_dreambooth_lora_flux: ends of names, so single blocks are in.
PEFT = [
    *("attn.to_k", "attn.to_q", "attn.to_v", "attn.to_out.0", "attn.to_add_out"),
    *("attn.add_k_proj", "attn.add_q_proj", "attn.add_v_proj"),
    *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
]
LORA = {"lora.rank": 4, "lora.alpha": 6.0}  # with the default targets
CASES = {"full": ("dev", {"micro_batches": 2}), "lora": ("schnell", LORA)}


@pytest.mark.parametrize(
    ("case", "mesh"), [("full", "2x2x2"), ("lora", "one"), slow("full", "fsdp8")]
)
def test_five_steps_equal_torch(both, tmp_path, capfd, monkeypatch, case, mesh):
    kind, changes = CASES[case]
    one, data = both(kind), make_pictures(tmp_path / "pictures")
    ours = trained(one.folder, data, changes, mesh, tmp_path, monkeypatch)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    pipe, texts = FluxPipeline.from_pretrained(one.folder), partial(encode, tokens=LENGTHS[kind])
    assert_equals_torch(ours, Oracle(pipe, ours.run, ours.before, PEFT, texts, velocity))
