"""Text-to-image pipelines that grow: their files, their first prediction, and what is refused."""

import json
from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UNet2DConditionModel

from jaxft.core.errors import UserError
from jaxft.core.params import bind
from jaxft.models.pipelines import families, growing, ldm
from jaxft.models.pipelines.stable_diffusion import HOLE, KINDS, SOURCE
from jaxft.runs.opening import load_params, open_run
from jaxft.weights.folders.quantised.nf4 import PackedTensors
from jaxft.weights.locate import INDEX
from tests.tiny_diffusion import make_config
from tests.tiny_pipelines import make_pipeline
from tests.tiny_sd3 import make_sd3

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
CONV = "conv_in.weight"
GROWN = {  # conditioning, channels of the UNet, a part of the name of diffusers' class
    "inpainting": (HOLE, 9, "Inpaint"),
    "instruct_pix2pix": (SOURCE, 8, "InstructPix2Pix"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The place of folders of pipelines, by name."""
    work = tmp_path_factory.mktemp("pipelines")
    for name, family, more in (
        ("sd", "sd", {}),
        ("sdxl", "sdxl", {}),
        ("9", "sd", 9),
        ("8", "sd", 8),
    ):
        channels = {"in_channels": more} if more else {}
        make_pipeline(work, family, **channels).save_pretrained(work / name)
    return work


@pytest.mark.parametrize("kind", GROWN)
@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_a_grown_pipeline_has_new_channels_and_the_class_of_diffusers(folders, family, kind):
    old = ldm.open_model(str(folders / family))
    new = growing.grow(old, kind)
    conditioning, channels, infix = GROWN[kind]
    size = "XL" if family == "sdxl" else ""
    assert new.index["_class_name"] == f"StableDiffusion{size}{infix}Pipeline"
    assert json.loads(new.files[INDEX]) == new.index
    unet, before = new.components["unet"], old.components["unet"]
    assert unet.config == {**before.config, "in_channels": channels}
    assert json.loads(unet.side_files["config.json"]) == unet.config and len(unet.side_files) == 1
    cfg = families.read_config(new)
    assert cfg.conditioning == conditioning and KINDS[conditioning] in cfg.describe()
    assert new.family == family
    kernel = unet.tensors.read(CONV)
    assert kernel.shape == unet.tensors.info(CONV)[0] == (8, channels, 3, 3)
    own = before.tensors.read(CONV)
    assert np.array_equal(kernel[:, :4], own) and not kernel[:, 4:].any() and own.shape[1] == 4
    assert unet.tensors.keys() == before.tensors.keys()
    assert growing.grow(old, "none") is old


SLOW = pytest.param("instruct_pix2pix", marks=pytest.mark.slow)


@pytest.mark.parametrize("kind", ["inpainting", SLOW])
def test_before_training_it_predicts_what_the_text_to_image_model_does(folders, kind):
    """For any further channels, and as diffusers' UNet of 4 channels."""
    changes = {"data.eval": "", "grow": kind}
    run = open_run(make_config(folders / "sd", "folder:unread", changes))
    keys = jax.random.split(jax.random.key(1), 4)
    noisy, text = jax.random.normal(keys[0], (2, 8, 8, 4)), jax.random.normal(keys[1], (2, 77, 16))
    t, more = jnp.array([3, 900]), jax.random.normal(keys[2], (2, 8, 8, GROWN[kind][1] - 4))

    @jax.jit
    def predict(params, further):
        latents = jnp.concatenate([noisy, further], axis=-1)
        return bind(run.opened.template, params).unet(latents, t, text)

    with jax.set_mesh(run.mesh):
        params = load_params(run)
        made = [np.asarray(predict(params, x)) for x in (0 * more, more, 100 * more)]
    theirs = UNet2DConditionModel.from_pretrained(folders / "sd", subfolder="unet").eval()
    with torch.no_grad():
        latents = torch.tensor(np.array(noisy)).permute(0, 3, 1, 2)
        out = theirs(latents, torch.tensor(np.array(t)), torch.tensor(np.array(text))).sample
    for one in made:
        np.testing.assert_allclose(one, made[0], atol=1e-6)
        np.testing.assert_allclose(one, out.permute(0, 2, 3, 1).numpy(), atol=1e-5)


def test_grown_random_weights_have_no_checkpoint(folders):
    new = growing.grow(ldm.open_model(str(folders / "sd"), weights=False), "inpainting")
    assert (
        new.components["unet"].tensors is None and new.components["unet"].config["in_channels"] == 9
    )


@pytest.mark.parametrize(
    ("model", "changes", "words"),
    [
        ("sd", {"grow": "inpaint"}, "grow='inpaint' is not known; did you mean 'inpainting'"),
        (
            "9",
            {},
            "starts from a text-to-image UNet, which has in_channels=4, and that of .* has 9",
        ),
        ("8", {"grow": "instruct_pix2pix"}, "in_channels=4, and that of .* has 8; leave it out"),
        ("sd3", {}, "grow=inpainting adds inputs to the UNet of .*/sd3 has a transformer"),
        (
            "sd",
            {"trainable": r"unet\.mid.*"},
            r"does not match unet.conv_in.kernel, whose new chan",
        ),
        ("sd", {"lora.rank": 2, "trainable": ".*lora_[ab]"}, "does not match unet.conv_in.kernel"),
        ("sd", {"mask": "alpha"}, "weights the loss of a model of captions alone"),
        (
            "sd",
            {"grow": "instruct_pix2pix", "caption_dropout": 0.4},
            "caption_dropout=0.4 must be at most 1/3",
        ),
    ],
)
def test_what_cannot_grow_is_refused_in_one_line(folders, tmp_path, model, changes, words):
    if model == "sd3":
        make_sd3(tmp_path, False).save_pretrained(folders / "sd3")
    changes = {"grow": "inpainting", "data.eval": "", **changes}
    with pytest.raises(UserError, match=words) as caught:
        open_run(make_config(folders / model, "folder:unread", changes))
    assert "\n" not in str(caught.value)


def test_quantised_weights_are_refused(folders):
    old = ldm.open_model(str(folders / "sd"))
    packed = PackedTensors(old.components["unet"].tensors, "unet", {})
    unet = replace(old.components["unet"], tensors=packed)
    with pytest.raises(UserError, match="NF4 weights cannot be; give the model before quantis"):
        growing.grow(replace(old, components={**old.components, "unet": unet}), "inpainting")


def test_beside_an_adapter_and_a_new_word_the_first_convolution_trains(folders):
    spec = "folder:unread"
    word = {"inversion.token": "<cat-toy>", "inversion.init": "a"}
    for changes, wanted in (
        ({"lora.rank": 2}, {"kernel", "bias", "lora_a", "lora_b"}),
        ({"lora.rank": 2, "lora.dora": True}, {"kernel", "bias", "lora_a", "lora_b", "lora_m"}),
        (word, {"kernel", "bias", "embedding"}),
    ):
        changes = {"grow": "inpainting", "data.eval": "", "trainable": "", **changes}
        run = open_run(make_config(folders / "sd", spec, changes))
        assert {path.rpartition(".")[2] for path in run.chosen} == wanted
        own = {path for path in run.chosen if not run.leaves[path].added}
        assert own == {"unet.conv_in.kernel", "unet.conv_in.bias"}
    whole = open_run(make_config(folders / "sd", spec, {"grow": "inpainting", "data.eval": ""}))
    assert whole.chosen == {path for path in whole.leaves if path.startswith("unet.")}


def test_the_names_of_the_check_are_those_of_the_model():
    leaves = {growing.NEW_INPUTS: SimpleNamespace()}
    growing.check_trained("none", "nothing", leaves)
    growing.check_trained("inpainting", growing.TRAINED_BESIDE, leaves)
