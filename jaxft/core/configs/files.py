"""Files of configs: Python with get_config(), YAML that changes another config, a run's JSON."""

import importlib.util
import json
from pathlib import Path
from typing import Any

import yaml

from jaxft.core.errors import UserError

PACKAGE = Path(__file__).resolve().parents[2]
YAML = (".yaml", ".yml")
BASE_CONFIG = "config"  # the key of a YAML file that names the config that it changes


def find_config(path: str) -> Path:
    """Return the file of a config.

    A path that does not exist is looked up in the installed package and in the source tree around
    it, so that `configs/llm.py` works everywhere. Raises UserError for an absent file.
    """
    places = [Path(path).expanduser(), PACKAGE / path, PACKAGE.parent / path]
    for file in places:
        if file.is_file():
            return file
    if places[0].is_dir() and (places[0] / "config.json").is_file():
        raise UserError(f"config {path} is a folder; give --config={places[0] / 'config.json'}")
    folders = [PACKAGE / "configs", PACKAGE.parent / "configs"]
    here = sorted({f"configs/{p.name}" for folder in folders for p in folder.glob("*.py")})
    raise UserError(f"config file {path} does not exist; shipped: {', '.join(here) or 'none'}")


def read_config_of(path: str) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return (config, overrides) of a file. Only a YAML file has overrides.

    Raises UserError for a file that is absent or is no config.
    """
    file = find_config(path)
    if file.suffix in YAML:
        return _read_yaml(file)
    if file.suffix == ".json":
        return _read_json(file), []
    if file.suffix != ".py":
        raise UserError(f"config file {file} is not .py, .yaml or .json; docs/config.md has forms")
    return _read_python(file), []


def _read_python(file: Path) -> dict[str, Any]:
    module_spec = importlib.util.spec_from_file_location("jaxft_config", file)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"config file {file} is not Python; it must be a .py with get_config()")
    module = importlib.util.module_from_spec(module_spec)
    try:
        module_spec.loader.exec_module(module)
    except SyntaxError as error:
        raise UserError(f"config file {file}:{error.lineno} is not Python: {error.msg}") from None
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {file} defines no get_config(); copy one from configs/")
    return module.get_config().to_dict()


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{file} is not the config of a run: it has no task; give a run's own")
    return content


def _read_yaml(file: Path) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return the config that a YAML file changes, and its keys as overrides.

    All values are read as texts, which get the types of their keys. So 1e-4 is a number, and `on` a
    text.
    """
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}:{line} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold config keys, such as `{BASE_CONFIG}: configs/llm.py`")
    base = content.pop(BASE_CONFIG, "")
    config, earlier = read_config_of(base) if base else ({}, [])
    if "task" in content:  # it decides which other keys there are
        config["task"] = content["task"]
    return config, [*earlier, *_leaves(content, "")]


def _leaves(content: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found
