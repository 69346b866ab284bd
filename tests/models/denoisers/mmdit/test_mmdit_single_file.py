"""Single files of SD 3 and 3.5, with diffusers' own converter as the oracle."""

import jax
import numpy as np
import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers
from safetensors.torch import load_file

from jaxft.core.errors import UserError
from jaxft.core.params import describe
from jaxft.models.denoisers.mmdit import mmdit
from jaxft.models.denoisers.mmdit.mmdit import MMDiT
from jaxft.models.denoisers.mmdit.mmdit_config import MMDiTConfig
from jaxft.models.denoisers.mmdit.mmdit_single_file import mmdit_layout
from jaxft.weights import rules
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import single_file
from jaxft.weights.transfer import Export

TINY = {
    "sample_size": 8,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 32,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 24,
    "pos_embed_max_size": 8,
}
KINDS = {
    "sd3": TINY,
    "sd35 large": {**TINY, "qk_norm": "rms_norm"},
    "sd35 medium": {**TINY, "qk_norm": "rms_norm", "dual_attention_layers": (0, 1)},
}


@pytest.fixture(scope="module", params=KINDS)
def written(request, tmp_path_factory):
    """(config, diffusers' random model, our single file of it)."""
    torch.manual_seed(0)
    theirs, work = SD3Transformer2DModel(**KINDS[request.param]), tmp_path_factory.mktemp("sd3")
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.add_(0.1 * torch.randn_like(tensor))
    theirs.save_pretrained(work)
    (work / "single").mkdir()
    cfg = MMDiTConfig.from_hf(KINDS[request.param])
    parts = {"transformer": (whole(TensorFiles.open(work)), mmdit_layout(cfg))}
    return cfg, theirs, single_file.write(work / "single" / "sd3.safetensors", parts)


def whole(tensors):
    names = list(tensors.keys())
    arrays = ((key, tensors.read(key)) for key in names)
    return Export({key: tensors.info(key) for key in names}, arrays)


def test_t11_diffusers_converts_our_file_to_the_same_bytes_and_no_key_is_left(written):
    _, theirs, file = written
    state, ours = theirs.state_dict(), load_file(file)
    assert all(key.startswith("model.diffusion_model.") for key in ours)
    made = convert_sd3_transformer_checkpoint_to_diffusers(ours)
    assert not ours and made.keys() == state.keys()
    assert all(torch.equal(made[key], state[key]) for key in state)


def test_t11_diffusers_opens_our_file(written):
    _, theirs, file = written
    read = SD3Transformer2DModel.from_single_file(
        str(file), config=str(file.parents[1]), local_files_only=True
    )
    state = theirs.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in read.state_dict().items())


def test_t11_we_read_the_file_as_its_folder_bit_for_bit(written):
    cfg, theirs, file = written
    ours, state = single_file.as_diffusers(TensorFiles.open(file), mmdit_layout(cfg)), {}
    for key, tensor in theirs.state_dict().items():
        state[key] = tensor.numpy()
    assert set(ours.keys()) == state.keys()
    for key, wanted in state.items():
        array = ours.read(key)
        assert (array.shape, array.dtype) == ours.info(key) == (wanted.shape, wanted.dtype)
        assert array.tobytes() == wanted.tobytes() and array.flags.c_contiguous
    again = single_file.write(
        file.parent / "again.safetensors", {"transformer": (whole(ours), mmdit_layout(cfg))}
    )
    assert {key: t.numpy().tobytes() for key, t in load_file(again).items()} == {
        key: t.numpy().tobytes() for key, t in load_file(file).items()
    }


def test_t11_two_chunks_are_swapped_and_six_are_not(written):
    cfg, theirs, file = written
    ours, state = load_file(file), theirs.state_dict()
    stem, last = "model.diffusion_model.", cfg.num_layers - 1
    for key, name in (
        (f"joint_blocks.{last}.context_block", f"transformer_blocks.{last}.norm1_context.linear"),
        ("final_layer", "norm_out.linear"),
    ):
        for leaf in ("weight", "bias"):
            shift, scale = ours[f"{stem}{key}.adaLN_modulation.1.{leaf}"].chunk(2)
            assert torch.equal(torch.cat([scale, shift]), state[f"{name}.{leaf}"])
    assert torch.equal(
        ours[f"{stem}joint_blocks.0.context_block.adaLN_modulation.1.weight"],
        state["transformer_blocks.0.norm1_context.linear.weight"],
    )


def test_t11_foreign_and_missing_keys_are_named(written):
    cfg, _, file = written
    ours = single_file.as_diffusers(TensorFiles.open(file), mmdit_layout(cfg))
    shapes = {key: ours.info(key)[0] for key in ours.keys()}  # noqa: SIM118
    leaves = describe(jax.eval_shape(lambda: MMDiT(cfg, key=jax.random.key(0))))
    table, sizes = mmdit.rules(cfg), mmdit.sizes(cfg)
    assert rules.plan(table, leaves, shapes, sizes) == rules.expected(table, leaves)
    odd = single_file.as_diffusers(Odd(), mmdit_layout(cfg))
    shapes |= {key: odd.info(key)[0] for key in odd.keys()}  # noqa: SIM118
    del shapes["transformer_blocks.1.attn.to_k.bias"]
    with pytest.raises(UserError) as error:
        rules.plan(table, leaves, shapes, sizes)
    assert "missing tensor transformer_blocks.1.attn.to_k.bias" in str(error.value)
    assert "unexpected tensor joint_blocks.9.x_block.attn.qkv.bias" in str(error.value)


class Odd:
    """A tensor of a block that the model lacks."""

    def keys(self):
        return ["model.diffusion_model.joint_blocks.9.x_block.attn.qkv.bias"]

    def info(self, key):
        return (48,), np.dtype(np.float32)


def test_t11_published_shapes_convert_without_a_byte_allocated():
    config = {"num_layers": 24, "num_attention_heads": 24, "caption_projection_dim": 1536}
    config |= {"dual_attention_layers": tuple(range(13)), "qk_norm": "rms_norm"}
    with torch.device("meta"):
        theirs = SD3Transformer2DModel(**config, pos_embed_max_size=384)
    state = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    export = Export({key: (shape, np.dtype(np.float32)) for key, shape in state.items()}, iter(()))
    infos = single_file.to_ldm(export, mmdit_layout(MMDiTConfig.from_hf(config))).infos
    assert infos["model.diffusion_model.joint_blocks.12.x_block.attn2.qkv.weight"][0] == (
        4608,
        1536,
    )
    file = {key: torch.empty(shape, device="meta") for key, (shape, _) in infos.items()}
    made = convert_sd3_transformer_checkpoint_to_diffusers(file)
    assert {key: tuple(tensor.shape) for key, tensor in made.items()} == state and not file
