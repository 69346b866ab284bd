"""Names that files state, and links in folders: nothing outside is published or written."""

import json
import os
import shutil
import tarfile
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from jaxft import train
from jaxft.core.errors import UserError
from jaxft.core.guards.inside import is_below, is_inside, refuse_outside
from jaxft.data.sources.schemes import open_images
from jaxft.verify.convert import convert
from jaxft.weights.folders.diffusers import open_pipeline, pipeline_files
from jaxft.weights.folders.transformers import open_source
from tests.tiny_pipelines import make_pipeline


@pytest.mark.parametrize(
    ("name", "inside"),
    [
        ("a", True),
        ("sub/a", True),
        ("", False),
        ("é" * 127, True),
        ("é" * 128, False),
        ("\ud800", False),
        (".", False),
        ("..", False),
        ("../a", False),
        ("sub/../../a", False),
        ("sub/../a", False),
        ("/a", False),
        ("a\\b", False),
        ("a\0", False),
        ("absent", True),
        ("out", False),
        ("sub/out", False),
        ("folder/a", False),
        ("in", True),
    ],
)
def test_names_and_links(tmp_path, name, inside):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for place in (folder / "a", folder / "sub" / "a", tmp_path / "secret"):
        place.write_text("")
    for link in ("out", "sub/out"):
        (folder / link).symlink_to(tmp_path / "secret")
    (folder / "folder").symlink_to(tmp_path)
    (folder / "in").symlink_to("sub/a")
    assert is_inside(folder, name) is inside
    (tmp_path / "by-link").symlink_to(folder)
    assert is_inside(tmp_path / "by-link", name) is inside


def hub_cache(folder, home, kind="models"):
    """A folder as the hub's client keeps it: links to blobs."""
    repo = home / f"{kind}--org--name"
    (repo / "blobs").mkdir(parents=True)
    for number, file in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        place = repo / "snapshots" / "0" / file.relative_to(folder)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, repo / "blobs" / str(number))
        place.symlink_to(os.path.relpath(repo / "blobs" / str(number), place.parent))
    return repo / "snapshots" / "0"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("pipes")
    make_pipeline(place).save_pretrained(place / "pipe")
    return place / "pipe"


def test_fault_8_hub_caches_open(tmp_path, make_folder, pipe):
    cached = hub_cache(make_folder(), tmp_path / "one")
    plain = open_source(str(make_folder()))
    assert open_source(str(cached)).side_files.keys() == plain.side_files.keys()
    cached = hub_cache(pipe, tmp_path / "two")
    ours, theirs = (pipeline_files(open_pipeline(str(folder))) for folder in (cached, pipe))
    assert ours.keys() == theirs.keys()
    # A folder that is only named like one, with a link elsewhere.
    blobs = tmp_path / "one" / "models--org--name" / "blobs"
    shutil.move(blobs, tmp_path / "elsewhere")
    blobs.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="leads out of"):
        open_source(str(tmp_path / "one" / "models--org--name" / "snapshots" / "0"))


def test_fault_8_a_linked_side_file_is_not_published(tmp_path, make_folder, make_flags, capsys):
    secret = tmp_path / "passwd"
    secret.write_text("root:x:0:0")
    model = tmp_path / "model"
    shutil.copytree(make_folder(), model)
    (model / "LICENSE.txt").symlink_to(secret)
    flags = make_flags(model, {"total": "0_steps"})
    command = ["--config", "configs/llm.py", "--workdir", str(tmp_path / "run"), *flags]
    assert train.main(command) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert "LICENSE.txt: a link that leads out" in error[-1]
    assert not (tmp_path / "run" / "export").exists()


LINKS = {
    "a side file": ("LICENSE.txt", "passwd"),
    "a file of another folder": ("tokenizer/notes.txt", "passwd"),
    "a component's config": ("unet/config.json", "victim/config.json"),
    "a component's weights": ("unet/diffusion_pytorch_model.safetensors", "victim/secret"),
    "a component": ("vae", "victim"),
    "another folder": ("tokenizer", "victim"),
}


@pytest.mark.parametrize("case", LINKS)
def test_fault_8_w6_links_out_of_a_pipeline_are_refused(pipe, tmp_path, case):
    name, target = LINKS[case]
    (tmp_path / "victim").mkdir()
    for file in ("passwd", "victim/config.json", "victim/secret"):
        (tmp_path / file).write_text("{}")
    model = tmp_path / "pipe"
    shutil.copytree(pipe, model)
    if (model / name).is_dir():
        shutil.rmtree(model / name)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=name.partition("/")[0]) as caught:
        open_pipeline(str(model), weights=False)
        open_pipeline(str(model))
    assert "link" in str(caught.value)


@pytest.mark.parametrize("key", ["../victim/secret", "/etc", "..", "a/b", "a\\b"])
def test_fault_8_components_are_folders_of_the_pipeline(pipe, tmp_path, key):
    model = tmp_path / "pipe"
    shutil.copytree(pipe, model)
    (tmp_path / "victim" / "secret").mkdir(parents=True)
    (tmp_path / "victim" / "secret" / "key.txt").write_text("private")
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, key: ["diffusers", "X"]}))
    with pytest.raises(UserError, match=r"model_index\.json: component .*expected the name"):
        open_pipeline(str(model), weights=False)


def test_fault_8_a_sharded_pickle_does_not_name_files_outside(tmp_path):
    (tmp_path / "model").mkdir()
    torch.save({"weight": torch.ones(2)}, tmp_path / "victim.bin")
    index = {"weight_map": {"weight": "../victim.bin"}}
    (tmp_path / "model" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"names '\.\./victim\.bin'; expected files beside it"):
        convert(tmp_path / "model")


def png(value):
    stream = BytesIO()
    Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def test_d6_members_of_a_tar_are_read_by_offset_and_never_written(tmp_path):
    (tmp_path / "private.png").write_bytes(png(9))
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        links = {"link": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE}
        for name in ("../out", "/abs", *links):
            info = tarfile.TarInfo(f"{name}.png")
            info.type = links.get(name, tarfile.REGTYPE)
            info.linkname = str(tmp_path / "private.png") if name in ("link", "hard") else ""
            content = b"" if name in links else png(1)
            info.size = len(content)
            tar.addfile(info, BytesIO(content))
    before = sorted(tmp_path.rglob("*"))
    records = open_images(f"wds:{tmp_path / 'set.tar'}", captions=False)
    assert [records[i].content for i in range(len(records))] == [png(1)] * 2
    assert sorted(tmp_path.rglob("*")) == before


def test_paths_below_a_folder(tmp_path):
    assert is_below(tmp_path, tmp_path / "a" / ".." / "b")
    assert not is_below(tmp_path / "a", tmp_path / "a" / ".." / "b")
    assert not is_below(tmp_path / "a", tmp_path / "ab")
    refuse_outside(tmp_path, [tmp_path / "absent"])
