"""Files of configs: Python with get_config(), YAML that changes another config, a run's JSON."""

import importlib.util
import json
import traceback
from collections.abc import Iterator
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


def read_config_of(
    path: str, above: tuple[Path, ...] = ()
) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return (config, overrides) of a file. Only a YAML file has overrides.

    above: the YAML files that change this one. Raises UserError for a file that is absent or is no
    config.
    """
    file = find_config(path)
    if file.resolve() in above:
        raise UserError(f"{file} changes itself; begin it with `{BASE_CONFIG}: configs/llm.py`")
    if file.suffix in YAML:
        return _read_yaml(file, above)
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
    except Exception as error:
        raise _failure(file, error) from None
    if not hasattr(module, "get_config"):
        raise UserError(f"config file {file} defines no get_config(); copy one from configs/")
    try:
        config = module.get_config()
    except Exception as error:
        raise _failure(file, error) from None
    from ml_collections import ConfigDict  # the file has imported it, and a help does without

    if not isinstance(config, ConfigDict):
        raise UserError(
            f"config file {file}: get_config() returns a {type(config).__name__}; return an"
            " ml_collections.ConfigDict, as configs/llm.py does"
        )
    return config.to_dict()


def _failure(file: Path, error: Exception) -> UserError:
    """Return the error for a Python config that raises one, with the last line that it reached."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [one.lineno for one in frames if Path(one.filename).resolve() == file.resolve()]
    where = f"{file}:{own[-1]}" if own else f"{file}"  # none: such as a get_config with arguments
    return UserError(f"config file {where} fails with {type(error).__name__}: {error}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from None
    if not isinstance(content, dict) or "task" not in content:
        raise UserError(f"{file} is not the config of a run: it has no task; give a run's own")
    return content


def _read_yaml(file: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], list[tuple[str, Any]]]:
    """Return the config that a YAML file changes, and its keys as overrides.

    All values are read as texts, which get the types of their keys. So 1e-4 is a number, and `on` a
    text.
    """
    try:
        text = file.read_text(encoding="utf-8")
        if twice := next(_twice(yaml.compose(text, yaml.BaseLoader)), None):
            name, line = twice
            raise UserError(f"{file}:{line} gives {name} a second time; leave one of them out")
        content = yaml.load(text, yaml.BaseLoader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(f"{file}:{line} is not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not valid YAML: {reason}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} must hold config keys, such as `{BASE_CONFIG}: configs/llm.py`")
    base = content.pop(BASE_CONFIG, "")
    if not base and "task" not in content:
        raise UserError(
            f"{file} names no config that it changes; begin it with `{BASE_CONFIG}: configs/llm.py`"
        )
    config, earlier = read_config_of(base, (*above, file.resolve())) if base else ({}, [])
    if "task" in content:  # it decides which other keys there are
        config["task"] = content["task"]
    return config, [*earlier, *_leaves(content, "")]


def _twice(node: yaml.Node | None) -> Iterator[tuple[str, int]]:
    """Yield (key, line) for each key that a YAML mapping, or one inside it, holds again."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: set[str] = set()
    for key, value in node.value:
        if isinstance(key, yaml.ScalarNode):  # `yaml.load` refuses other keys
            if key.value in seen:
                yield key.value, key.start_mark.line + 1
            seen.add(key.value)
        yield from _twice(value)


def _leaves(content: dict[str, Any], prefix: str) -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for key, value in content.items():
        name = f"{prefix}{key}"
        found += _leaves(value, f"{name}.") if isinstance(value, dict) else [(name, value)]
    return found
