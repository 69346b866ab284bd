"""Textual inversion from the command to the file that diffusers loads, and what is refused."""

import json
import shutil
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open
from safetensors.torch import load_file

from jaxft import export, train
from jaxft.core.params import NEW_TOKEN_ROLE, Leaf, bind
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.stable_diffusion import Guidance
from jaxft.noise.samplers import SAMPLERS
from jaxft.runs.folders.outputs import MARK
from jaxft.runs.pages.card import CARD
from jaxft.tasks.diffusion import inversion
from tests import whole as runs
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("quick")
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
WORD = "<cat-toy>"
PROMPTS = [f"a {WORD} on the moon", f"two birds beside {WORD}, asleep"]
STEPS, GUIDANCE, SIDE = 3, 3.0, 16
RUN = {
    "inversion.token": WORD,
    "inversion.init": "a",
    "trainable": "",
    "optim.lr": 0.05,
    "optim.ema": 0.5,
    "batch_size": 2,
    "total": "4_steps",
    "every.save": "2_steps",
    "eval_examples": 2,
    "compute_dtype": "float32",
}
CASES = {
    "sd": ("sd", {"export.kind": "inversion"}),
    "sdxl": ("sdxl", {"export.kind": "folder", "inversion.vectors": 3}),
}


class Done(NamedTuple):
    """A finished run: its pipeline's class and folder, its command line and its own folder."""

    cls: Any
    source: Any
    flags: list
    work: Any

    @property
    def out(self):
        return self.work / "export"


def saved_pipeline(place, family):
    """A pipeline as the published ones are: its end token is the one of a legacy config."""
    pipe = make_pipeline(place, family)
    for name in ("text_encoder", "text_encoder_2"):
        if hasattr(pipe, name):
            getattr(pipe, name).config.eos_token_id = 2
    pipe.save_pretrained(place / "pipe")
    return place / "pipe"


@pytest.fixture(scope="module", params=["sd", pytest.param("sdxl", marks=pytest.mark.slow)])
def done(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    family, changes = CASES[request.param]
    source = saved_pipeline(place, family)
    pictures = make_pictures(place / "pictures", 6, word=WORD)
    flags = flags_of(source, pictures, {**RUN, "cache": place / "cache", **changes})
    assert train.main([*flags, "--workdir", str(place / "run")]) == 0
    return Done(PIPELINES[family], source, flags, place / "run")


def files(folder):
    """Every file by its relative path, but the mark and the card of an export."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = (path for path in found if path.name not in (MARK, CARD))
    return {str(path.relative_to(folder)): path for path in found}


def draw_jax(work, noise):
    """What jaxft draws with a run's averaged weights, in [0, 1]."""
    run, params, step = runs.restore_run(work, None)
    task, params = run, {path: np.asarray(x) for path, x in params.items()}
    ids = np.stack([task.opened.captions(prompt) for prompt in PROMPTS])
    assert step == 4
    sampler = SAMPLERS["ddim"](task.opened.model_cfg.schedule, STEPS)

    @jax.jit
    def draw(params, start):
        model = bind(task.opened.template, params)
        text = model.encode_text(ids, dtype=task.opened.dtype)
        null = jax.tree.map(
            lambda x: jax.numpy.repeat(x, len(ids), axis=0), task.objective.null(model)
        )
        return stable_diffusion.generate(
            model,
            task.opened.model_cfg,
            text,
            null,
            start,
            sampler,
            Guidance(GUIDANCE),
            task.opened.dtype,
        )

    return np.asarray(draw(params, noise.transpose(0, 2, 3, 1))) / 2 + 0.5


def draw_torch(pipe, noise):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    latents = torch.tensor(noise)
    made = pipe(
        PROMPTS, height=SIDE, width=SIDE, latents=latents, num_inference_steps=STEPS,
        guidance_scale=GUIDANCE, output_type="np",
    )  # fmt: skip
    return made.images


def without_prefix(file):
    return {key.removeprefix("text_model."): x for key, x in load_file(file).items()}


def load_word(pipe, folder):
    """As diffusers' documentation has it, for one text encoder and for SDXL's two."""
    if not hasattr(pipe, "text_encoder_2"):
        pipe.load_textual_inversion(str(folder))
        return
    rows = load_file(folder / "learned_embeds.safetensors")
    for key, end in {"clip_l": "", "clip_g": "_2"}.items():
        tokenizer, encoder = (getattr(pipe, n + end) for n in ("tokenizer", "text_encoder"))
        pipe.load_textual_inversion(
            rows[key], token=WORD, tokenizer=tokenizer, text_encoder=encoder
        )


def test_diffusers_draws_the_same_picture_with_the_file(done):
    noise = np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)
    pipe = done.cls.from_pretrained(done.source)
    before = draw_torch(pipe, noise)
    load_word(pipe, done.out)
    after = draw_torch(pipe, noise)
    assert np.abs(after - draw_jax(done.work, noise)).max() < 1e-3
    assert np.abs(after - before).max() > 0.01, "the word changes nothing"


