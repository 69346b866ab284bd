"""The quantisation of a checkpoint by its config.json and names: what is read, what is refused."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxft.core.errors import UserError

# Names of tensors that a method saves beside its weights. Some folders have no other sign of it.
MARKS = (
    (r".*\.(absmax|nested_absmax|quant_map|quant_state\..+|SCB|weight_format)", "bitsandbytes"),
    (r".*\.(qweight|qzeros|g_idx)", "gptq or awq"),
    (r".*\.(weight_packed|weight_shape)", "compressed-tensors"),
    (r".*\.(weight_scale|weight_scale_inv|weight_scale_2|input_scale)", "fp8"),
    (r".*experts\.\w+_(blocks|scales)", "mxfp4"),
    (r".*\.weight(:|_)(qdata|int_data|scale_and_zero)", "torchao"),
)
QUANTISED_KEYS = ("quantization", "quantization_config", "compression_config")  # MLX has the first


def nf4_scales(config: Mapping[str, Any]) -> str:
    """Return "double" or "single" for a config.json of NF4 weights by their scales, else ""."""
    stated = config.get("quantization_config")
    if not isinstance(stated, dict) or _method(stated) != "bitsandbytes":
        return ""
    if not stated.get("load_in_4bit") or stated.get("bnb_4bit_quant_type") != "nf4":
        return ""
    return "double" if stated.get("bnb_4bit_use_double_quant") else "single"


def refuse_config(config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for a config.json, or one of its sub-configs, that states a quantisation."""
    inner = (value for value in config.values() if isinstance(value, dict))
    for one in (config, *inner):
        for key in QUANTISED_KEYS:
            if stated := one.get(key):
                method = "mlx" if key == "quantization" else _method(stated)
                nf4 = "; a LoRA trains on this folder as it is with base=nf4"
                hint = nf4 if nf4_scales(config) else ""
                raise _error(where, f"{key}: quant_method={method!r}", hint)


def refuse_tensors(names: Iterable[str], where: str) -> None:
    """Raise UserError for a checkpoint with the tensors of a quantisation."""
    for name in names:
        for pattern, method in MARKS:
            if re.fullmatch(pattern, name):
                raise _error(where, f"tensor {name} is of quant_method={method!r}")


def _method(stated: Any) -> str:
    if not isinstance(stated, dict):
        return str(stated)
    # Old configs have no quant_method.
    bits = any(stated.get(f"load_in_{n}bit") for n in (4, 8))
    return str(stated.get("quant_method") or ("bitsandbytes" if bits else "unknown"))


def _error(where: str, found: str, hint: str = "") -> UserError:
    return UserError(
        f"{where}: the weights are quantised ({found}), which is not read;"
        " give the model that it was made from, mostly the name without -bnb-4bit, -GPTQ, -AWQ,"
        f" -MLX or the like{hint}"
    )
