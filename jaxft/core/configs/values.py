"""Values of config keys: texts of a command line as the type of their key, and JSON's form."""

import ast
import math
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from jaxft.core.errors import UserError


def convert(key: str, text: Any, kind: Any) -> Any:
    """Return a text as `kind`. A list of texts, from a YAML file, is for a key that holds a list.

    Raises UserError for a text of another type.
    """
    if isinstance(text, list):
        return typed(key, text, kind)
    if kind is str:
        return text
    if kind is bool and text.lower() in ("true", "false"):
        return text.lower() == "true"
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = text
    return typed(key, value, kind)


def typed(key: str, value: Any, kind: Any) -> Any:
    """Return a value as `kind`, which is a class, list or tuple[class, ...]."""
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if (get_origin(kind) or kind) in (tuple, list):
        if not isinstance(value, list | tuple):
            raise UserError(f"config key {key}={value!r} must be a list, such as ['a', 'b']")
        inner, *_ = get_args(kind) or (None,)
        whole: Any = get_origin(kind) or kind
        return whole(
            typed(f"{key}[{i}]", one, inner) if inner else one for i, one in enumerate(value)
        )
    if type(value) is not kind:
        raise UserError(f"config key {key}={value!r} must be {kind.__name__}")
    return value


def plain(value: Any, key: str) -> Any:
    """Return a copy of a config's value as JSON would return it."""
    if isinstance(value, Mapping):
        prefix = f"{key}." if key else ""
        return {str(name): plain(one, f"{prefix}{name}") for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [plain(one, f"{key}[{i}]") for i, one in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"config key {key}={value} must be a finite number")
    if value is not None and type(value) not in (bool, int, float, str):
        raise UserError(
            f"config key {key}={value!r} is a {type(value).__name__}; write a number, a text,"
            " True, False or a list of them"
        )
    return value
