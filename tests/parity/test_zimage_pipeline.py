"""Z-Image as a whole against diffusers': texts, pictures, training."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import ZImagePipeline

import jaxft
from tests.parity.flow import PROMPTS, Both, Oracle, assert_equals_torch, draw, trained
from tests.parity.test_diffusion_training import slow
from tests.parity.twins import ExactSinusoids
from tests.tiny_diffusion import make_pictures
from tests.tiny_zimage import make_zimage

pytestmark = pytest.mark.usefixtures("one_thread")
LONG = "two birds by the sea, far away, " * 20  # more than 512 tokens


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    made = {}

    def get(kind):
        if kind not in made:
            made[kind] = Both(tmp_path_factory.mktemp(kind), make_zimage(kind))
        return made[kind]

    return get


@pytest.mark.parametrize("kind", ["base", "dynamic"])
def test_t25_t28_texts_and_pictures_are_those_of_the_pipeline(both, kind):
    """A guidance of 4 there is one of 5 here."""
    one = both(kind)
    noise = np.random.default_rng(0).standard_normal((2, 6, 8, 4)).astype(np.float32)

    text, null, made = draw(one, noise, 5.0)
    with torch.no_grad():
        wanted = one.pipe.encode_prompt(list(PROMPTS), device="cpu")
    for found, oracle in zip((text, null), wanted, strict=True):
        np.testing.assert_array_equal(found.lengths, [len(x) for x in oracle])
        for row, length, theirs in zip(found.context, found.lengths, oracle, strict=True):
            np.testing.assert_allclose(row[:length], theirs, atol=2e-5)
    drawn = one.pipe(
        list(PROMPTS), num_inference_steps=4, guidance_scale=4.0, height=12, width=16,
        latents=torch.tensor(noise).permute(0, 3, 1, 2), output_type="pt",
    ).images  # fmt: skip
    np.testing.assert_allclose(made / 2 + 0.5, drawn.permute(0, 2, 3, 1), atol=1e-4)
    assert drawn.std() > 0.01


def test_t28_captions_are_a_turn_of_a_chat_that_may_think_and_are_cut(both):
    one = both("base")
    ids = one.captions("a red fish")[0]
    tokenizer = one.pipe.tokenizer
    assert tokenizer.decode(ids[ids >= 0]) == (
        "<|im_start|>user\na red fish<|im_end|>\n<|im_start|>assistant\n"
    )
    assert set(ids[ids < 0]) == {-1 - tokenizer.pad_token_id} and len(ids) == 512
    cut = one.captions(LONG)[0]
    with torch.no_grad():
        (wanted,), _ = one.pipe.encode_prompt([LONG], device="cpu")
    assert (cut >= 0).all() and len(wanted) == 512
    assert one.captions.too_long([LONG, "a fish", "x" * 493, "x" * 494]) == 2


def test_turbo_is_named_by_its_shift_and_says_what_that_means(both):
    base, turbo = both("base").cfg, both("turbo").cfg
    assert base.describe() == "Z-Image, flow matching" and base.drawing == (50, 5.0)
    assert "Z-Image-Turbo" in turbo.describe() and "\n" not in turbo.describe()
    assert "distilled to 8 steps" in turbo.describe() and turbo.drawing == (9, 1.0)


def test_it_loads_as_a_python_object(both, monkeypatch):
    one = both("base")
    monkeypatch.setattr(one.pipe.transformer.t_embedder, "timestep_embedding", exact)
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


def exact(t, dim):
    return ExactSinusoids()(t)


def encode(pipe, words):
    return pipe.encode_prompt(words, device="cpu", do_classifier_free_guidance=False)[:1]


def velocity(pipe, latents, sigma, texts):
    """diffusers' transformer on latents [B, C, Y, X], as the pipeline calls it."""
    made = pipe.transformer(list(latents[:, :, None]), 1 - sigma, texts, return_dict=False)[0]
    return -torch.stack(made)[:, :, 0]


PEFT = ["to_q", "to_k", "to_v", "to_out.0"]
CASES = {
    "full": {"micro_batches": 2},
    "lora": {"lora.rank": 4, "lora.alpha": 6.0},  # with the default targets
}


@pytest.mark.parametrize(
    ("case", "mesh"), [("full", "2x2x2"), ("lora", "one"), slow("full", "fsdp8")]
)
def test_five_steps_equal_torch(both, tmp_path, capfd, monkeypatch, case, mesh):
    one, data = both("base"), make_pictures(tmp_path / "pictures")
    ours = trained(one.folder, data, CASES[case], mesh, tmp_path, monkeypatch)
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    pipe = ZImagePipeline.from_pretrained(one.folder)
    pipe.transformer.t_embedder.timestep_embedding = exact
    # Pads are vectors, which do not decay. Their files have a dim of one row.
    for name in ("x_pad_token", "cap_pad_token"):
        row = getattr(pipe.transformer, name)[0]
        setattr(pipe.transformer, name, torch.nn.Parameter(row.detach().clone()))
    assert_equals_torch(ours, Oracle(pipe, ours.run, ours.before, PEFT, encode, velocity))
