"""Single files of Z-Image, with diffusers' own converter as the oracle."""

import numpy as np
import pytest
import torch
from diffusers import ZImageTransformer2DModel
from diffusers.loaders.single_file_utils import (
    convert_z_image_transformer_checkpoint_to_diffusers as converted,
)
from safetensors.torch import load_file

from jaxft.models.denoisers.zimage.zimage_config import ZImageConfig
from jaxft.models.denoisers.zimage.zimage_single_file import zimage_layout
from jaxft.weights.files.tensor_files import TensorFiles
from jaxft.weights.folders import single_file
from jaxft.weights.transfer import Export
from tests.models.denoisers.mmdit.test_mmdit_single_file import whole
from tests.models.denoisers.zimage.test_zimage import TINY

STEM = "model.diffusion_model."
LAYOUT = zimage_layout(ZImageConfig.from_hf(TINY))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """diffusers' random model, and our single file of it."""
    torch.manual_seed(0)
    theirs, work = ZImageTransformer2DModel(**TINY), tmp_path_factory.mktemp("zimage")
    theirs.save_pretrained(work)
    (work / "single").mkdir()
    parts = {"transformer": (whole(TensorFiles.open(work)), LAYOUT)}
    return theirs, single_file.write(work / "single" / "z.safetensors", parts)


def test_diffusers_converts_our_file_to_the_same_bytes_and_we_read_it_back(written):
    theirs, file = written
    state, ours = theirs.state_dict(), load_file(file)
    assert all(key.startswith(STEM) for key in ours)
    assert f"{STEM}layers.1.attention.qkv.weight" in ours and f"{STEM}x_embedder.bias" in ours
    made = converted(ours)
    assert not ours and made.keys() == state.keys()
    assert all(torch.equal(made[key], state[key]) for key in state)
    back = single_file.as_diffusers(TensorFiles.open(file), LAYOUT)
    assert set(back.keys()) == state.keys()
    assert all(back.read(key).tobytes() == x.numpy().tobytes() for key, x in state.items())


def test_published_shapes_convert_without_a_byte_allocated():
    with torch.device("meta"):
        theirs = ZImageTransformer2DModel()
    state = {key: tuple(tensor.shape) for key, tensor in theirs.state_dict().items()}
    export = Export({key: (shape, np.dtype(np.float32)) for key, shape in state.items()}, iter(()))
    infos = single_file.to_ldm(export, zimage_layout(ZImageConfig.from_hf({}))).infos
    assert infos[f"{STEM}layers.29.attention.qkv.weight"][0] == (3 * 3840, 3840)
    file = {key: torch.empty(shape, device="meta") for key, (shape, _) in infos.items()}
    made = converted(file)
    assert {key: tuple(tensor.shape) for key, tensor in made.items()} == state and not file
