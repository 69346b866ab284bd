"""Runs of LoKr: LyCORIS merges their file into their own merged weights, and training goes on."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from lycoris.modules import get_module, make_module
from safetensors import safe_open
from safetensors.torch import load_file

from jaxft import train
from jaxft.core.config import load_config
from jaxft.core.errors import UserError
from jaxft.runs.opening import open_run
from jaxft.tasks import OPTIONS
from tests.tasks.diffusion.flow_runs import losses
from tests.tiny_diffusion import ROOT, flags_of, make_config, make_pictures
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import make_sd3

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
NAME = "unet/diffusion_pytorch_model.safetensors"
TARGETS = r"unet\..*(to_(q|v)|ff\.proj|conv1|proj_in)"
LOKR = {
    "lora.rank": 1,
    "lora.alpha": 1.5,
    "lora.lokr": 4,
    "lora.targets": TARGETS,
    "optim.lr": 0.05,
    "total": "2_steps",
}
SHORT = {"eval_examples": 4, "sample.prompts": "('a fish',)"}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    work = tmp_path_factory.mktemp("sd")
    make_pipeline(work, "sd").save_pretrained(work / "pipe")
    return work / "pipe"


def merged_by_lycoris(unet, file):
    """The weights of diffusers' UNet with a file, each module by the package, under its key."""
    own = {name.replace(".", "_"): module for name, module in unet.named_modules()}
    tensors, made = load_file(file), {key: x.clone() for key, x in unet.state_dict().items()}
    names = {module: name for name, module in unet.named_modules()}
    for stem in {key.partition(".")[0] for key in tensors}:
        module = own[stem.removeprefix("lora_unet_")]
        kind, given = get_module(tensors, stem)
        assert kind.name == "kron"
        update = make_module(kind, given, stem, module).get_weight(module.weight.shape)
        made[f"{names[module]}.weight"] += update.detach()
    return made


def test_the_file_has_the_merged_weights_in_lycoris_and_goes_on(source, tmp_path):
    data, work = make_pictures(tmp_path / "pictures"), tmp_path / "run"
    changes = {**LOKR, **SHORT, "export.kind": "all"}
    assert train.main([*flags_of(source, data, changes), "--workdir", str(work)]) == 0
    (file,) = (work / "export" / "lora").glob("*.safetensors")
    assert file.name == "run.lycoris.safetensors"
    with safe_open(file, "np") as opened:
        stated, keys = opened.metadata(), set(opened.keys())
    assert json.loads(stated["ss_network_args"])["algo"] == "lokr"
    assert {key.partition(".")[2] for key in keys} == {
        "lokr_w1",
        "lokr_w2_a",
        "lokr_w2_b",
        "alpha",
    }
    base = load_file(source / NAME)
    wanted = load_file(work / "export" / NAME)
    got = merged_by_lycoris(DiffusionPipeline.from_pretrained(source).unet, file)
    moved = {key for key, x in base.items() if not torch.equal(x, wanted[key])}
    assert len(moved) == len(keys) // 4 > 5
    with pytest.raises(ValueError, match="not been correctly renamed"):
        DiffusionPipeline.from_pretrained(source).load_lora_weights(file)
    for key, x in wanted.items():
        np.testing.assert_allclose(got[key], x, rtol=0, atol=1e-5, err_msg=key)
    more = {"lora.from": file, "lora.lokr": 4, "total": "1_steps", "optim.lr": 0.05}
    flags = [*flags_of(source, data, {**SHORT, **more}), "--workdir", str(tmp_path / "more")]
    assert train.main(flags) == 0
    first, *_, last = losses(tmp_path / "more")
    assert first == pytest.approx(losses(work)[-1], rel=1e-5) and first != last
    plain = {**SHORT, "lora.from": file, "total": "0_steps"}  # as LoRA
    assert train.main([*flags_of(source, data, plain), "--workdir", str(tmp_path / "lora")]) == 0
    assert losses(tmp_path / "lora")[0] == pytest.approx(first, rel=1e-5)
    with pytest.raises(UserError, match=r"lokr_w1 \[2, 4\] is not \[2, 2\]"):
        wrong = {"lora.from": file, "lora.lokr": 2, "data.eval": ""}
        open_run(make_config(source, data, wrong))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lora.dora": True}, "lora.lokr=4 does not go with lora.dora=True"),
        ({"lora.targets": r"text_encoder\..*"}, "has no plain rows and columns"),
        ({"lora.rank": 8}, "is not below half the size of W2"),
        ({"lora.lokr": -2}, "lora.lokr=-2 must be a factor from 1 on, -1 or 0"),
        ({"lora.rank": 0}, "lora.lokr=4 needs lora.rank > 0"),
    ],
)
def test_what_lokr_does_not_go_with_is_refused_in_one_line(source, changes, words):
    with pytest.raises(UserError, match=words) as caught:
        open_run(make_config(source, "folder:unread", {**LOKR, "data.eval": "", **changes}))
    assert "\n" not in str(caught.value)


def test_transformers_are_refused(tmp_path):
    make_sd3(tmp_path, False).save_pretrained(tmp_path / "sd3")
    changes = {**LOKR, "lora.targets": "", "data.eval": ""}
    with pytest.raises(UserError, match=r"lora\.lokr=4 is for the UNets of Stable Diffusion 1, 2"):
        open_run(make_config(tmp_path / "sd3", "folder:unread", changes))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("llm", "lora.lokr=4 is for task=diffusion alone"),
        ("image_tokens", "lora.lokr=4 is not for task=image_tokens"),
        ("autoencoder", "lora.lokr=4, but an autoencoder takes no adapters"),
    ],
)
def test_other_tasks_refuse_it(task, words):
    config = load_config(str(ROOT / "configs" / f"{task}.py"), [("lora.lokr", "4")], OPTIONS)
    with pytest.raises(UserError, match=words):
        open_run(config)
