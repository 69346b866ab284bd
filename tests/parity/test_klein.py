"""FLUX.2 klein as a whole against diffusers': texts, pictures, training."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import Flux2KleinPipeline

import jaxft
from tests.parity.flow import PROMPTS, Both, Oracle, assert_equals_torch, draw, trained
from tests.parity.test_diffusion_training import slow
from tests.parity.twins import ExactSinusoids
from tests.tiny_diffusion import make_pictures
from tests.tiny_klein import make_klein

pytestmark = pytest.mark.usefixtures("one_thread")
MADE = {
    "base": {},
    "distilled": {"kind": "distilled"},
    "static": {"dynamic": False},
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = Both(tmp_path_factory.mktemp(kind), make_klein(**MADE[kind]))
        return made[kind]

    return get


def encode(pipe, words):
    return pipe.encode_prompt(words, device="cpu")[:1]


def velocity(pipe, latents, sigma, context):
    """diffusers' transformer on latents [B, C, Y, X], as the pipeline calls it."""
    cells = pipe._patchify_latents(latents)
    places, words = pipe._prepare_latent_ids(cells), pipe._prepare_text_ids(context)
    packed = pipe._pack_latents(cells)
    out = pipe.transformer(packed, context, sigma, places, words, return_dict=False)[0]
    return pipe._unpatchify_latents(pipe._unpack_latents_with_ids(out, places, *cells.shape[2:]))


@pytest.mark.parametrize("kind", MADE)
def test_t32_texts_and_pictures_are_those_of_the_pipeline(both, kind):
    one = both(kind)
    noise = np.random.default_rng(0).standard_normal((2, 6, 8, 4)).astype(np.float32)

    text, null, made = draw(one, noise, 4.0)
    with torch.no_grad():
        wanted = [encode(one.pipe, list(words))[0] for words in (PROMPTS, ["", ""])]
    for found, oracle in zip((text, null), wanted, strict=True):
        assert found.context.shape == (2, 512, 24)  # pads have states too
        np.testing.assert_allclose(found.context, oracle, atol=2e-5)
    latents = one.pipe._patchify_latents(torch.tensor(noise).permute(0, 3, 1, 2))
    drawn = one.pipe(
        prompt=list(PROMPTS), num_inference_steps=4, guidance_scale=4.0, height=12, width=16,
        latents=latents, output_type="pt",
    ).images  # fmt: skip
    np.testing.assert_allclose(made / 2 + 0.5, drawn.permute(0, 2, 3, 1), atol=1e-4)
    assert drawn.std() > 0.01


def test_t32_captions_are_a_turn_of_a_chat_that_may_not_think_and_pads_count(both):
    one = both("base")
    ids = one.captions("a red fish")[0]
    tokenizer = one.pipe.tokenizer
    assert tokenizer.decode(ids[ids >= 0]) == (
        "<|im_start|>user\na red fish<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert len(ids) == 512 and set(ids[ids < 0]) == {-1 - tokenizer.pad_token_id}
    latents = np.random.default_rng(0).standard_normal((1, 8, 8, 4)).astype(np.float32)
    given = torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor([0.5])
    with torch.no_grad():
        (context,) = encode(one.pipe, ["a red fish"])
        whole = velocity(one.pipe, *given, context)
        cut = velocity(one.pipe, *given, context[:, : (ids >= 0).sum()])
    assert (whole - cut).abs().max() > 1e-3
    assert one.captions.too_long(["a fish", "x" * 900]) == 1


def test_the_distilled_variant_is_told_by_the_index_and_says_what_that_means(both):
    base, distilled = both("base").cfg, both("distilled").cfg
    assert base.describe() == "FLUX.2 klein, flow matching" and base.drawing == (50, 4.0)
    assert base.free_guidance and not distilled.free_guidance
    assert "distilled to 4 steps" in distilled.describe() and "\n" not in distilled.describe()
    assert distilled.drawing == (4, 1.0) and base.multiple == 4


def test_it_loads_as_a_python_object(both, monkeypatch):
    one = both("base")
    exact = ExactSinusoids()
    monkeypatch.setattr(one.pipe.transformer.time_guidance_embed.time_proj, "forward", exact)
    loaded = jaxft.load(str(one.folder))
    latents = np.random.default_rng(0).standard_normal((2, 8, 8, 4)).astype(np.float32)
    sigma = np.array([0.9, 0.25], np.float32)
    made = loaded(jnp.asarray(latents), jnp.asarray(sigma), PROMPTS)
    channels_first = torch.tensor(latents).permute(0, 3, 1, 2)
    with torch.no_grad():
        text = encode(one.pipe, list(PROMPTS))
        wanted = velocity(one.pipe, channels_first, torch.tensor(sigma), *text)
    np.testing.assert_allclose(made, wanted.permute(0, 2, 3, 1), atol=5e-5)
    pictures = loaded.sample(PROMPTS, steps=2, size=16)
    assert pictures.shape == (2, 16, 16, 3) and pictures.std() > 1


def scaled(pipe, posterior, eps):
    """The mode of the posterior, as in diffusers' script, normalised by the VAE's statistics."""
    del eps
    bn = pipe.vae.bn
    mean, var = (x[:, None, None] for x in (bn.running_mean, bn.running_var))
    cells = pipe._patchify_latents(posterior.mode())
    return pipe._unpatchify_latents(
        (cells - mean) / torch.sqrt(var + pipe.vae.config.batch_norm_eps)
    )


# to_out alone would match a ModuleList of the first blocks.
PEFT = r".*\.attn\.(to_q|to_k|to_v|to_out\.0|to_qkv_mlp_proj)|single_.*\.attn\.to_out"
CASES = {
    "full": {"micro_batches": 2},
    "lora": {"lora.rank": 4, "lora.alpha": 6.0},  # with the default targets
}


@pytest.mark.parametrize(
    ("case", "mesh"), [("full", "2x2x2"), ("lora", "one"), slow("full", "fsdp8")]
)
def test_five_steps_equal_torch(both, tmp_path, capfd, monkeypatch, case, mesh):
    one, data = both("base"), make_pictures(tmp_path / "pictures")
    changes = {**CASES[case], "caption_dropout": 0.3}
    ours = trained(one.folder, data, changes, mesh, tmp_path, monkeypatch)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    pipe = Flux2KleinPipeline.from_pretrained(one.folder)
    pipe.transformer.time_guidance_embed.time_proj = ExactSinusoids()
    oracle = Oracle(pipe, ours.run, ours.before, PEFT, encode, velocity, scaled)
    still = assert_equals_torch(ours, oracle)
    assert {"vae.bn.running_mean", "vae.bn.running_var"} <= still
