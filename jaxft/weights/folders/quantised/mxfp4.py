"""MXFP4: the experts of GPT-OSS in blocks of 4 bits, which are decoded to bfloat16 when read.

A block of 32 values has one scale, a power of 2. Source: OCP Microscaling Formats (MX) v1.0.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float, UInt8

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import Info, Tensors

CODES, SCALES = "_blocks", "_scales"  # the ends of names
BLOCK_BYTES = 16  # two values a byte
SCALE_BIAS = 127  # a scale s is 2^(s - 127)
FP4_VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # then the negative ones
BF16 = np.dtype(ml_dtypes.bfloat16)


def is_mxfp4(config: Mapping[str, Any]) -> bool:
    """Return True for a config.json of GPT-OSS whose experts are in MXFP4."""
    stated = config.get("quantization_config")
    method = stated.get("quant_method") if isinstance(stated, dict) else None
    return config.get("model_type") == "gpt_oss" and method == "mxfp4"


class Mxfp4Tensors:
    """The tensors of a checkpoint in MXFP4 under the names of the 16-bit model, in its shapes.

    Raises: UserError for codes without scales, and for arrays that do not fit each other.
    """

    def __init__(self, tensors: Tensors, where: str):
        self._tensors, self._names = tensors, dict.fromkeys(tensors.keys(), "")
        for key in tensors.keys():  # noqa: SIM118
            if not key.endswith(CODES):
                continue
            name = key.removesuffix(CODES)
            if name + SCALES not in self._names or name in self._names:
                raise UserError(
                    f"{where}: tensor {key} needs {name}{SCALES} beside it, and no {name}; get the"
                    " folder again"
                )
            (shape, dtype), scales = tensors.info(key), tensors.info(name + SCALES)
            fits = len(shape) == 4 and shape[-1] == BLOCK_BYTES and scales[0] == shape[:3]
            if not fits or {dtype, scales[1]} != {np.dtype(np.uint8)}:
                raise UserError(
                    f"{where}: tensor {key} is {dtype} {shape} and {name}{SCALES} {scales[1]}"
                    f" {scales[0]}; expected uint8 [E, F, G, {BLOCK_BYTES}] and [E, F, G]"
                )
            self._names[key] = name
            del self._names[name + SCALES]
        self._keys = {name or key: key for key, name in self._names.items()}

    def keys(self) -> Sequence[str]:
        return list(self._keys)

    def info(self, key: str) -> Info:
        own = self._keys[key]
        if own == key:
            return self._tensors.info(key)
        count, outputs, groups, _ = self._tensors.info(own)[0]
        return (count, groups * BLOCK_BYTES * 2, outputs), BF16

    def read(self, key: str) -> np.ndarray:
        own = self._keys[key]
        if own == key:
            return self._tensors.read(key)
        return decode_mxfp4(self._tensors.read(own), self._tensors.read(key + SCALES))


def decode_mxfp4(
    blocks: UInt8[np.ndarray, "E F G 16"], scales: UInt8[np.ndarray, "E F G"]
) -> Float[np.ndarray, "E D F"]:
    """Return the bfloat16 values, D = 32 G, as transformers does. The low 4 bits come first.

    A scale of 255 gives numbers that are not finite.
    """
    count, outputs, groups, _ = blocks.shape
    made = np.empty((count, groups * BLOCK_BYTES * 2, outputs), BF16)
    for expert in range(count):  # the indices of all would take 16 times the memory of the codes
        pairs = _pairs()[scales[expert][..., None], blocks[expert]]  # [F, G, 16]
        made[expert] = pairs.view(BF16).reshape(outputs, -1).T  # [D, F]
    return made


@cache
def _pairs() -> np.ndarray:
    """Return the two values of each byte for each scale, as one uint32, [256, 256]."""
    values = np.concatenate([FP4_VALUES, -FP4_VALUES])
    with np.errstate(over="ignore", invalid="ignore"):
        factors = np.exp2(np.arange(256, dtype=np.float32) - SCALE_BIAS)
        every = (values * factors[:, None]).astype(BF16)  # [256, 16]
    codes = np.arange(256)
    pairs = np.stack([every[:, codes & 15], every[:, codes >> 4]], axis=-1)  # [256, 256, 2]
    return np.ascontiguousarray(pairs).view(np.uint32)[..., 0]
