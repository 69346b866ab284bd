"""Folders, tokenizers and keys that do not fit each other: one line each, before any training."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.numpy import load_file, save_file
from transformers import JanusVQVAE, JanusVQVAEConfig

from jaxft import export
from jaxft.core.errors import UserError
from jaxft.core.params import ADAPTER_ROLE, Leaf
from jaxft.tasks.image_tokens.opened import open_folder, open_model
from jaxft.tasks.image_tokens.options import ImageTokenOptions, TokenSample
from jaxft.tasks.image_tokens.task import IMAGE_TOKENS
from tests.tiny_autoencoders import make_vqmodel
from tests.tiny_image_tokens import CODES, SIZE


def options(**changes):
    keys = {"resolution": SIZE, "cache": "x", "caption_dropout": 0.1, "max_caption_tokens": 24}
    return ImageTokenOptions(**{**keys, "sample": TokenSample((), 3.0), **changes})


@pytest.fixture(scope="module")
def vq(tmp_path_factory):
    return make_vqmodel(tmp_path_factory.mktemp("vq") / "vq", CODES)


@pytest.fixture(scope="module")
def whole(make_folder, vq):
    """A folder of family N, put together by hand."""
    text = open_model(str(make_folder()), options(graft=str(vq)), True, 0)
    folder = make_folder(vocab_size=text.layout.vocab_size)
    (folder / "imagetoken.json").write_text(text.layout.to_json())
    shutil.copytree(vq, folder / "vq")
    return folder


@pytest.fixture
def broken(whole, tmp_path):
    """A copy of the folder, and a way to change keys of one of its JSON files."""
    folder = Path(shutil.copytree(whole, tmp_path / "broken"))

    def change(file, **keys):
        found = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps({**found, **keys}))
        return folder

    return change


def fails(words, folder, **changes):
    with pytest.raises(UserError) as error:
        open_model(str(folder), options(**changes), True, 0)
    shown = str(error.value)
    assert "\n" not in shown
    for word in words:
        assert str(word) in shown, f"{word!r} is not in {shown!r}"


def test_what_stands_opens(whole, vq):
    made = open_model(str(whole), options(prompt="say {caption}"), True, 0)
    assert made.layout.prompt == "say {caption}" and made.layout.max_caption_tokens == 24
    assert "vq/config.json" in made.side_files(None)
    same = open_model(str(whole), options(tokenizer=str(vq)), True, 0)
    assert same.vq.fingerprint == made.vq.fingerprint


def test_another_decoder_is_the_same_tokenizer_and_another_encoder_is_not(whole, vq, tmp_path):
    """A decoder that was tuned on keeps all cached codes valid."""
    for name, ok in (("decoder", True), ("encoder", False)):
        folder = Path(shutil.copytree(vq, tmp_path / name))
        state = load_file(folder / "diffusion_pytorch_model.safetensors")
        state[f"{name}.conv_in.weight"] = state[f"{name}.conv_in.weight"] + 0.1
        save_file(state, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        if ok:
            open_model(str(whole), options(tokenizer=str(folder)), True, 0)
        else:
            fails(["imagetoken.json", "mean something else"], whole, tokenizer=str(folder))


def test_a_tokenizer_of_another_codebook_size(whole, tmp_path):
    other = make_vqmodel(tmp_path / "other", 2 * CODES)
    words = [f"codes={CODES}", other, f"codebook of {2 * CODES}"]
    fails(words, whole, tokenizer=str(other))


def test_a_vocabulary_of_another_model(broken):
    fails(["vocab_size=341", "image_offset=324"], broken("config.json", vocab_size=341))


def test_pad_is_the_unknown_id(broken):
    """Then the null and the padding would be words of captions."""
    folder = broken("imagetoken.json", pad=323)
    content = json.loads((folder / "tokenizer.json").read_text())
    token = {"id": 323, "content": "<unk>", "single_word": False, "lstrip": False}
    token |= {"rstrip": False, "normalized": False, "special": True}
    filler = [{**token, "id": i, "content": f"<x{i}>"} for i in range(320, 323)]
    content["added_tokens"] += [*filler, token]
    (folder / "tokenizer.json").write_text(json.dumps(content))
    broken("tokenizer_config.json", unk_token="<unk>")
    fails(["pad=323", "unknown tokens"], folder)


def test_a_template_whose_tokens_the_tokenizer_lacks(whole, broken):
    fails(["<|User|>", "no token"], whole, prompt="<|User|>: {caption}")
    fails(["{caption} once"], broken("imagetoken.json", prompt="a picture"))


def test_sizes(whole, make_folder, vq):
    fails(["resolution=32", "8x8 codes", "set resolution=16"], whole, resolution=32)
    fails(["max_caption_tokens=250", "256"], whole, max_caption_tokens=250)


def test_pickled_tokenizers_are_refused_with_the_way_to_convert(make_folder, vq, tmp_path):
    """Trap 30: LlamaGen publishes vq_ds16_t2i.pt."""
    (tmp_path / "vq_ds16_t2i.pt").write_bytes(b"x")
    (tmp_path / "config.json").write_text((vq / "config.json").read_text())
    fails(["vq_ds16_t2i.pt", "can run code"], make_folder(), graft=str(tmp_path))


def test_keys_that_exclude_each_other(whole, make_folder, vq):
    fails(["imagetoken.json", "graft"], make_folder())
    fails(["generates images already"], whole, graft=str(vq))
    fails(["two VQ tokenizers"], make_folder(), graft=str(vq), tokenizer=str(vq))


def test_a_folder_without_its_tokenizer(broken):
    folder = broken("imagetoken.json")
    shutil.rmtree(folder / "vq")
    fails(["vq", "tokenizer="], folder)


def test_a_janus_tokenizer_serves(make_folder, tmp_path):
    config = JanusVQVAEConfig(
        embed_dim=4, num_embeddings=32, latent_channels=8, base_channels=32,
        channel_multiplier=[1, 1], num_res_blocks=1, num_patches=8,
    )  # fmt: skip
    JanusVQVAE(config).save_pretrained(tmp_path / "janus")
    made = open_model(str(make_folder()), options(graft=str(tmp_path / "janus")), True, 0)
    assert made.layout.codes == 32 and made.layout.grid == (8, 8)


def test_the_authors_layout_is_of_a_janus_alone(whole):
    with pytest.raises(UserError, match="of family N"):
        open_model(str(whole), options(), True, 0).original_files(None)


def test_an_adapter_needs_a_base_that_is_there(make_folder, vq):
    model = open_model(str(make_folder()), options(graft=str(vq)), True, 0)
    opened, task = SimpleNamespace(parts=(model.part,)), IMAGE_TOKENS
    cfg, leaves = SimpleNamespace(model="x"), {"a.lora_a": Leaf((), None, (), role=ADAPTER_ROLE)}
    with pytest.raises(UserError, match="was grafted onto x"):
        run = SimpleNamespace(task=task, opened=opened, cfg=cfg, leaves=leaves, chosen=set())
        export.check_kind(run, "adapter")


def test_a_graft_has_no_resolution_of_its_own(make_folder, vq, whole):
    fails(["resolution=0", "before its graft"], make_folder(), graft=str(vq), resolution=0)
    assert open_folder(str(whole)).layout.grid == (8, 8)


def test_an_adapters_folder_says_what_to_do(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is an adapter; give its base by model=MODEL .*lora\.from"
    ):
        open_model(str(tmp_path), options(), True, 0)
