"""LoKr: updates W1 x W2 of Kronecker, with W2 of low rank. Sizes of the factors, and their files.

Source: Yeh et al. 2023, arXiv:2309.14859, section 3.2, and the package lycoris-lora.
"""

import numpy as np

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import Tensors
from jaxft.weights.views import InMemory, Overlaid, Renamed

W1, W2_A, W2_B = "lokr_w1", "lokr_w2_a", "lokr_w2_b"


def factorization(size: int, factor: int) -> tuple[int, int]:
    """Return a number of rows (or columns) as those of W1 and of W2, the smaller one first.

    factor: that of LyCORIS. W1 has so many rows if they divide `size`, otherwise the next smaller
    number that does. -1 makes both as even as they can be.
    """
    if factor > 0 and size % factor == 0:
        first, second = sorted((factor, size // factor))
        return first, second
    root = int(size**0.5)
    most = root if factor < 0 else min(factor, root)
    first = next(one for one in range(most, 0, -1) if size % one == 0)
    return first, size // first


def as_kronecker(file: str, tensors: Tensors, kernels: dict[str, tuple[int, ...]]) -> Tensors:
    """Return the tensors of a LoKr file with W2 under kohya's names of LoRA: W2 = up times down.

    kernels: the sizes (y, x) of the kernels of convolutions, and () of others, by the beginning of
    the keys of each module. Raises: UserError for a file that does not hold LoKr of low rank alone.
    """
    made: dict[str, np.ndarray] = {}
    kept = {}
    for key in tensors.keys():  # noqa: SIM118 (a Tensors is no dict)
        stem, _, piece = key.partition(".")
        kernel = kernels.get(stem, ())
        if piece == W2_A:
            array = tensors.read(key)
            made[f"{stem}.lora_up.weight"] = array.reshape(*array.shape, *(1 for _ in kernel))
        elif piece == W2_B:
            array = tensors.read(key)
            made[f"{stem}.lora_down.weight"] = array.reshape(len(array), -1, *kernel)
        elif piece in (W1, "alpha"):
            kept[key] = key
        else:
            raise UserError(
                f"{file}: {key} is not of a LoKr with a whole W1 and a W2 of low rank, which"
                " lora.lokr trains; leave lora.lokr out, to go on with a LoRA of the same product"
            )
    return Overlaid(Renamed(tensors, kept), InMemory(made))
