"""Finding a diffusers folder: what is asked of the hub, and what is no folder."""

import huggingface_hub
import pytest

from jaxft.core.errors import UserError
from jaxft.weights.folders.diffusers import open_component, open_pipeline
from jaxft.weights.locate import wanted
from tests.tiny_pipelines import make_pipeline


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    work = tmp_path_factory.mktemp("sd")
    make_pipeline(work).save_pretrained(work / "pipe")
    return work / "pipe"


@pytest.mark.parametrize("spec", ["./no/such", "no", "pip:no-such-package-here"])
def test_what_is_no_folder_is_an_error(spec):
    with pytest.raises(UserError, match=r"no such folder|not installed"):
        open_pipeline(spec)


def test_the_hub_gives_one_spelling_of_each_weight():
    names = [
        "README.md",
        "model_index.json",
        "v1-5-pruned.safetensors",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "text_encoder/model.fp16-00001-of-00002.safetensors",
        "text_encoder/model.fp16-00002-of-00002.safetensors",
        "text_encoder/model.safetensors.index.fp16.json",
        "tokenizer/merges.txt",
        "deep/er/config.json",
    ]
    small = {n for n in names if n.endswith((".json", ".txt", ".md"))} - {"deep/er/config.json"}
    text = {names[8], names[9]}
    assert set(wanted(names, "", True)) == small | text | {names[5]}
    assert set(wanted(names, "", False)) == small
    assert wanted(names, "unet", True) == [names[3], names[5]]


def test_a_hub_id_may_name_a_subfolder_and_serves_from_the_cache(folder, monkeypatch):
    asked = []

    def download(repo, allow_patterns=None, local_files_only=False):
        asked.append((repo, allow_patterns, local_files_only))
        return str(folder)

    listing = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repo: listing)
    assert open_component("org/name/vae", "vae").folder == folder / "vae"
    wants = ["vae/config.json", "vae/diffusion_pytorch_model.safetensors"]
    assert asked.pop() == ("org/name", wants, False)

    def offline(repo):
        raise ConnectionError("no route\nto anywhere")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", offline)
    assert open_pipeline("org/name").folder == folder
    assert asked.pop() == ("org/name", None, True)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: offline(""))
    with pytest.raises(UserError, match=r"'org/name'.*hub did not give it \(ConnectionError: no"):
        open_pipeline("org/name")
