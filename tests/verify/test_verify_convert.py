"""Pickled weights: the advice of the error, followed to the letter, gives a model that opens."""

import json
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from jaxft.core.errors import UserError
from jaxft.verify.convert import convert, main
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders.diffusers import open_component, open_pipeline
from tests.tiny_pipelines import make_pipeline

W = torch.arange(16.0).reshape(4, 4)
SHARDS = {
    "pytorch_model-00001-of-00002.bin": {"a": W},
    "pytorch_model-00002-of-00002.bin": {"b": W.half()},
}
INDEX = {"weight_map": {"a": "pytorch_model-00001-of-00002.bin"}}
INDEX["weight_map"]["b"] = "pytorch_model-00002-of-00002.bin"
TIED = {"embed.weight": W, "lm_head.weight": W, "half": W[:2], "turned": W.T}
# name: (files, index or None, what to open, the tensors that it has to hold)
CASES = {
    "ckpt": (
        {"sd.ckpt": {"state_dict": {"x": W, "n": torch.tensor(3)}, "global_step": 1}},
        None,
        "sd.ckpt",
        {"x": W, "n": torch.tensor(3)},
    ),
    "shards": (SHARDS, None, "", {"a": W, "b": W.half()}),
    "shards with an index": (SHARDS, INDEX, "", {"a": W, "b": W.half()}),
    "tied": ({"pytorch_model.bin": TIED}, None, "", TIED),
    "pt": ({"a.pt": {"a": W.bfloat16()}}, None, "a.pt", {"a": W.bfloat16()}),
    "pth": ({"a.pth": {"model": {"a": W}, "step": 1}}, None, "a.pth", {"a": W}),
    "a trainer's folder": (
        {"pytorch_model.bin": {"a": W}, "optimizer.bin": {"b": W}, "training_args.bin": {"c": W}},
        None,
        "",
        {"a": W},
    ),
}


def advice(where):
    """The line of Python between the backticks of the error."""
    with pytest.raises(UserError, match="pickle files can run code") as caught:
        TensorFiles.open(where)
    assert "\n" not in str(caught.value)
    return re.search("`(.*)`", str(caught.value))[1]


@pytest.mark.parametrize("name", CASES)
def test_case_img_14_the_advice_works_when_followed(name, tmp_path):
    files, index, opened, wanted = CASES[name]
    for file, content in files.items():
        torch.save(content, tmp_path / file)
    if index:
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    exec(advice(tmp_path / opened), {})
    made = TensorFiles.open(tmp_path / "model.safetensors")
    assert set(made.keys()) == set(wanted)
    for key, tensor in wanted.items():
        read = torch.from_numpy(np.asarray(made.read(key), np.float64))
        assert torch.equal(read, tensor.double()) and made.info(key)[0] == tuple(tensor.shape)


def test_a_pipeline_of_pickles_is_converted_whole(tmp_path):
    made = make_pipeline(tmp_path)
    made.save_pretrained(tmp_path / "pipe")
    for file in (tmp_path / "pipe").rglob("*.safetensors"):
        name = "pytorch_model" if file.stem == "model" else file.stem
        module = getattr(made, file.parent.name)
        torch.save(module.state_dict(), file.with_name(f"{name}.bin"))
        file.unlink()
    with pytest.raises(UserError, match="pickle") as caught:
        open_pipeline(str(tmp_path / "pipe"))
    with pytest.raises(UserError, match="leave out other"):
        convert(tmp_path / "pipe", "other")
    exec(re.search("`(.*)`", str(caught.value))[1], {})
    pipe = open_pipeline(str(tmp_path / "pipe"))
    for name, source in pipe.components.items():
        for key, tensor in getattr(made, name).state_dict().items():
            np.testing.assert_array_equal(source.tensors.read(key), tensor)


def test_a_component_with_sharded_pickles(tmp_path):
    vae = make_pipeline(tmp_path).vae
    vae.save_pretrained(tmp_path / "vae", safe_serialization=False, max_shard_size="20KB")
    exec(advice(tmp_path / "vae"), {})
    source = open_component(str(tmp_path / "vae"), "vae")
    assert set(source.tensors.keys()) == set(vae.state_dict())
    again = AutoencoderKL.from_pretrained(tmp_path / "vae", use_safetensors=True)
    assert torch.equal(again.quant_conv.weight, vae.quant_conv.weight)


class Code:
    """A pickle that would run code."""

    def __reduce__(self):
        return print, ("code ran",)


def test_what_cannot_be_converted_is_one_line(tmp_path, capsys):
    torch.save({"a": W, "b": Code()}, tmp_path / "bad.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(b"PK\x03\x04")
    torch.save([1, 2], tmp_path / "list.ckpt")
    torch.save({"a": W.to(torch.complex64)}, tmp_path / "complex.ckpt")
    torch.save({"a": W}, tmp_path / "good.ckpt")
    for name, words in {
        "bad.ckpt": "restricted reader refuses it",
        "cut.ckpt": "restricted reader refuses it",
        "list.ckpt": "no mapping from names to tensors",
        "complex.ckpt": "complex64 has no place",
        "absent.ckpt": "no such file",
        "": "found no pickled weights",
    }.items():
        with pytest.raises(UserError, match=words):
            convert(tmp_path / name)
    assert main([str(tmp_path / "good.ckpt"), str(tmp_path / "b.safetensors")]) == 0
    assert main([str(tmp_path / "good.ckpt"), str(tmp_path / "b.safetensors")]) == 2
    assert main([]) == 2
    shown = capsys.readouterr()
    assert "b.safetensors: 1 tensors of good.ckpt" in shown.out and "exists already" in shown.err
    assert "code ran" not in shown.out and not list(tmp_path.glob("model*"))
