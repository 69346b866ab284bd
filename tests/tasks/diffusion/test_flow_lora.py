"""LoRA files of SD 3, FLUX.1 and Z-Image in three layouts: their strength, and reading each back.

A reader as ComfyUI knows the keys of a single file, multiplies by alpha / rank where there is an
alpha, and does not read the header (T33, T34). That diffusers draws the same with a file as with
merged weights is in the tests of each family.
"""

from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxft.core.config import read_config
from jaxft.core.configs.schema import Lora
from jaxft.core.params import ADAPTER_ROLE, describe
from jaxft.models.pipelines import families, ldm
from jaxft.nn import lora
from jaxft.tasks import OPTIONS
from jaxft.tasks.diffusion.opened import OpenedPipeline
from jaxft.weights.adapters import pipeline as pipeline_lora
from jaxft.weights.adapters.pipeline_file import load, open_lora
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import single_file
from tests.models.denoisers.mmdit.test_mmdit_single_file import whole
from tests.tiny_diffusion import make_config
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import make_sd3
from tests.tiny_zimage import make_zimage

STEM, SCALE = "model.diffusion_model.", 1.5
EVERY = r"transformer\..*"
# A module of the single file whose adapters of q, k and v are one, and one that stands alone.
MODULES = {
    "sd3": ("joint_blocks.0.x_block.attn2.qkv", "joint_blocks.1.x_block.attn.proj"),
    "flux": ("double_blocks.1.img_attn.qkv", "double_blocks.0.txt_mlp.2"),
    "zimage": ("layers.1.attention.qkv", "noise_refiner.0.attention.out"),
}


class Made(NamedTuple):
    """Random adapters of every projection of a transformer, and the files of them."""

    kind: str
    opened: OpenedPipeline
    leaves: Any
    arrays: dict
    files: dict

    @property
    def sites(self):
        return pipeline_lora.sites(self.opened.parts, self.leaves)

    def deltas(self, arrays, leaves=None, scale=SCALE):
        """{module of diffusers: B A, times the scale}."""
        leaves = self.leaves if leaves is None else leaves
        found = {}
        for site in pipeline_lora.sites(self.opened.parts, leaves):
            a, b, _ = site.factors(arrays)
            found[site.name] = scale * (b.reshape(len(b), -1) @ a.reshape(len(a), -1))
        return found


@pytest.fixture(scope="module", params=MODULES)
def made(request, tmp_path_factory):
    kind, work = request.param, tmp_path_factory.mktemp(request.param)
    makers = {"sd3": lambda: make_sd3(work, False), "flux": lambda: make_flux(work)}
    makers.get(kind, make_zimage)().save_pretrained(work / "folder")
    keys = {"lora.rank": 4, "lora.alpha": 4 * SCALE, "lora.targets": EVERY}
    config = make_config(work / "folder", "", {**keys, "data.eval": ""})
    opened = OpenedPipeline(read_config(config, OPTIONS["diffusion"]))
    leaves, rng = describe(opened.template), np.random.default_rng(0)
    arrays = {
        path: rng.standard_normal(leaf.shape).astype(np.float32)
        for path, leaf in leaves.items()
        if leaf.role == ADAPTER_ROLE
    }
    stated = pipeline_lora.metadata(kind, "mine", "base", 4, 4 * SCALE)
    layouts = ldm.transformer_layouts(opened.pipeline)
    given = (opened.parts, leaves, arrays, SCALE)
    files = {
        "peft": pipeline_lora.write_peft(work, *given),
        "kohya": pipeline_lora.write_kohya(work, "mine", *given, stated, layouts),
        "original": pipeline_lora.write_original(work, "mine", *given, stated, layouts),
    }
    named = load_file(files["original"])
    named = {key.replace("diffusion_model.", "transformer."): x for key, x in named.items()}
    save_file(named, work / "named.safetensors")
    return Made(kind, opened, leaves, arrays, {**files, "named": work / "named.safetensors"})


def single(made, deltas):
    """The transformer under the file's names, with `deltas` by diffusers' module added."""
    (layout,) = ldm.transformer_layouts(made.opened.pipeline).values()
    tensors = TensorFiles.open(made.opened.pipeline.folder / "transformer")
    export, names = whole(tensors), set(tensors.keys())
    missing = {f"{name.removeprefix('transformer.')}.weight" for name in deltas} - names
    assert not missing

    def merged():
        for key, x in export.tensors:
            delta = deltas.get(f"transformer.{key.removesuffix('.weight')}")
            yield key, x if delta is None else x + delta.reshape(x.shape)

    return dict(single_file.to_ldm(export._replace(tensors=merged()), layout).tensors)


