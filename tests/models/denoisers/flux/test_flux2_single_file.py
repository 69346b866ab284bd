"""Single files of FLUX.2 klein, with diffusers' own converter as the oracle."""

import numpy as np
import torch
from diffusers import Flux2Transformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers as converted,
)
from safetensors.torch import load_file

from jaxft.models.denoisers.flux.flux2_config import Flux2Config
from jaxft.models.denoisers.flux.flux2_single_file import flux2_layout
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import single_file
from jaxft.weights.transfer import Export
from tests.models.denoisers.flux.test_flux2 import meta, published
from tests.models.denoisers.mmdit.test_mmdit_single_file import whole
from tests.tiny_klein import TRANSFORMER

STEM = "model.diffusion_model."


def test_diffusers_converts_our_single_file_to_the_same_bytes_and_we_read_it_back(tmp_path):
    torch.manual_seed(0)
    theirs = Flux2Transformer2DModel(**TRANSFORMER)
    layout = flux2_layout(Flux2Config.from_hf(TRANSFORMER))
    theirs.save_pretrained(tmp_path)
    (tmp_path / "single").mkdir()
    parts = {"transformer": (whole(TensorFiles.open(tmp_path)), layout)}
    file = single_file.write(tmp_path / "single" / "k.safetensors", parts)
    state, ours = theirs.state_dict(), load_file(file)
    assert all(key.startswith(STEM) for key in ours)
    assert f"{STEM}double_blocks.1.img_attn.qkv.weight" in ours
    assert f"{STEM}single_blocks.1.linear1.weight" in ours
    # The converter fails on the prefix, which ComfyUI expects in a file with a VAE.
    made = converted({key.removeprefix(STEM): x for key, x in ours.items()})
    assert made.keys() == state.keys()
    assert all(torch.equal(made[key], state[key]) for key in state)
    back = single_file.as_diffusers(TensorFiles.open(file), layout)
    assert set(back.keys()) == state.keys()
    assert all(back.read(key).tobytes() == x.numpy().tobytes() for key, x in state.items())


def test_published_shapes_convert_without_a_byte_allocated():
    state = {key: tuple(tensor.shape) for key, tensor in meta("4B").state_dict().items()}
    export = Export({key: (shape, np.dtype(np.float32)) for key, shape in state.items()}, iter(()))
    layout = flux2_layout(Flux2Config.from_hf(published("4B")))
    infos = single_file.to_ldm(export, layout).infos
    assert infos[f"{STEM}single_blocks.19.linear1.weight"][0] == (9 * 3072, 3072)
    file = {
        key.removeprefix(STEM): torch.empty(shape, device="meta")
        for key, (shape, _) in infos.items()
    }
    assert {key: tuple(tensor.shape) for key, tensor in converted(file).items()} == state
