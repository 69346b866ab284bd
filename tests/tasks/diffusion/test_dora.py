"""A run of DoRA: diffusers merges its file into its own merged weights, and every file goes on."""

import numpy as np
import pytest
from diffusers import DiffusionPipeline
from safetensors.numpy import load_file

from tests.tasks.diffusion.flow_runs import LORA, NAME, assert_goes_on, lora_run
from tests.tiny_diffusion import make_pictures
from tests.tiny_flux import make_flux

pytestmark = pytest.mark.usefixtures("quick", "one_thread")


def test_files_of_a_run_have_the_merged_weights_and_go_on(tmp_path, monkeypatch):
    """Values have no adapter. The single file has them in one module with queries and keys."""
    source, data = tmp_path / "flux", make_pictures(tmp_path / "pictures")
    make_flux(tmp_path).save_pretrained(source)
    changes = {"lora.dora": True, "lora.targets": r"transformer\..*\.attn\.to_(q|k)"}
    monkeypatch.setitem(LORA, "total", "2_steps")
    for key, value in changes.items():
        monkeypatch.setitem(LORA, key, value)
    peft, kohya, merged = lora_run(source, data, tmp_path / "run")
    base, wanted = (load_file(folder / "transformer" / NAME) for folder in (source, merged))
    pipe = DiffusionPipeline.from_pretrained(source)
    pipe.load_lora_weights(str(peft.parent), weight_name=peft.name)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    got = {key: x.numpy() for key, x in pipe.transformer.state_dict().items()}
    moved = {key for key, x in base.items() if not np.array_equal(x, wanted[key])}
    assert moved and all(".attn.to_" in key for key in moved)
    for key, x in wanted.items():
        np.testing.assert_allclose(got[key], x, rtol=1e-4, atol=1e-6, err_msg=key)
    (original,) = peft.parent.glob("*.original.safetensors")
    files = {"peft": peft, "kohya": kohya, "original": original}
    assert_goes_on(source, data, tmp_path / "run", files)
