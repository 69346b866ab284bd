"""The original layout of Janus: a bijection of names, both configs, a folder read and written."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import JanusForConditionalGeneration

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.pipelines.janus import JanusConfig
from jaxft.weights import transfer
from jaxft.weights.files.tensor_files import TensorFiles, write_sharded
from jaxft.weights.folders import janus_original as janus_layout
from jaxft.weights.folders.janus_original import transformers_keyed
from jaxft.weights.transfer import Export
from tests.tasks.image_tokens.test_janus import opened, written
from tests.tiny_janus import PRO_1B, make_janus_model, published

# As DeepSeek's modules are called (Janus-Pro), beside transformers' names for them.
PAIRS = {
    "language_model.model.layers.1.mlp.up_proj.weight": (
        "model.language_model.layers.1.mlp.up_proj.weight"
    ),
    "language_model.lm_head.weight": "lm_head.weight",
    "gen_embed.weight": "model.generation_embeddings.weight",
    "gen_aligner.layers.0.bias": "model.generation_aligner.fc1.bias",
    "gen_aligner.layers.2.weight": "model.generation_aligner.hidden_layers.0.weight",
    "gen_head.output_mlp_projector.weight": "model.generation_head.proj_out.weight",
    "gen_head.vision_head.bias": "model.generation_head.vision_head.bias",
    "aligner.layers.2.weight": "model.aligner.hidden_layers.0.weight",
    "gen_vision_model.encoder.conv_blocks.0.res.0.norm1.weight": (
        "model.vqmodel.encoder.down.0.block.0.norm1.weight"
    ),
    "gen_vision_model.encoder.conv_blocks.1.attn.0.q.weight": (
        "model.vqmodel.encoder.down.1.attn.0.q.weight"
    ),
    "gen_vision_model.decoder.conv_blocks.0.upsample.conv.bias": (
        "model.vqmodel.decoder.up.0.upsample.conv.bias"
    ),
    "gen_vision_model.decoder.mid.1.norm.bias": "model.vqmodel.decoder.mid.attn_1.norm.bias",
    "gen_vision_model.quantize.embedding.weight": "model.vqmodel.quantize.embedding.weight",
    "vision_model.vision_tower.blocks.1.norm2.bias": (
        "model.vision_model.encoder.layers.1.layer_norm2.bias"
    ),
    "vision_model.vision_tower.blocks.1.attn.proj.weight": (
        "model.vision_model.encoder.layers.1.self_attn.projection_layer.weight"
    ),
    "vision_model.vision_tower.norm.weight": "model.vision_model.post_layernorm.weight",
    "vision_model.vision_tower.patch_embed.proj.weight": (
        "model.vision_model.embeddings.patch_embedding.weight"
    ),
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    work = tmp_path_factory.mktemp("layout")
    make_janus_model(work / "model")
    return work


def as_original(model):
    """The tensors of an untrained export under the original names."""
    leaves = describe(jax.eval_shape(model.build, jax.random.key(0)))
    return janus_layout.original(transfer.export(model.part, leaves, {}, {}, None))


@pytest.fixture(scope="module")
def folder(work):
    """An original folder: our own export, with what the authors' files hold besides."""
    model, folder = opened(work / "model"), work / "original"
    folder.mkdir()
    made = as_original(model)
    more = {
        "vision_model.vision_tower.attn_pool.q.weight": np.ones((2, 2), np.float32),
        "gen_vision_model.quantize.codebook_used": np.zeros(8, np.float32),
    }
    tensors = {**dict(made.tensors), **more}
    assert {k: (v.shape, v.dtype) for k, v in tensors.items() if k not in more} == made.infos
    write_sharded(folder, tensors.items(), {k: (v.shape, v.dtype) for k, v in tensors.items()})
    for name, content in model.original_files(None).items():
        content = content if isinstance(content, bytes) else content.read_bytes()
        (folder / name).write_bytes(content)
    config = json.loads((folder / "config.json").read_text())
    # The authors have one size of tokenizer.
    small = {"latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1]}
    config["gen_vision_config"]["params"] |= {**small, "num_res_blocks": 1}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_p8_names_are_the_authors_and_a_bijection(work, folder):
    theirs, source = load_file(folder / "model.safetensors"), written(opened(work / "model"))
    for original, stock in PAIRS.items():
        np.testing.assert_array_equal(theirs[original], source[stock])
    stem = "model.vision_model.encoder.layers.0.self_attn."
    thirds = [source[f"{stem}{letter}_proj.weight"] for letter in "qkv"]
    fused = theirs["vision_model.vision_tower.blocks.0.attn.qkv.weight"]
    np.testing.assert_array_equal(fused, np.concatenate(thirds))
    assert theirs["vision_model.vision_tower.pos_embed"].shape == (1, 36, 16)
    back = transformers_keyed(TensorFiles.open(folder), "x")
    assert set(back.keys()) == source.keys()
    for key, tensor in source.items():
        assert back.read(key).tobytes() == tensor.tobytes(), key
        assert back.info(key) == (tensor.shape, tensor.dtype)


def test_p8_every_name_of_the_published_sizes_goes_there_and_back():
    with torch.device("meta"):
        hf = JanusForConditionalGeneration(published(*PRO_1B))
    infos = {k: (tuple(v.shape), np.dtype(np.float32)) for k, v in hf.state_dict().items()}
    made = janus_layout.original(Export(infos, iter(())))
    assert len(made.infos) == 964 - 2 * 2 * 24  # q, k, v of 24 layers, weight and bias

    class Headers:
        def keys(self):
            return list(made.infos)

        def info(self, key):
            return made.infos[key]

        def read(self, key):
            raise AssertionError(key)

    back = transformers_keyed(Headers(), "x")
    assert {key: back.info(key) for key in back.keys()} == infos  # noqa: SIM118


def test_an_original_folder_opens_and_exports_as_transformers_reads_it(work, folder, tmp_path):
    model, source = opened(folder), opened(work / "model")
    assert model.layout == source.layout and model.cfg == source.cfg
    assert model.vq.fingerprint == source.vq.fingerprint
    ours, theirs = written(model), written(source)
    assert {k: v.tobytes() for k, v in ours.items()} == {k: v.tobytes() for k, v in theirs.items()}
    files = {k: v for k, v in model.side_files(None).items() if k.endswith("_config.json")}
    processor = json.loads(files["preprocessor_config.json"])
    assert processor["image_processor_type"] == "JanusImageProcessor"
    assert processor["image_mean"] == [0.5] * 3 and processor["size"]["height"] == 96
    assert "processor_config.json" not in files
    config = json.loads(model.side_files(None)["config.json"])
    assert config["model_type"] == "janus" and config["tie_word_embeddings"] is False


def test_the_published_config_both_ways():
    """Keys of Janus-Pro-1B's own config.json."""
    config = published(*PRO_1B).to_dict()
    original = janus_layout.original_config(config)
    assert original["gen_vision_config"]["params"] == {"image_token_size": 16384, "n_embed": 8}
    assert original["gen_aligner_config"]["params"]["input_dim"] == 8
    assert original["gen_head_config"]["params"]["image_token_embed"] == 2048
    assert original["vision_config"]["params"]["image_size"] == 384
    back = janus_layout._transformers_config(original, "x")
    assert JanusConfig.from_hf(back) == JanusConfig.from_hf(config)


def test_what_is_no_janus(folder, tmp_path):
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    config = json.loads((broken / "config.json").read_text())
    config["vision_config"]["params"]["model_name"] = "siglip_so400m_patch14_384"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="siglip_so400m_patch14_384' is not supported"):
        opened(broken)
    tensors = {"wte.weight": np.zeros(2, np.float32)}
    write_sharded(tmp_path, tensors.items(), {"wte.weight": ((2,), np.dtype(np.float32))})
    with pytest.raises(UserError, match=r"here: tensor wte\.weight is none of a Janus"):
        transformers_keyed(TensorFiles.open(tmp_path), "here")
