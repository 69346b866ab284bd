"""Models inside installed packages, as `pip:PACKAGE` names them. Nothing is imported."""

import importlib.util
import re
from pathlib import Path

from jaxft.core.errors import UserError


def package_folders(package: str) -> list[Path]:
    """Return the folders of a package. Raises UserError if it is not installed."""
    name = re.sub(r"[-.]", "_", package)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None:
        raise UserError(f"pip:{package}: not installed; run `pip install --no-deps {package}`")
    return [Path(root) for root in spec.submodule_search_locations or []]
