"""Fields of a published config file: absent keys, the meaning of JSON null, types and sizes."""

import math
from collections.abc import Mapping
from typing import Any

from jaxft.core.errors import UserError

ANY = ()  # in `also`: a key whose values its reader checks
# A file that asks for more would take minutes and all memory before its weights are compared.
MOST_LAYERS, MOST = 10_000, 2**24
NO_MORE: Mapping[str, tuple] = {}


def fields(
    config: Mapping[str, Any],
    defaults: Mapping[str, Any],
    nulls: Mapping[str, Any],
    where: str,
    also: Mapping[str, tuple] = NO_MORE,
) -> dict[str, Any]:
    """Return the value of each key of `defaults`, as the PyTorch class of the file reads it.

    An absent key takes its default. `nulls` maps each key that may be null to the value which the
    class uses for None: mostly a feature that is off, whatever its default is. A null is also
    accepted where the default is None. A value has to be like the default of its key, or like one
    of the examples in `also`: true or false, a number, a text, or a list of those. Where the
    default is above 0, an integer has to be.
    Raises: UserError, beginning with `where`, for any other null: the class fails on it. UserError
    for a value of another type.
    """
    read = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in read.items():
        if value is None and key in nulls:
            read[key] = nulls[key]
        elif value is None and defaults[key] is not None:
            raise UserError(
                f"{where}: {key}=null is not supported; expected a value such as {defaults[key]!r}"
            )
        elif value is not None and key in config and also.get(key) is not ANY:
            examples = [one for one in (defaults[key], *also.get(key, ())) if one is not None]
            expected = [_expected(key, one) for one in examples]
            if not any(_fits(key, value, one) for one in examples):
                raise UserError(
                    f"{where}: {key}={repr(value)[:60]} is not supported; expected"
                    f" {' or '.join(expected)}"
                )
    return read


def refused(where: str, key: str, value: Any, expected: Any) -> UserError:
    """Return the error for a value that no code here computes."""
    return UserError(f"{where}: {key}={value!r} is not supported; expected {expected}")


def check_axes(
    c: Mapping[str, Any], key: str, count: int, head: float, of: str, where: str
) -> None:
    """Raise UserError unless a key holds the dims of a head that rotate by each of `count` axes.

    head: the width of a head, which is their sum. of: its name in the error.
    """
    axes, words = c[key], {3: "three", 4: "four"}
    if (
        not isinstance(axes, list | tuple)
        or len(axes) != count
        or any(type(one) is not int or one < 0 or one % 2 for one in axes)
        or sum(axes) != head
    ):
        expected = f"{words[count]} even numbers of the sum {of}={head:g}"
        raise refused(where, key, axes, expected)


def bounds(key: str, default: int) -> tuple[int, int]:
    """Return the smallest and the largest integer of a key, by its name and its default."""
    least = 1 if default > 0 and not key.endswith("_id") else 0
    return least, MOST_LAYERS if "layers" in key else MOST


def _fits(key: str, value: Any, example: Any) -> bool:
    """Return True if `value` is of the kind of `example`."""
    if isinstance(example, list | tuple):
        kind = example[0] if example else 0
        return isinstance(value, list | tuple) and all(_fits(key, one, kind) for one in value)
    if isinstance(example, bool):
        return value in (0, 1) and isinstance(value, int)
    if isinstance(example, int):
        low, high = bounds(key, example)
        return type(value) is int and low <= value <= high
    if isinstance(example, float):
        return type(value) in (int, float) and math.isfinite(value)
    return isinstance(value, type(example))


def _expected(key: str, example: Any) -> str:
    if isinstance(example, list | tuple):
        return f"a list such as {list(example)}"
    if isinstance(example, bool):
        return "true or false"
    if isinstance(example, int):
        return "an integer from {} to {}".format(*bounds(key, example))
    return f"{'a number' if isinstance(example, float) else 'a text'} such as {example!r}"