def test_the_file_holds_the_rows_alone(done):
    with safe_open(done.out / "learned_embeds.safetensors", "np") as opened:
        about = opened.metadata()
        rows = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118
    assert about["token"] == WORD and about["init"] == "a" and about["format"] == "pt"
    shapes = {key: (x.shape, x.dtype) for key, x in rows.items()}
    f4 = np.dtype("float32")
    if done.cls is StableDiffusionPipeline:
        assert shapes == {WORD: ((1, 16), f4)}
        assert list(files(done.out)) == ["learned_embeds.safetensors"]
        return
    assert shapes == {"clip_l": ((3, 16), f4), "clip_g": ((3, 24), f4)}
    assert not np.array_equal(rows["clip_l"][0], rows["clip_l"][1]), "each row has its place"
    source, out = files(done.source), files(done.out)
    for name, path in source.items():
        if name.startswith("text_encoder") and name.endswith(".safetensors"):
            old, new = without_prefix(path), without_prefix(out[name])  # in the older layout
            assert old.keys() == new.keys()
            assert all(torch.equal(old[key], new[key]) for key in old)
        elif name != "model_index.json":
            assert out[name].read_bytes() == path.read_bytes(), name


def test_only_the_rows_train_and_what_is_cached(done):
    shown = json.loads((done.work / "config.json").read_text())
    run = runs.open_run(shown)
    end = ".inversion.embedding"
    count = len(run.opened.model_cfg.texts)
    assert len(run.chosen) == count and all(path.endswith(end) for path in run.chosen)
    with jax.set_mesh(run.mesh):
        params = runs.load_params(run)
    table = np.asarray(params["text_encoder.token_embedding.embedding"], np.float32)
    rows = np.asarray(params["text_encoder" + end])
    letter = run.opened.captions.ids_of("a")[0]
    assert np.array_equal(rows, np.tile(table[letter], (len(rows), 1)))
    run.encode(params, run.chosen)
    row = run.train[0]
    assert {"mean", "ids"} <= row.keys() and "context" not in row, "captions are encoded anew"


def test_rows_are_fp32_whatever_the_model_is(done):
    config = json.loads((done.work / "config.json").read_text())
    run = runs.open_run({**config, "param_dtype": "bfloat16"})
    with jax.set_mesh(run.mesh):
        wanted = {*run.chosen, "text_encoder.token_embedding.embedding"}
        params = runs.load_params(run, wanted)
        state = runs.abstract_state(run, runs.make_plan(run).tx)
    assert params.pop("text_encoder.token_embedding.embedding").dtype == jax.numpy.bfloat16
    found = {x.dtype for x in (*params.values(), *state.params.values(), *state.ema.values())}
    assert found == {np.dtype("float32")}


def test_a_run_that_goes_on_ends_in_the_same_bits(done, tmp_path, capsys):
    """From a copy whose checkpoint of step 4, and all that came after step 2, is gone."""
    again = tmp_path / "run"
    shutil.copytree(done.work, again)
    shutil.rmtree(again / "checkpoints" / "4")
    shutil.rmtree(again / "export")
    assert train.main([*done.flags, "--workdir", str(again)]) == 0
    assert "resumed from step 2" in capsys.readouterr().out
    name = "learned_embeds.safetensors"
    assert (again / "export" / name).read_bytes() == (done.out / name).read_bytes()


