"""FP8 weights with scales beside them, which are decoded to the dtype of config.json when read.

A scale is one of the whole weight, of an output, or of a block, such as 128 x 128. The scales of
activations are not read: they serve products of FP8, and training computes in 16 or 32 bits.
Sources of the layouts: transformers' `fp8` and `fbgemm_fp8`, compressed-tensors and ModelOpt.
"""

import re
from collections.abc import Mapping, Sequence
from math import ceil
from typing import Any

import ml_dtypes
import numpy as np
from jaxtyping import Float

from jaxft.core.errors import UserError
from jaxft.weights.files.tensor_files import Info, Tensors

FP8_CODES = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(ml_dtypes.float8_e5m2))
SCALE_ENDS = ("_scale_inv", "_scale")  # ends of the name of a weight's scales; both are factors
OF_ACTIVATIONS = re.compile(r".*[._]((activation|input|output)_scale(_ub)?|[qkv]_scale)")
BYTE_FORMATS = ("float-quantized", "naive-quantized")  # of compressed-tensors, one number a byte
DECODED_ROWS = 1024  # decoded at once


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Return True for a config.json whose weights are in FP8, each in a byte."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict):
        return False
    method = stated.get("quant_method")
    if method == "compressed-tensors":
        groups = stated.get("config_groups")
        groups = list(groups.values()) if isinstance(groups, dict) else []
        weights = [one.get("weights") for one in groups if isinstance(one, dict)]
        kinds = [(one.get("type"), one.get("num_bits")) for one in weights if one]
        return stated.get("format") in BYTE_FORMATS and set(kinds) == {("float", 8)}
    if method == "modelopt":
        return stated.get("quant_algo") == "FP8"
    return method in ("fp8", "fbgemm_fp8") and stated.get("expert_dtype", "fp8") == "fp8"


def read_block(stated: Any, where: str) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, None if config.json states none.

    Raises: UserError for what is no pair of numbers above 0.
    """
    if stated is None:
        return None
    if isinstance(stated, list) and [type(one) for one in stated] == [int, int]:
        rows, columns = stated
        if min(rows, columns) > 0:
            return rows, columns
    raise UserError(
        f"{where}: quantization_config.weight_block_size={stated!r}; expected two numbers above 0,"
        " such as [128, 128]"
    )


class Fp8Tensors:
    """The tensors of a checkpoint in FP8 under the names of the 16-bit model.

    dtype: of what is decoded. block: the rows and columns of a scale, if config.json states them.
    Raises: UserError for codes without scales, and for scales that do not fit them.
    """

    def __init__(self, tensors: Tensors, where: str, dtype: np.dtype, block: Sequence[int] | None):
        self._tensors, self._dtype, self._block = tensors, dtype, block
        names = [key for key in tensors.keys() if not OF_ACTIVATIONS.fullmatch(key)]  # noqa: SIM118
        every = set(names)
        self._scales: dict[str, str] = {}
        for key in names:
            if tensors.info(key)[1] not in FP8_CODES:
                continue
            found = [key + end for end in SCALE_ENDS if key + end in every]
            if not found:
                ends = " or ".join(key + end for end in SCALE_ENDS)
                raise UserError(
                    f"{where}: tensor {key} is in FP8, and {ends} is not beside it; get the folder"
                    " again"
                )
            (shape, _), (grid, kind) = tensors.info(key), tensors.info(found[0])
            if np.dtype(kind).kind not in "fV" or not scale_blocks(shape, grid, block):
                raise UserError(
                    f"{where}: tensor {found[0]} is {kind} {grid}, which are no scales of {key}"
                    f" {shape} in blocks of {block or 'equal size'}; get the folder again"
                )
            self._scales[key] = found[0]
        used = set(self._scales.values())
        self._keys = [key for key in names if key not in used]

    def keys(self) -> Sequence[str]:
        return self._keys

    def info(self, key: str) -> Info:
        shape, dtype = self._tensors.info(key)
        return shape, self._dtype if key in self._scales else dtype

    def read(self, key: str) -> np.ndarray:
        codes = self._tensors.read(key)
        if key not in self._scales:
            return codes
        scales = self._tensors.read(self._scales[key])
        return decode_fp8(codes, scales, self._dtype, self._block)


def scale_blocks(
    shape: tuple[int, ...], grid: tuple[int, ...], block: Sequence[int] | None = None
) -> tuple[int, int] | None:
    """Return the rows and columns that share a scale, or None if such scales do not fit.

    shape: of the weight, [*lead, rows, columns]. grid: of the scales. block: the rows and columns
    that config.json states. The last block of a weight may be smaller, and one scale for all is
    accepted beside it.
    """
    grid = _whole_grid(shape, grid)
    if len(shape) < 2 or len(grid) != len(shape) or grid[:-2] != shape[:-2]:
        return None
    found = []
    for size, count, stated in zip(shape[-2:], grid[-2:], block or (0, 0), strict=True):
        if stated and ceil(size / stated) == count:
            found.append(stated)
        elif count and size % count == 0 and (not stated or set(grid[-2:]) == {1}):
            found.append(size // count)
        else:
            return None
    return found[0], found[1]


def decode_fp8(
    codes: Float[np.ndarray, "*lead N K"],
    scales: Float[np.ndarray, "..."],
    dtype: np.dtype,
    block: Sequence[int] | None = None,
) -> Float[np.ndarray, "*lead N K"]:
    """Return the products of codes and scales: of fp32 numbers, rounded once to a dtype."""
    blocks = scale_blocks(codes.shape, scales.shape, block)
    assert blocks, "scales that do not fit are refused when the folder is opened"
    rows, columns = blocks
    values = np.arange(256, dtype=np.uint8).view(codes.dtype).astype(np.float32)
    scales = scales.reshape(_whole_grid(codes.shape, scales.shape)).astype(np.float32)
    made = np.empty(codes.shape, dtype)
    height, width = codes.shape[-2:]
    for lead in np.ndindex(*codes.shape[:-2]):
        wide = scales[lead]  # [rows of blocks, columns of blocks]
        if wide.shape[1] > 1:
            wide = np.repeat(wide, columns, axis=1)[:, :width]
        for start in range(0, height, DECODED_ROWS):
            part = np.arange(start, min(start + DECODED_ROWS, height))
            made[lead][part] = values[codes[lead][part].view(np.uint8)] * wide[part // rows]
    return made


def _whole_grid(shape: tuple[int, ...], grid: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of scales with as many dims as the weight: one scale has none in a file."""
    if grid in ((), (1,)):
        return (1,) * len(shape)
    return (*grid, 1) if len(grid) == len(shape) - 1 else grid
