"""Text encoders and VAE are not in memory while steps run on cached rows, nor beside the denoiser.

Held by the arguments of the compiled step (memory_analysis), by what is loaded when, and by the
live arrays of the process.
"""

import json

import jax
import numpy as np
import pytest

from jaxft import train
from jaxft.core.params import bind, bind_some
from jaxft.runs import opening, state
from jaxft.runs.compiling import Compiled
from tests import whole as runs
from tests.tiny_diffusion import flags_of, make_config, make_pictures
from tests.tiny_flux import make_flux
from tests.tiny_klein import make_klein
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import make_sd3
from tests.tiny_zimage import make_zimage

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
MAKERS = {
    "sd": lambda work: make_pipeline(work, "sd"),
    "sdxl": lambda work: make_pipeline(work, "sdxl"),
    "sd3": lambda work: make_sd3(work, True),
    "flux": make_flux,
    "klein": lambda _: make_klein(),
    "zimage": lambda _: make_zimage(),
}
KEPT = {"klein": ("vae.bn.",)}  # what a step scales latents with
DENOISERS = ("unet.", "transformer.")
LORA = {"lora.rank": 4, "trainable": ""}
TRAINED = {"sd": {}, "klein": {}}  # whole. The others by LoRA


@pytest.fixture(scope="module", params=MAKERS)
def folder(request, tmp_path_factory):
    work = tmp_path_factory.mktemp(request.param)
    MAKERS[request.param](work).save_pretrained(work / "folder")
    return request.param, work / "folder"


def size(tree):
    return sum(x.nbytes for x in jax.tree.leaves(tree))


@pytest.fixture
def watched(monkeypatch):
    """For every step: (paths of frozen parameters, bytes of arguments, those that are known, bytes
    of all other arrays that live and did not before the run)."""
    before, found = {id(x) for x in jax.live_arrays()}, []
    kept = jax.live_arrays()  # so that no id is used again
    call = Compiled.__call__

    def recorded(self, state, frozen, batch):
        known = {id(x) for x in jax.tree.leaves((state, frozen, batch))}
        others = [x for x in jax.live_arrays() if id(x) not in known | before]
        arguments = self.by_shape and next(iter(self.by_shape.values())).memory_analysis()
        given = size((state, frozen, batch))
        found.append((set(frozen), arguments.argument_size_in_bytes, given, size(others)))
        return call(self, state, frozen, batch)

    monkeypatch.setattr(Compiled, "__call__", recorded)
    yield found
    del kept


def test_a_step_holds_the_denoiser_its_state_and_the_batch_alone(folder, tmp_path, watched):
    """With captions dropped, and pictures sampled between the steps."""
    name, source = folder
    data = make_pictures(tmp_path / "pictures")
    changes = {**TRAINED.get(name, LORA), "cache": tmp_path / "cache", "caption_dropout": 0.3}
    changes |= {"total": "2_steps", "every.sample": "1_steps", "sample.prompts": "('a fish',)"}
    work = tmp_path / "run"
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 0
    assert len(list((work / "samples").glob("prompts-*.png"))) == 3
    files = [
        file for part in ("vae", "text_encoder*") for file in source.glob(f"{part}/*.safetensors")
    ]
    encoders = sum(file.stat().st_size for file in files)
    assert len(watched) == 2
    for frozen, arguments, given, others in watched:
        ours = {path for path in frozen if not path.startswith(DENOISERS)}
        assert all(path.startswith(KEPT.get(name, ("none",))) for path in ours), sorted(ours)[:3]
        # the compiler drops arguments that are not used, such as the size conditioning
        assert 0.95 * given < arguments <= given
        assert others < 0.02 * encoders, (others, encoders)


@pytest.fixture
def loads(monkeypatch):
    """For every load: (parts of the model, bytes of arrays that live then and not before)."""
    kept, found = jax.live_arrays(), []
    before, load = {id(x) for x in kept}, opening.load_params

    def recorded(run, wanted=None):
        parts = {".".join(path.split(".")[:2]) for path in (wanted or ())}
        parts = {"unet" if part.startswith("unet") else part for part in parts}
        parts = {"text" if part.startswith("text_encoder") else part for part in parts}
        found.append((parts, size([x for x in jax.live_arrays() if id(x) not in before])))
        return load(run, wanted)

    for module in (opening, state):
        monkeypatch.setattr(module, "load_params", recorded)
    yield found
    del kept


