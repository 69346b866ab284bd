"""jaxft.load of every family, beside the libraries that the folders come from."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.numpy import save_file
from transformers import AutoTokenizer, CLIPTextModel, LlamaForCausalLM

import jaxft
from jaxft.api import loading
from jaxft.core.errors import UserError
from jaxft.demo import demo_path
from tests.tiny_autoencoders import make_janus, make_vae
from tests.tiny_janus import make_janus_model
from tests.tiny_pipelines import make_pipeline

EMOJI = "demo:emoji-tokens"


@pytest.fixture(scope="module")
def language_model(make_folder):
    return make_folder(tied=True)


def test_a_language_model_gives_the_logits_and_texts_of_transformers(language_model, quick):
    loaded = jaxft.load(str(language_model))
    stock = LlamaForCausalLM.from_pretrained(language_model).eval()
    assert isinstance(loaded, loading.LoadedDecoder) and loaded.config.vocab_size == 320
    assert set(loaded.params) > {"embed_tokens.embedding", "layers.self_attn.q_proj.kernel"}
    ids = np.random.default_rng(0).integers(3, 320, (2, 9), np.int32)
    with torch.no_grad():
        want = stock(torch.tensor(ids).long()).logits.numpy()
    np.testing.assert_allclose(loaded(ids), want, atol=2e-5)
    prompts = ["a small", "the act of giving"]
    tokenizer = AutoTokenizer.from_pretrained(language_model, padding_side="left")
    batch = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
    made = stock.generate(**batch, max_new_tokens=8, do_sample=False)
    made = made[:, batch["input_ids"].shape[1] :]
    texts = [tokenizer.decode(row, skip_special_tokens=True) for row in made]
    assert loaded.generate(prompts, max_new=8) == texts
    assert loaded.generate(prompts[0], max_new=8) == texts[:1]


def test_draws_depend_on_the_seed_alone_and_parameters_have_the_dtype(language_model, quick):
    loaded = jaxft.load(str(language_model), dtype="bfloat16")
    assert {x.dtype for x in loaded.params.values()} == {jnp.dtype(jnp.bfloat16)}
    made = [loaded.generate("water", max_new=8, temperature=2.0, seed=seed) for seed in (0, 0, 1)]
    assert made[0] == made[1] != made[2]


def test_a_folder_without_a_tokenizer_has_logits_and_says_what_generate_lacks(
    language_model, tmp_path, quick
):
    for name in ("config.json", "model.safetensors"):
        shutil.copy(language_model / name, tmp_path)
    loaded = jaxft.load(str(tmp_path))
    assert loaded.tokenizer is None and loaded(np.ones((1, 3), np.int32)).shape == (1, 3, 320)
    with pytest.raises(UserError, match="no tokenizer beside the weights"):
        loaded.generate("water")


def test_an_image_token_model_of_one_vocabulary(quick):
    loaded = jaxft.load(EMOJI)
    layout = loaded.opened.layout
    assert isinstance(loaded, loading.LoadedImageTokens) and loaded.tokenizer is not None
    ids = np.random.default_rng(0).integers(3, layout.text_vocab, (1, 6), np.int32)
    got = loaded(ids, np.zeros(ids.shape, bool))
    folder = demo_path(EMOJI, "model")
    stock = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        want = stock(torch.tensor(ids).long()).logits.numpy()
    codes = want[..., layout.image_offset : layout.image_offset + layout.codes]
    np.testing.assert_allclose(got, codes, atol=1e-3)
    made = loaded.sample(["red heart", "fire"], temperature=0.0)
    side = layout.grid[0] * loaded.opened.vq.cfg.factor
    assert made.shape == (2, side, side, 3) and made.dtype == np.uint8
    assert (made[0] != made[1]).any()


def test_a_janus_samples_too(tmp_path, quick):
    make_janus_model(tmp_path / "janus")
    loaded = jaxft.load(str(tmp_path / "janus"))
    first, again, other = (
        loaded.sample("a red cat", seed=seed, temperature=1.0)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any() and first.shape[-1] == 3


@pytest.mark.parametrize("make", [make_vae, make_janus])
def test_an_autoencoder_gives_images_back(make, tmp_path, quick):
    folder = make(tmp_path / "model")
    loaded = jaxft.load(str(folder))
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype(np.float32)
    got = loaded(jnp.asarray(images))
    assert isinstance(loaded, loading.LoadedAutoencoder) and got.shape == images.shape
    if make is make_vae:
        stock = AutoencoderKL.from_pretrained(folder).eval()
        with torch.no_grad():
            want = stock(torch.tensor(images).permute(0, 3, 1, 2)).sample.permute(0, 2, 3, 1)
        np.testing.assert_allclose(got, want, atol=1e-4)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    work = tmp_path_factory.mktemp("pipeline")
    make_pipeline(work).save_pretrained(work / "pipeline")
    return work / "pipeline"


def test_a_pipeline_predicts_as_diffusers_and_samples(pipeline, quick):
    loaded = jaxft.load(str(pipeline))
    assert isinstance(loaded, loading.LoadedPipeline)
    latents = np.random.default_rng(0).normal(size=(1, 8, 8, 4)).astype(np.float32)
    got = loaded(jnp.asarray(latents), jnp.array([7.0]), ["a cat"])
    unet = UNet2DConditionModel.from_pretrained(pipeline / "unet").eval()
    text = CLIPTextModel.from_pretrained(pipeline / "text_encoder").eval()
    with torch.no_grad():
        context = text(torch.tensor(loaded.tokenizer("a cat")).long()).last_hidden_state
        want = unet(torch.tensor(latents).permute(0, 3, 1, 2), torch.tensor([7]), context).sample
    np.testing.assert_allclose(got, want.permute(0, 2, 3, 1), atol=1e-4)
    first, again, other = (
        loaded.sample("a cat", size=16, steps=2, seed=seed)[0] for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert first.shape == (16, 16, 3) and (first != other).any()
    with pytest.raises(UserError, match="sampler='plms' is not one of ddim, euler"):
        loaded.sample("a cat", sampler="plms")


def test_a_component_by_itself(pipeline, quick):
    unet, text = (jaxft.load(str(pipeline / name)) for name in ("unet", "text_encoder"))
    assert isinstance(unet, loading.LoadedNetwork) and unet.tokenizer is None
    encoded = text(np.arange(12, dtype=np.int32)[None])
    latents = jnp.zeros((1, 8, 8, 4))
    assert unet(latents, jnp.array([3.0]), encoded.normed).shape == latents.shape


def test_arguments_of_another_type_say_so_in_one_line(tmp_path):
    with pytest.raises(UserError, match="give a path or a hub id"):
        jaxft.load(3)
    with pytest.raises(UserError, match=r"dtype='fp32' is not known; give float32 or bfloat16"):
        jaxft.load("demo:emoji-tokens", "fp32")
    with pytest.raises(UserError, match="no such file or folder"):
        jaxft.load(tmp_path / "absent")


@pytest.mark.parametrize(
    ("prompts", "given", "error"),
    [
        ([], {}, "the prompts are empty; give a text"),
        ([3], {}, "the prompts hold a int; give a text"),
        (3, {}, "the prompts hold a int; give a text"),
        ("a", {"temperature": -1.0}, "temperature=-1.0, top_k=0 and top_p=1.0 are refused"),
        ("a", {"top_p": 0.0}, "top_p above 0 and at most 1"),
    ],
    ids=["none", "number", "alone", "cold", "nothing"],
)
def test_what_cannot_be_sampled_says_so_in_one_line(language_model, prompts, given, error):
    with pytest.raises(UserError, match=error):
        jaxft.load(language_model).generate(prompts, **given)


def test_what_is_no_model_says_so_in_one_line(tmp_path):
    save_file({"x": np.zeros(1, np.float32)}, tmp_path / "model.safetensors")
    for config in ({"model_type": "gemma4"}, {"_class_name": "LuminaTransformer2DModel"}, {}):
        (tmp_path / "config.json").write_text(json.dumps(config))
        known = r"is not supported; (among those )?supported are"
        with pytest.raises(UserError, match=known) as caught:
            jaxft.load(str(tmp_path))
        assert "\n" not in str(caught.value)
