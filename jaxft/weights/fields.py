"""Fields of a published config file: defaults of absent keys, and the meaning of JSON null."""

from collections.abc import Mapping
from typing import Any

from jaxft.core.errors import UserError


def fields(
    config: Mapping[str, Any], defaults: Mapping[str, Any], nulls: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the value of each key of `defaults`, as the PyTorch class of the file reads it.

    An absent key takes its default. `nulls` maps each key that may be null to the value which the
    class uses for None: mostly a feature that is off, whatever its default is. A null is also
    accepted where the default is None.
    Raises: UserError, beginning with `where`, for any other null: the class fails on it.
    """
    read = {key: config.get(key, default) for key, default in defaults.items()}
    for key, value in read.items():
        if value is None and key in nulls:
            read[key] = nulls[key]
        elif value is None and defaults[key] is not None:
            raise UserError(
                f"{where}: {key}=null is not supported; expected a value such as {defaults[key]!r}"
            )
    return read