def patched(base, adapters):
    """The base under ComfyUI's key map of every model: lora_unet_* and the plain name."""
    names = {}
    for key in (key for key in base if key.endswith(".weight")):
        plain = key.removeprefix(STEM).removesuffix(".weight")
        names[f"lora_unet_{plain.replace('.', '_')}"] = names[f"diffusion_model.{plain}"] = key
    weights, used = dict(base), set()
    for stem, key in names.items():
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            if f"{stem}.{down}.weight" in adapters:
                a, b = adapters[f"{stem}.{down}.weight"], adapters[f"{stem}.{up}.weight"]
                alpha = adapters.get(f"{stem}.alpha")
                scale = 1.0 if alpha is None else alpha / len(a)
                made = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
                weights[key] = base[key] + (scale * made).reshape(base[key].shape)
                used |= {f"{stem}.{down}.weight", f"{stem}.{up}.weight", f"{stem}.alpha"}
    assert used == set(adapters), "it takes every key"
    return weights


@pytest.mark.parametrize("name", ["kohya", "original"])
def test_t33_a_reader_of_alpha_alone_has_the_merged_weights(made, name):
    base = single(made, {})
    found, moved = patched(base, load_file(made.files[name])), 0
    for key, wanted in single(made, made.deltas(made.arrays)).items():
        np.testing.assert_allclose(found[key], wanted, atol=1e-4, err_msg=key)
        moved += not np.array_equal(wanted, base[key])
    assert moved > 20


def test_t33_the_file_of_diffusers_has_no_alpha_and_its_scale_in_the_weights(made):
    tensors = load_file(made.files["peft"])
    assert not any("alpha" in key for key in tensors)
    for name, wanted in made.deltas(made.arrays).items():
        a, b = (tensors[f"{name}.lora_{side}.weight"] for side in "AB")
        got = b.reshape(len(b), -1) @ a.reshape(len(a), -1)
        np.testing.assert_allclose(got, wanted, atol=1e-4, err_msg=name)


def test_t34_q_k_and_v_are_one_of_three_times_the_rank_with_blocks_along_the_diagonal(made):
    fused, alone = MODULES[made.kind]
    tensors = load_file(made.files["kohya"])
    stem, other = (f"lora_unet_{one.replace('.', '_')}" for one in (fused, alone))
    up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
    assert len(down) == up.shape[1] == tensors[f"{stem}.alpha"] == 12
    for row, rows in enumerate(np.split(up, 3)):
        own = rows[:, 4 * row : 4 * row + 4]
        assert own.any() and np.count_nonzero(rows) == np.count_nonzero(own)
    assert tensors[f"{other}.alpha"] == len(tensors[f"{other}.lora_down.weight"]) == 4


@pytest.mark.parametrize("name", ["peft", "kohya", "original", "named"])
def test_a_run_goes_on_from_each_with_the_same_products(made, name):
    """named: original names after the prefix of diffusers' files."""

    def build(key):
        model = families.build(made.opened.model_cfg, key)
        lora.add(model, Lora(rank=1, targets=".*"), key)
        return model

    everywhere = describe(jax.eval_shape(build, jax.random.key(0)))
    layouts = ldm.layouts(made.opened.pipeline)
    found = open_lora(str(made.files[name]), made.opened.parts, everywhere, layouts)
    assert found.lora.rank == 4 and found.lora.alpha == 4
    arrays = load(found, made.leaves)
    read = made.deltas(arrays, scale=found.lora.alpha / found.lora.rank)
    wanted = made.deltas(made.arrays)
    assert read.keys() == wanted.keys()
    for module, product in wanted.items():
        np.testing.assert_allclose(read[module], product, atol=1e-4, err_msg=module)


def test_headers_name_the_network_of_kohya(made):
    with safe_open(made.files["kohya"], "np") as file:
        about = file.metadata()
    assert about["ss_network_module"] == f"networks.lora_{made.kind}"
    assert about["ss_base_model_version"] == {"flux": "flux1"}.get(made.kind, made.kind)
