"""Exports of a diffusion run, with diffusers 0.42 as the judge: its image is jaxft's own."""

import json
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)
from PIL import Image
from safetensors import safe_open

from jaxft import export, train
from jaxft.core.params import bind
from jaxft.models.pipelines import stable_diffusion
from jaxft.models.pipelines.stable_diffusion import Guidance
from jaxft.noise.samplers import SAMPLERS
from jaxft.runs.folders.outputs import MARK
from jaxft.runs.pages.card import BASE_CARD, CARD
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders.diffusers import legacy_part, open_pipeline, part
from tests import whole as runs
from tests.tiny_pipelines import make_pipeline

pytestmark = pytest.mark.usefixtures("quick")
CONFIG = str(Path(__file__).resolve().parents[3] / "configs" / "diffusion.py")
PIPELINES = {"sd": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline}
SCHEDULERS = {
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
}
PROMPTS = ["a red cat", "two blue birds, one of them asleep"]
STEPS, GUIDANCE, SIDE = 6, 3.0, 16
LORA = {
    "trainable": "",
    "lora.rank": 4,
    "lora.alpha": 6.0,
    "lora.targets": r"unet\..*(to_(q|k|v|out)|conv1)|text_encoder(_2)?\.layers\..*",
}
FULL = {
    "trainable": r"(unet|text_encoder)\..*",
    "prediction": "v_prediction",
    "zero_snr": True,
    "optim.ema": 0.9,
}
CASES = {"sd-full": ("sd", FULL), "sd-lora": ("sd", LORA), "sdxl-lora": ("sdxl", LORA)}


class Done(NamedTuple):
    """A finished run of two steps, its source, and the pipeline's class."""

    family: str
    source: Path
    work: Path

    @property
    def cls(self):
        return PIPELINES[self.family]

    @property
    def out(self):
        return self.work / "export"