def test_any_step_and_dtype_can_be_exported(done, tmp_path):
    out = tmp_path / "out"
    command = ["--workdir", str(done.work), "--kind=inversion", f"--out={out}", "--step=2"]
    assert export.main([*command, "--dtype=bfloat16"]) == 0
    ours, last = (load_file(folder / "learned_embeds.safetensors") for folder in (out, done.out))
    for key, rows in ours.items():
        assert rows.dtype == torch.bfloat16 and rows.shape == last[key].shape
        assert not torch.equal(rows, last[key].to(torch.bfloat16))


def test_a_lora_beside_a_word_is_written_with_it(place, tmp_path):
    more = {"lora.rank": 2, "total": "0_steps", "data.eval": "", "export.kind": "lora"}
    flags = flags_of(place / "pipe", f"folder:{place / 'pictures'}", {**RUN, **more})
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 0
    names = ["learned_embeds.safetensors", "pytorch_lora_weights.safetensors"]
    assert list(files(tmp_path / "run" / "export")) == [*names, "run.kohya.safetensors"]
    (rows,) = load_file(tmp_path / "run" / "export" / names[0]).values()
    source = StableDiffusionPipeline.from_pretrained(place / "pipe")
    (letter,) = source.tokenizer.encode("a", add_special_tokens=False)
    table = source.text_encoder.get_input_embeddings().weight
    assert torch.equal(rows, table[letter : letter + 1])


def test_keys_of_the_file():
    """`clip_l` and `clip_g` are what common tools read of SDXL; diffusers reads the token."""
    first, second = jax.numpy.ones((2, 3)), jax.numpy.zeros((2, 5))
    params = {"unet.conv_in.kernel": first, "text_encoder.inversion.embedding": first}
    both = {**params, "text_encoder_2.inversion.embedding": second}
    leaves = {
        path: Leaf((), np.float32, (), role="" if path.startswith("unet") else NEW_TOKEN_ROLE)
        for path in both
    }
    made = inversion.learned("<x>", params, leaves)
    assert {key: rows.shape for key, rows in made.items()} == {"<x>": (2, 3)}
    made = inversion.learned("<x>", both, leaves)
    assert {key: rows.shape for key, rows in made.items()} == {"clip_l": (2, 3), "clip_g": (2, 5)}


# ---- mistakes -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    work = tmp_path_factory.mktemp("mistakes")
    saved_pipeline(work, "sd")
    make_pictures(work / "pictures", 6, word=WORD)
    make_pictures(work / "other", 6)
    return work


BARE = {"inversion.token": "", "inversion.init": "", "export.kind": "inversion"}
UNET = {"trainable": r"unet\..*|.*inversion.*", "export.kind": "inversion"}


@pytest.mark.parametrize(
    ("words", "changes"),
    [
        (["inversion.init is empty", WORD], {"inversion.init": ""}),
        (["inversion.init='toy' is not one token", "t o y</w>"], {"inversion.init": "toy"}),
        (["inversion.token='<Cat>'", "small letters"], {"inversion.token": "<Cat>"}),
        (["inversion.token='my cat'", "one word"], {"inversion.token": "my cat"}),
        (["'a</w>' in its vocabulary"], {"inversion.token": "a</w>"}),
        (["inversion.vectors=0", "1 to 64"], {"inversion.vectors": 0}),
        (["6 of 6 captions", "lack <dog>", "a photo of <dog>"], {"inversion.token": "<dog>"}),
        (["trainable='unet", "text_encoder.inversion.embedding"], {"trainable": r"unet\..*"}),
        (["export.kind='inversion' needs inversion.token"], BARE),
        (["export.kind='inversion' would leave out unet.", "'folder'"], UNET),
        (["export.kind='lora' needs lora.rank"], {"export.kind": "lora"}),
        (["inversion.tokens", "inversion.token"], {"inversion.tokens": "a"}),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_mistakes_are_one_line_before_training(place, words, changes, tmp_path, capfd):
    flags = flags_of(place / "pipe", f"folder:{place / 'pictures'}", {**RUN, **changes})
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 2
    error = capfd.readouterr().err.strip().splitlines()
    assert len(error) == 1 and error[0].startswith("jaxft: "), error
    for word in words:
        assert word in error[0], f"{word!r} is not in {error[0]!r}"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
