"""Fields of a published config file: absent keys, and JSON null as the PyTorch class reads None."""

from collections.abc import Mapping
from typing import Any

from jaxft.core.errors import UserError


def fields(
    config: Mapping[str, Any], defaults: Mapping[str, Any], nulls: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Return the value of each key of `defaults`, as the class that the file is made for reads it.

    An absent key takes its default. `nulls` holds the keys that may be null, with what the class
    makes of None: mostly a feature that is off, whatever its default is. A null is also read where
    the default is None. Raises UserError for other nulls, with which the class cannot compute.
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