def make_data(folder, count=8):
    folder.mkdir(parents=True)
    rng, rows = np.random.default_rng(0), []
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), np.uint8)).save(folder / f"{i}.png")
        rows.append(json.dumps({"file_name": f"{i}.png", "text": f"picture {i}"}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    return folder


def arguments(source, data, work, changes):
    """The command line of a tiny run."""
    base = {
        "model": source,
        "data.train": f"folder:{data}",
        "data.eval": "",
        "resolution": SIDE,
        "batch_size": 2,
        "cache": "",
        "eval_generated": 0,
        "total": "2_steps",
        "optim.lr": 0.05,
        "optim.warmup": "0_steps",
        "optim.schedule": "constant",
        "compute_dtype": "float32",
        "remat": "none",
    }
    flags = [f"--config.{key}={value}" for key, value in {**base, **changes}.items()]
    return ["--config", CONFIG, "--workdir", str(work), *flags]


def train_case(name, place):
    """One of CASES trained for two steps and exported whole, in a new folder `place`."""
    family, changes = CASES[name]
    make_pipeline(place, family).save_pretrained(place / "pipe")
    data = make_data(place / "data")
    more = {"export.kind": "all", "data.eval": f"folder:{data}", **changes}
    assert train.main(arguments(place / "pipe", data, place / name, more)) == 0
    return Done(family, place / "pipe", place / name)


@pytest.fixture(scope="module", params=CASES)
def done(request, tmp_path_factory):
    return train_case(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def drawn(done):
    """{sampler: what jaxft draws from `noise` with the run's last checkpoint, in [0, 1]}."""
    run, params, step = runs.restore_run(done.work, None)
    assert step == 2
    task, params = run, {path: np.asarray(x) for path, x in params.items()}
    ids = np.stack([task.opened.captions(prompt) for prompt in PROMPTS])
    start = noise().transpose(0, 2, 3, 1)

    @jax.jit
    def draw(params, sampler):
        model = bind(task.opened.template, params)
        text = model.encode_text(ids, dtype=task.opened.dtype)
        null = jax.tree.map(
            lambda x: jax.numpy.repeat(x, len(ids), axis=0), task.objective.null(model)
        )
        cfg, guidance = task.opened.model_cfg, Guidance(GUIDANCE)
        return stable_diffusion.generate(
            model, cfg, text, null, start, sampler, guidance, task.opened.dtype
        )

    samplers = {
        name: make(task.opened.model_cfg.schedule, STEPS) for name, make in SAMPLERS.items()
    }
    return {name: np.asarray(draw(params, one)) / 2 + 0.5 for name, one in samplers.items()}


def noise():
    return np.random.default_rng(1).normal(size=(2, 4, 8, 8)).astype(np.float32)


def draw_torch(pipe, sampler="ddim"):
    """What diffusers draws from `noise`, (2, Y, X, 3) in [0, 1]."""
    pipe.scheduler = SCHEDULERS[sampler].from_config(pipe.scheduler.config)
    pipe.set_progress_bar_config(disable=True)
    made = pipe(
        PROMPTS,
        height=SIDE,
        width=SIDE,
        latents=torch.tensor(noise()),
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        output_type="np",
    )
    return made.images


def state(pipe):
    """Every tensor of a pipeline by component and key."""
    modules = {name: x for name, x in pipe.components.items() if isinstance(x, torch.nn.Module)}
    return {
        f"{n}.{key}": t for n, module in modules.items() for key, t in module.state_dict().items()
    }


def files(folder):
    """Every file by its relative path, but the mark of an export and the cards."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    found = (path for path in found if path.name not in (MARK, CARD, BASE_CARD))
    return {str(path.relative_to(folder)): path for path in found}


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_the_exported_folder_gives_the_image_that_jaxft_gives(done, drawn, sampler):
    made = draw_torch(done.cls.from_pretrained(done.out), sampler)
    assert np.abs(made - drawn[sampler]).max() < 1e-3
    before = draw_torch(done.cls.from_pretrained(done.source), sampler)
    assert np.abs(made - before).max() > 1e-2, "training changed what is drawn"


def test_the_single_file_holds_the_folders_tensors(done):
    whole = state(done.cls.from_pretrained(done.out))
    file = str(done.out / f"{done.work.name}.safetensors")
    single = done.cls.from_single_file(file, config=str(done.out), local_files_only=True)
    assert whole.keys() == state(single).keys()
    assert all(torch.equal(tensor, whole[key]) for key, tensor in state(single).items())
    with safe_open(file, "np") as opened:
        stated, keys = opened.metadata(), set(opened.keys())
    full = "full" in done.work.name
    assert ({"v_pred", "ztsnr"} & keys == {"v_pred", "ztsnr"}) == full
    assert stated["modelspec.prediction_type"] == ("v" if full else "epsilon")
    assert stated["modelspec.title"] == done.work.name and stated["format"] == "pt"
    assert stated["modelspec.resolution"] == "16x16"


def test_a_lora_in_either_format_gives_the_merged_image(done, tmp_path):
    folder = done.out / "lora"
    if "lora" not in done.work.name:
        assert not folder.exists()
        return
    names = ["pytorch_lora_weights.safetensors", f"{done.work.name}.kohya.safetensors"]
    assert sorted(files(folder)) == sorted(names)
    merged = draw_torch(done.cls.from_pretrained(done.out))
    for name in names:
        pipe = done.cls.from_pretrained(done.source)
        pipe.load_lora_weights(str(folder), weight_name=name)
        assert np.abs(draw_torch(pipe) - merged).max() < 1e-3, name
    with safe_open(folder / names[1], "np") as opened:
        stated = opened.metadata()
    assert stated["ss_network_dim"] == "4" and stated["ss_network_alpha"] == "6.0"
    assert stated["modelspec.architecture"].endswith("/lora")
    out = tmp_path / "again"
    command = ["--workdir", str(done.work), "--kind", "lora", "--out", str(out)]
    assert export.main(command) == 0
    peft = [place / names[0] for place in (folder, out)]
    assert peft[0].read_bytes() == peft[1].read_bytes()
    assert sorted(files(out)) == ["again.kohya.safetensors", names[0]]


def test_only_what_changed_is_written_anew(done):
    """The VAE's and the tokenizers' files are the source's; configs too, but for the schedule."""
    source, out = files(done.source), files(done.out)
    lora = "lora" in done.work.name
    changed = {name for name in source if out[name].read_bytes() != source[name].read_bytes()}
    weights = {"unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    if done.family == "sdxl":
        weights |= {"text_encoder_2/model.safetensors"}
    assert changed - {"model_index.json"} == weights | (
        set() if lora else {"scheduler/scheduler_config.json"}
    )
    before, after = (
        json.loads(f["scheduler/scheduler_config.json"].read_text()) for f in (source, out)
    )
    zero = {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    }
    assert after == (before if lora else {**before, **zero})
    assert "tokenizer/vocab.json" in out and (done.out / CARD).is_file()


def test_export_writes_any_kind_of_a_finished_run(done, tmp_path):
    out = tmp_path / "mine"
    command = ["--workdir", str(done.work), "--kind", "single_file", "--out", str(out)]
    assert export.main(command) == 0
    weights = [name for name in files(out) if name.endswith(".safetensors")]
    assert weights == ["mine.safetensors"] and "from_single_file" in (out / CARD).read_text()
    ours, theirs = (
        TensorFiles.open(file)
        for file in (out / "mine.safetensors", done.out / f"{done.work.name}.safetensors")
    )
    assert list(ours.keys()) == list(theirs.keys())
    assert all(ours.read(key).tobytes() == theirs.read(key).tobytes() for key in ours.keys())  # noqa: SIM118
    pipe = done.cls.from_single_file(
        str(out / "mine.safetensors"), config=str(out), local_files_only=True
    )
    assert state(pipe).keys() == state(done.cls.from_pretrained(done.out)).keys()
    # It is a model for jaxft too: untrained, it gives the folder back that lay beside it.
    again = tmp_path / "again"
    changes = {"total": "0_steps", "trainable": r"unet\..*"}
    data = done.source.parent / "data"
    assert train.main(arguments(out / "mine.safetensors", data, again, changes)) == 0
    first, second = (state(done.cls.from_pretrained(x)) for x in (done.out, again / "export"))
    assert first.keys() == second.keys()
    assert all(torch.equal(tensor, second[key]) for key, tensor in first.items())


TEXT_TOO = r"(unet|text_encoder)\..*"
SHAPES = [("sd", None, TEXT_TOO), ("sd", torch.float16, r"unet\..*"), ("sdxl", None, "lora")]


@pytest.mark.parametrize(("family", "dtype", "trainable"), SHAPES, ids=str)
def test_zero_steps_give_the_source_bitwise(tmp_path, family, dtype, trainable):
    """Once from transformers 5's layout, tensor by tensor; then from ours, byte by byte."""
    make_pipeline(tmp_path, family).to(dtype=dtype).save_pretrained(tmp_path / "pipe")
    data, source = make_data(tmp_path / "data"), tmp_path / "pipe"
    changes = {"total": "0_steps", "export.kind": "folder", "trainable": trainable}
    changes |= LORA if trainable == "lora" else {}
    outs = []
    for model, name in ((source, "first"), (tmp_path / "first/export", "second")):
        assert train.main(arguments(model, data, tmp_path / name, changes)) == 0
        outs.append(tmp_path / name / "export")
    theirs, ours = (open_pipeline(str(folder)) for folder in (source, outs[0]))
    for component in theirs.components:
        old, new = (legacy_part(part(x, component, ((), {}))).tensors for x in (theirs, ours))
        assert sorted(old.keys()) == sorted(new.keys())
        for key in old.keys():  # noqa: SIM118
            assert old.info(key) == new.info(key), key
            assert old.read(key).tobytes() == new.read(key).tobytes(), key
    for name, path in files(source).items():
        if not name.endswith(".safetensors") and name != "model_index.json":
            assert files(outs[0])[name].read_bytes() == path.read_bytes(), name
    assert files(outs[0]).keys() == files(outs[1]).keys()
    for name, path in files(outs[0]).items():
        assert files(outs[1])[name].read_bytes() == path.read_bytes(), name


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.rank": 0}, "needs lora.rank > 0"),
        ({**LORA, "lora.targets": r"unet\.add_embedding.*|unet\..*to_q"}, "add_embedding.linear_1"),
        ({**LORA, "trainable": r"unet\..*"}, "would leave out"),
        ({"export.kind": "merged"}, "single_file"),
    ],
    ids=["no rank", "unread", "more than adapters", "kind"],
)
def test_what_a_lora_file_cannot_hold_is_refused(tmp_path, changes, words, capsys):
    make_pipeline(tmp_path, "sdxl").save_pretrained(tmp_path / "pipe")
    data, work = make_data(tmp_path / "data"), tmp_path / "run"
    more = {"total": "0_steps", "export.kind": "lora", **changes}
    assert train.main(arguments(tmp_path / "pipe", data, work, more)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert words in error and not (work / "export").exists()
