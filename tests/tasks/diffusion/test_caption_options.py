"""Options of captions: layers of CLIP left out, and captions in several chunks."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from jaxft.core.errors import UserError
from jaxft.core.params import bind, bind_some
from jaxft.objectives.denoising import normal
from jaxft.tasks import Request
from tests import whole as runs
from tests.tiny_diffusion import make_config
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import NO_T5, make_sd3
from tests.tiny_zimage import make_zimage

PROMPTS = ["a red fish", "two birds by the sea"]


@pytest.fixture(scope="module")
def folders(folder, plain, tmp_path_factory):
    work = tmp_path_factory.mktemp("sd3")
    make_sd3(work, t5=False).save_pretrained(work / "folder")
    return {"sd": plain, "sdxl": folder, "sd3": work / "folder"}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda *_: 1)


def opened_run(folder, pictures, **changes):
    run = runs.open_run(make_config(folder, pictures, changes))
    with jax.set_mesh(run.mesh):
        return run, runs.load_params(run)


def texts(run, params, prompts):
    """Embeddings of prompts as a step and a sample make them, and of the null caption."""
    ids = np.stack([run.opened.captions(prompt) for prompt in prompts])

    def encode(params):
        model = bind(run.opened.template, params)
        return run.objective.text(model, {"ids": jnp.asarray(ids)}, None), run.objective.null(model)

    return jax.jit(encode)(params)


def read_pipeline(folder):
    """A pipeline of diffusers 0.42, whose clip_skip of SD 1.x reads a name of transformers 4."""
    given = NO_T5 if (folder / "transformer").exists() else {}
    pipe = DiffusionPipeline.from_pretrained(folder, **given)
    if isinstance(pipe, StableDiffusionPipeline):
        inner = SimpleNamespace(final_layer_norm=pipe.text_encoder.final_layer_norm)
        object.__setattr__(pipe.text_encoder, "text_model", inner)
    return pipe


def torch_texts(folder, prompts, skip):
    """Context, null context, pooled and null pooled of diffusers."""
    pipe = read_pipeline(folder)
    given = (prompts, None, None) if "text_encoder_3" in pipe.components else (prompts,)
    more = {} if len(given) > 1 else {"num_images_per_prompt": 1}
    with torch.no_grad():
        made = pipe.encode_prompt(
            *given, device="cpu", do_classifier_free_guidance=True, clip_skip=skip, **more
        )
    return [x.numpy() for x in made]


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_clip_skip_is_that_of_diffusers(folders, pictures, family, skip):
    """Of captions alone: the null caption of diffusers has all layers."""
    run, params = opened_run(folders[family], pictures, clip_skip=skip)
    text, null = texts(run, params, PROMPTS)
    wanted = torch_texts(folders[family], PROMPTS, skip)
    np.testing.assert_allclose(text.context, wanted[0], atol=1e-5)
    np.testing.assert_allclose(null.context[0], wanted[1][0], atol=1e-5)
    if family != "sd":
        np.testing.assert_allclose(text.pooled, wanted[2], atol=1e-5)
        np.testing.assert_allclose(null.pooled[0], wanted[3][0], atol=1e-5)
    if skip:
        assert np.abs(wanted[0] - torch_texts(folders[family], PROMPTS, None)[0]).max() > 1e-2


def test_a_cache_keeps_each_clip_skip_apart(folders, pictures, tmp_path):
    """One folder for all. The null caption is bit for bit that of a run without clip skip."""
    made = {}
    for skip in (0, 2, 0):
        run, params = opened_run(folders["sd"], pictures, clip_skip=skip, cache=tmp_path)
        caption = run.train.caption(0)
        wanted, null = texts(run, params, [caption])
        run.encode(params)
        stored = run.train.text(caption)["context"]
        np.testing.assert_allclose(stored, wanted.context[0], atol=1e-5)
        assert np.array_equal(run.train.empty_text.context, null.context)
        made.setdefault(skip, []).append((stored, null.context))
    (plain, null), again = made[0]
    assert np.array_equal(plain, again[0]) and np.array_equal(null, made[2][0][1])
    assert np.abs(plain - made[2][0][0]).max() > 1e-2


def test_steps_and_samples_have_the_clip_skip(folders, pictures):
    """A loss with it is the loss of a batch that holds diffusers' embeddings."""
    run, params = opened_run(folders["sd"], pictures, clip_skip=1, caption_dropout=0.0)
    batch = next(run.train.batches(0, slice(0, 8)))
    captions = [run.train.caption(int(i)) for i in batch["sample_ids"]]
    given = {name: x for name, x in batch.items() if name != "ids"}
    given["context"] = torch_texts(folders["sd"], captions, 1)[0]
    keys = jax.vmap(jax.random.key)(np.arange(8))

    @jax.jit
    def loss(params, batch):
        model = bind_some(run.opened.template, params)
        (total, weight), _ = run.objective.loss(model, batch, keys, 0)
        return total / weight

    np.testing.assert_allclose(loss(params, batch), loss(params, given), rtol=1e-5)
    (made,) = run.preview.complete(params, [PROMPTS[0]], Request(sampler="ddim"))
    key = jax.random.fold_in(jax.random.key(0), 0)
    noise = np.asarray(normal(key[None], (8, 8, 4))).transpose(0, 3, 1, 2)
    pipe = read_pipeline(folders["sd"])
    drawn = pipe(
        PROMPTS[0], height=16, width=16, latents=torch.tensor(noise), num_inference_steps=2,
        guidance_scale=4.0, clip_skip=1, output_type="np",
    )  # fmt: skip
    wanted = np.round(255 * drawn.images[0])
    assert np.abs(made.pictures["made"] - wanted).max() <= 1, "null caption: all layers"


@pytest.mark.parametrize(
    ("family", "skip", "words"),
    [
        ("sd", 3, "clip_skip=3 is not between 0 and 2: CLIP has 2 layers"),
        ("sdxl", 2, "clip_skip=2 is not between 0 and 1: CLIP has 2 layers"),
        ("sd", -1, "clip_skip=-1 is not between 0 and 2"),
    ],
)
def test_a_clip_skip_beyond_the_layers(folders, pictures, family, skip, words):
    with pytest.raises(UserError, match=words) as error:
        runs.open_run(make_config(folders[family], pictures, {"clip_skip": skip}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["FLUX.1", "Z-Image"])
def test_a_model_that_reads_no_states_of_clip(pictures, tmp_path, kind):
    pipe = make_flux(tmp_path) if kind == "FLUX.1" else make_zimage()
    pipe.save_pretrained(tmp_path / "folder")
    words = f"clip_skip=1 chooses hidden states of CLIP, which {kind}.* set it to 0"
    with pytest.raises(UserError, match=words) as error:
        runs.open_run(make_config(tmp_path / "folder", pictures, {"clip_skip": 1}))
    assert "\n" not in str(error.value)
