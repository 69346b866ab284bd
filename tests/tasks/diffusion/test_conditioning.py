"""Pictures and masks from the command line: their sizes and colours, and what is refused."""

from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxft.core.errors import UserError
from jaxft.models.pipelines.stable_diffusion import HOLE, NOTHING, SOURCE
from jaxft.tasks import Request
from jaxft.tasks.diffusion import conditioning

SIDE = 16  # pixels


def saved(path, pixels):
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    """Paths of a picture and of a mask of its size, black but for a part in white."""
    picture, mask = np.full((SIDE, SIDE, 3), 128), np.zeros((SIDE, SIDE))
    mask[3:12, 5:16] = 255
    image = saved(tmp_path / "image.png", picture)
    return SimpleNamespace(image=image, mask=saved(tmp_path / "mask.png", mask))


@pytest.mark.parametrize(
    ("kind", "image", "mask", "words"),
    [
        (HOLE, None, None, "--image=PATH is missing: an inpainting model needs it"),
        (HOLE, "image", None, "--mask=PATH is missing"),
        (HOLE, "image", "small", "small.png has 4x8 pixels, the image 16x16"),
        (HOLE, "image", "red", "red.png has colours: expected white where to fill"),
        (HOLE, "image", "black", "black.png is black all over"),
        (HOLE, "gone", "mask", "cannot read .*gone.png: No such file"),
        (HOLE, "image", "text", "text.png: cannot decode the image"),
        (SOURCE, None, None, "--image=PATH is missing: an InstructPix2Pix model"),
        (SOURCE, "image", "mask", "--mask=.*mask.png: an InstructPix2Pix model takes none"),
        (NOTHING, "image", None, "--image=.*: a text-to-image model takes none"),
    ],
)
def test_what_is_asked_wrongly(files, tmp_path, kind, image, mask, words):
    saved(tmp_path / "small.png", np.full((8, 4), 255))
    saved(tmp_path / "red.png", np.full((SIDE, SIDE, 3), (255, 0, 0)))
    saved(tmp_path / "black.png", np.zeros((SIDE, SIDE)))
    (tmp_path / "text.png").write_text("no picture")
    known = {"image": files.image, "mask": files.mask, None: None}
    paths = [known.get(x, str(tmp_path / f"{x}.png")) for x in (image, mask)]
    request = Request(image=paths[0], mask=paths[1])
    with pytest.raises(UserError, match=words) as caught:
        conditioning.asked(SimpleNamespace(conditioning=kind), request, ((SIDE, SIDE),), 1)
    assert "\n" not in str(caught.value)


def test_a_grey_or_rgb_mask_is_cut_in_the_middle(files, tmp_path):
    """As diffusers binarizes it."""
    values = np.linspace(0, 255, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint8)
    wanted = (values / 255 >= 0.5)[..., None]
    for name, pixels in (("grey", values), ("rgb", values[..., None].repeat(3, axis=-1))):
        path = saved(tmp_path / f"{name}.png", pixels)
        request = Request(image=files.image, mask=path)
        made = conditioning.asked(SimpleNamespace(conditioning=HOLE), request, ((SIDE, SIDE),), 3)
        assert made["mask"].shape == (3, SIDE, SIDE, 1) and made["mask"].dtype == np.float32
        assert np.array_equal(made["mask"][2], wanted), name
