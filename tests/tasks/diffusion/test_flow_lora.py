"""LoRA files of SD 3, FLUX.1 and Z-Image in three layouts: their strength, and going on from each.

A reader as ComfyUI knows the keys of a single file, multiplies by alpha / rank where there is an
alpha, and does not read the header (T33, T34).
"""

import json

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from jaxft import export, train
from tests.tiny_diffusion import flags_of, make_pictures
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import make_sd3
from tests.tiny_zimage import make_zimage

pytestmark = pytest.mark.usefixtures("quick", "one_thread")
STEM = "model.diffusion_model."
DIFFUSERS = "pytorch_lora_weights.safetensors"
# A module of the single file whose adapters of q, k and v are one, and one that stands alone.
MODULES = {
    "sd3": ("joint_blocks.0.x_block.attn2.qkv", "joint_blocks.1.x_block.attn.proj"),
    "flux": ("single_blocks.1.linear1", "double_blocks.0.txt_mlp.2"),
    "zimage": ("layers.1.attention.qkv", "noise_refiner.0.attention.out"),
}
TARGETS = {"sd3": r"transformer\.(.*\.attn.*\.to_(q|k|v|out)|norm_out\.linear|context_embedder)"}


class Made:
    """A run of three steps with a LoRA, and its exports beside the single files of base and run."""

    def __init__(self, kind, work):
        self.kind, self.source, self.work = kind, work / "folder", work / "run"
        pipe = {"sd3": lambda: make_sd3(work, False), "flux": lambda: make_flux(work)}
        pipe.get(kind, make_zimage)().save_pretrained(self.source)
        self.data = make_pictures(work / "pictures", count=8)
        keys = {"lora.rank": 4, "lora.alpha": 6.0, "export.kind": "lora", "total": "3_steps"}
        keys |= {"optim.lr": 0.05, "lora.targets": TARGETS.get(kind, "")}
        flags = flags_of(self.source, self.data, keys)
        assert train.main([*flags, "--workdir", str(self.work)]) == 0
        self.files = {
            name: next((self.work / "export").glob(f"*{name}*"))
            for name in ("pytorch_lora_weights", "kohya", "original")
        }
        self.merged = self.exported(self.work, "merged")
        still = work / "still"
        keys = {"total": "0_steps", "data.eval": ""}
        assert train.main([*flags_of(self.source, self.data, keys), "--workdir", str(still)]) == 0
        self.base = self.exported(still, "base")

    def exported(self, work, name):
        out = work / name
        arguments = ["--workdir", str(work), "--out", str(out), "--kind", "single_file"]
        assert export.main(arguments) == 0
        return load_file(next(out.glob("*.safetensors")))


@pytest.fixture(scope="module", params=MODULES)
def made(request, tmp_path_factory):
    with pytest.MonkeyPatch.context():
        return Made(request.param, tmp_path_factory.mktemp(request.param))


def patched(base, lora):
    """The base under ComfyUI's key map of every model: lora_unet_* and the plain name."""
    names = {}
    for key in (key for key in base if key.startswith(STEM) and key.endswith(".weight")):
        plain = key.removeprefix(STEM).removesuffix(".weight")
        names[f"lora_unet_{plain.replace('.', '_')}"] = names[f"diffusion_model.{plain}"] = key
    weights, used = dict(base), set()
    for stem, key in names.items():
        for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
            if f"{stem}.{down}.weight" in lora:
                a, b = lora[f"{stem}.{down}.weight"], lora[f"{stem}.{up}.weight"]
                alpha = lora.get(f"{stem}.alpha")
                scale = 1.0 if alpha is None else alpha / len(a)
                weights[key] = base[key] + (scale * (b @ a)).reshape(base[key].shape)
                used |= {f"{stem}.{down}.weight", f"{stem}.{up}.weight", f"{stem}.alpha"}
    assert used == set(lora), "it takes every key"
    return weights


@pytest.mark.parametrize("name", ["kohya", "original"])
def test_t33_a_reader_of_alpha_alone_has_the_merged_weights(made, name):
    found, moved = patched(made.base, load_file(made.files[name])), 0
    for key, wanted in made.merged.items():
        np.testing.assert_allclose(found[key], wanted, atol=2e-5, err_msg=key)
        moved += not np.array_equal(wanted, made.base[key])
    assert moved >= 6


def test_t34_q_k_and_v_are_one_of_three_times_the_rank_with_blocks_along_the_diagonal(made):
    fused, alone = MODULES[made.kind]
    tensors = load_file(made.files["kohya"])
    stem, other = (f"lora_unet_{one.replace('.', '_')}" for one in (fused, alone))
    up, down = tensors[f"{stem}.lora_up.weight"], tensors[f"{stem}.lora_down.weight"]
    assert len(down) == up.shape[1] == tensors[f"{stem}.alpha"] == 12
    width = made.base[f"{STEM}{alone}.weight"].shape[0]
    for row in range(3):
        rows = up[row * width : (row + 1) * width]
        own = rows[:, 4 * row : 4 * row + 4]
        assert own.any() and np.count_nonzero(rows) == np.count_nonzero(own)
    assert tensors[f"{other}.alpha"] == len(tensors[f"{other}.lora_down.weight"]) == 4


def losses(work):
    lines = [json.loads(line) for line in (work / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]


@pytest.mark.parametrize("name", ["pytorch_lora_weights", "kohya", "original", "transformer"])
def test_a_run_goes_on_from_each(made, tmp_path, name):
    """transformer: original names after the prefix of diffusers' files."""
    file = made.files.get(name, tmp_path / "named.safetensors")
    if name == "transformer":
        own = load_file(made.files["original"])
        save_file(
            {key.replace("diffusion_model.", "transformer."): x for key, x in own.items()}, file
        )
    keys = {"lora.from": file, "total": "0_steps"}
    flags = flags_of(made.source, made.data, keys)
    assert train.main([*flags, "--workdir", str(tmp_path / "on")]) == 0
    np.testing.assert_allclose(losses(tmp_path / "on")[0], losses(made.work)[-1], rtol=1e-5)


def test_headers_name_the_network_of_kohya(made):
    with safe_open(made.files["kohya"], "np") as file:
        about = file.metadata()
    assert about["ss_network_module"] == f"networks.lora_{made.kind}"
    assert about["ss_base_model_version"] == {"flux": "flux1"}.get(made.kind, made.kind)
    with safe_open(made.files["original"], "np") as file:
        assert file.metadata()["modelspec.architecture"].endswith("/lora")


def test_sd3_says_who_does_not_read_the_file_of_kohya(tmp_path, capsys):
    made = Made("sd3", tmp_path)
    told = [x for x in capsys.readouterr().out.splitlines() if "kohya's scripts" in x]
    assert told and "diffusers does not read" in told[0] and DIFFUSERS in told[0]
    assert made.files["kohya"].name in told[0]