def losses_of(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    names = ("loss", "eval_loss", "eval_loss_t62", "eval_loss_t937")
    return [{name: line[name] for name in names if name in line} for line in lines]


def test_caches_are_full_before_the_denoiser_is_loaded_and_encoders_never_return(tmp_path, loads):
    """Nor for evaluations and the export. Pictures need the decoder alone. Losses are the same, bit
    for bit.
    """
    make_pipeline(tmp_path, "sd").save_pretrained(tmp_path / "folder")
    data = make_pictures(tmp_path / "pictures")
    files = (tmp_path / "folder").glob("*/*.safetensors")
    least = min(file.stat().st_size for file in files)
    encoders = [{"vae.encoder", "vae.quant_conv"}, {"text"}]
    drawn, found = {"vae.decoder", "vae.post_quant_conv"}, {}

    def trained(name, total, changes):
        loads.clear()
        changes = {**LORA, "every.eval": "1_steps", "caption_dropout": 0.5, **changes}
        changes |= {"cache": tmp_path / name / "cache", "total": f"{total}_steps"}
        work = tmp_path / name / "run"
        changes |= {"optim.ema": 0.9, "export.kind": "folder"}
        flags = flags_of(tmp_path / "folder", data, changes)
        assert train.main([*flags, "--workdir", str(work)]) == 0
        found[name] = losses_of(work)
        return [parts for parts, _ in loads], [live for _, live in loads]

    parts, live = trained("numbers", 1, {"eval_generated": 0})
    assert parts == [*encoders, {"unet"}], "once each, and no more for two evaluations"
    assert max(live) < 0.02 * least, (live, least)
    parts, live = trained("numbers", 2, {"eval_generated": 0})  # resumed
    assert parts == [*encoders, {"unet"}] and max(live[:2]) < 0.02 * least
    assert live[2] < least, "the restored adapters and their moments, and no encoder"
    shown = {"eval_generated": 2, "sample.prompts": "('a fish',)", "every.sample": "1_steps"}
    parts, live = trained("pictures", 2, shown)
    assert parts[:3] == [*encoders, {"unet"}] and max(live[:3]) < 0.02 * least
    assert parts[3:] == [drawn] * 6, "evaluation and samples before, between and after two steps"
    assert found["pictures"] == found["numbers"] and len(found["numbers"]) >= 4


def test_without_a_cache_every_step_reads_the_encoders(tmp_path, watched):
    make_pipeline(tmp_path, "sd").save_pretrained(tmp_path / "folder")
    data = make_pictures(tmp_path / "pictures")
    flags = flags_of(tmp_path / "folder", data, {"total": "1_steps", "data.eval": ""})
    assert train.main([*flags, "--workdir", str(tmp_path / "run")]) == 0
    ((frozen, *_),) = watched
    assert any(path.startswith("text_encoder.") for path in frozen)
    assert any(path.startswith("vae.encoder.") for path in frozen)
    assert not any(path.startswith("vae.decoder.") for path in frozen)


def test_the_null_caption_of_a_cache_is_that_of_the_encoders(tmp_path):
    """Bit for bit, because it is encoded alone."""
    make_pipeline(tmp_path, "sd").save_pretrained(tmp_path / "folder")
    data = make_pictures(tmp_path / "pictures")
    changes = {"cache": tmp_path / "cache", "caption_dropout": 0.5}
    run = runs.open_run(make_config(tmp_path / "folder", data, changes))
    params = runs.load_params(run)
    null, dtype = run.objective.null, run.opened.dtype
    encoded = jax.jit(lambda params: null(bind(run.opened.template, params, dtype)))(params)
    run.encode(params)
    cached = run.task.objective(run.opened, run.train).null(None)
    assert np.array_equal(encoded.context, cached.context) and cached.pooled is None


def test_a_parameter_that_is_not_there_cannot_be_read(tmp_path):
    make_pipeline(tmp_path, "sd").save_pretrained(tmp_path / "folder")
    run = runs.open_run(make_config(tmp_path / "folder", make_pictures(tmp_path / "pictures")))
    params = runs.load_params(run)
    some = {path: x for path, x in params.items() if path.startswith("unet.")}
    ids = np.zeros((1, *run.opened.ids_shape), np.int32)
    with pytest.raises(TypeError, match="ShapeDtypeStruct"):
        bind_some(run.opened.template, some).encode_text(ids, dtype=np.float32)


@pytest.mark.parametrize(
    ("changes", "encoded"),
    [({}, False), (LORA, False), ({**LORA, "lora.targets": r"text_encoder\..*q_proj"}, True)],
)
def test_a_plan_holds_the_encoders_where_they_train(tmp_path, changes, encoded):
    make_pipeline(tmp_path, "sd").save_pretrained(tmp_path / "folder")
    data = make_pictures(tmp_path / "pictures")
    changes = {**changes, "cache": tmp_path / "cache", "caption_dropout": 0.1}
    run = runs.open_run(make_config(tmp_path / "folder", data, changes))
    plan = run.task.plan(run.opened)
    assert ("ids" in plan.shapes, "text_encoder" not in plan.unread) == (encoded, encoded)
    assert (plan.empty_text is None) == encoded and "vae.encoder." in plan.unread
