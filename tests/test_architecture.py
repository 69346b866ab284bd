"""The house rules as tests: layout, import direction, sizes, what may be imported where."""

import ast
import importlib.util
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

from jaxft.core.config import flatten_config, load_config
from jaxft.tasks import OPTIONS

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "jaxft"
FILES = sorted(PACKAGE.rglob("*.py"))
LEVELS = (
    ("core",),
    ("demo",),
    ("weights", "kernels", "data"),
    ("nn", "noise"),
    ("models",),
    ("objectives",),
    ("tasks",),
    ("runs",),
    ("commands",),
)
LEVEL = {name: level for level, names in enumerate(LEVELS) for name in names}
COMMAND_ROOMS = {"verify", "api"}
LOOPS = {"train"}  # the train loop may be longer than other functions
ORACLES = {"torch", "diffusers", "peft"}


def room(path: Path) -> str:
    parts = path.relative_to(PACKAGE).parts
    return parts[0] if len(parts) > 1 and parts[0] not in COMMAND_ROOMS else "commands"


def imports(path: Path) -> list[str]:
    """Every module that a file imports, inside functions too."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def functions(path: Path) -> list[ast.FunctionDef]:
    tree = ast.parse(path.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


def length(node: ast.FunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def may_import(importer: str, imported: str) -> bool:
    """Lower never imports higher; two rooms on one level do not know each other."""
    if imported == "data":
        return importer in ("data", "tasks", "runs", "commands")
    return importer == imported or LEVEL[imported] < LEVEL[importer]


def test_rooms_are_the_ones_of_the_design():
    rooms = {p.name for p in PACKAGE.iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert rooms == LEVEL.keys() - {"commands"} | COMMAND_ROOMS


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_import_direction(path):
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "jaxft" or len(parts) < 2:
            continue
        target = parts[1] if (PACKAGE / parts[1]).is_dir() else "commands"
        target = "commands" if target in COMMAND_ROOMS else target
        if path == PACKAGE / "__init__.py":
            continue  # jaxft.load and jaxft.finetune reach down lazily
        assert may_import(room(path), target), f"{path} imports {name}"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_import_cycles():
    graph = {}
    known = {module_of(path) for path in FILES}
    for path in FILES:
        found = set()
        for name in imports(path):
            # `from package import module` needs the module, as `from package.module import` does.
            found |= {name} & known or {name.rpartition(".")[0]} & known
        # `from jaxft import run` names the package too, which imports nothing eagerly.
        graph[module_of(path)] = found - {module_of(path), "jaxft"}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        for child in graph[module]:
            visit(child, (*trail, module))

    for module in graph:
        visit(module, ())


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_sizes_and_docstrings(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 400, f"{path}: split by idea"
    assert ast.get_docstring(ast.parse(text)), f"{path} says not what the room is for"
    for node in functions(path):
        assert length(node) <= (120 if node.name in LOOPS else 60), f"{path}:{node.name}"


def test_median_function_length():
    """A floor too: helpers of a few lines that are called once belong at their call."""
    lengths = [length(node) for path in FILES for node in functions(path)]
    assert 8 <= statistics.median(lengths) <= 14


@pytest.mark.parametrize("folder", sorted({path.parent for path in FILES}), ids=str)
def test_a_folder_has_at_most_nine_files(folder):
    files = [path.name for path in FILES if path.parent == folder and path.name != "__init__.py"]
    assert len(files) <= 9 or folder == PACKAGE, f"{folder}: split by idea"


def test_a_protocol_has_at_most_six_members():
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef) and any("Protocol" in base for base in bases(node)):
                members = [one for one in node.body if not isinstance(one, ast.Expr)]
                assert len(members) <= 6, f"{path}: {node.name} has {len(members)} members"


def bases(node: ast.ClassDef) -> list[str]:
    return [ast.unparse(base) for base in node.bases]


HEADLESS = re.compile(
    r"(What|Where|Of|As|Whether|How|Which|Who|When|That|If|With|From|By|In|On|To|For)\b"
)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_docstring_opens_with_a_noun_or_an_imperative(path):
    for name, text in docstrings(path):
        assert not HEADLESS.match(text), f"{path}:{name} opens with {text.split()[0]!r}"


def test_sentences_of_docstrings_end_in_full_stops():
    sentences = [
        sentence
        for path in FILES
        for _, text in docstrings(path)
        for sentence in re.split(r"(?<=[.;:])\s+", text)
    ]
    assert sum(sentence.endswith(";") for sentence in sentences) <= len(sentences) / 100


def docstrings(path: Path) -> list[tuple[str, str]]:
    nodes = ast.walk(ast.parse(path.read_text()))
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [
        (getattr(node, "name", path.stem), ast.get_docstring(node))
        for node in nodes
        if isinstance(node, kinds)
    ]
    return [(name, text) for name, text in found if text]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_oracles_stay_out_of_the_run_time(path):
    if PACKAGE / "verify" in path.parents:
        return
    for name in imports(path):
        assert name.split(".")[0] not in ORACLES | {"tensorflow"}, f"{path} imports {name}"
        if name.split(".")[0] == "transformers":
            assert name == "transformers.AutoTokenizer", f"{path} imports {name}"
        assert name.split(".")[0] not in {"tests", "tools", "configs"}, f"{path} imports {name}"


DEVICE_ROOMS = ("kernels", "core", "runs")  # `runs` writes its devices into records


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_the_device_is_asked_in_one_function(path):
    """`core.runtime.device` reads it from the mesh in use; only kernels/ choose by it."""
    tree = ast.parse(path.read_text())
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    if path != PACKAGE / "core" / "runtime.py":
        asked = attributes & {"default_backend", "abstract_device", "default_device"}
        assert not asked, f"{path} reads {asked}; ask jaxft.core.runtime.device"
    asks = "jaxft.core.runtime.device" in imports(path) or "runtime.device(" in path.read_text()
    assert not asks or room(path) in DEVICE_ROOMS, f"{path} chooses by device outside kernels/"


# Constants with one meaning, of which each module of a kind has its own.
ONE_A_MODULE = {
    "ARCHITECTURE",  # the record of a model
    "RULES",  # the weight table of a model
    "IGNORE",  # tensors of its checkpoints that make no parameter
    "WRITERS",  # the export kinds of a task
    "FILE",  # the config file that a module reads
    "DEFAULTS",  # values of its absent keys
    "NULLS",  # what its keys may have in place of a value
    "KEYS",  # the keys of a decoder's config.json by model_type
    "CLASSES",  # the class names of a decoder by model_type
}


def public_names(path: Path) -> set[str]:
    """The classes and constants that a module defines; one with an underscore is its own affair."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.ClassDef):
            found.add(node.name)
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            parts = getattr(target, "elts", [target])
            found |= {part.id for part in parts if isinstance(part, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def test_no_name_has_two_meanings():
    homes: dict[str, list[str]] = {}
    for path in FILES:
        for name in public_names(path) - ONE_A_MODULE:
            homes.setdefault(name, []).append(str(path.relative_to(PACKAGE)))
    assert not {name: where for name, where in homes.items() if len(where) > 1}


def test_core_knows_no_modules_name():
    """Adapters, new tokens and adversaries are told by the role of the leaf."""
    for path in (PACKAGE / "core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                known = [
                    name for name in ("lora_", "inversion", "discriminator.") if name in node.value
                ]
                assert not known, f"{path}:{node.lineno} names {known}"


def test_no_inheritance_beyond_modules_and_records():
    allowed = {"Module", "NamedTuple", "Protocol", "ValueError", "Generic"}
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                for base in node.bases:
                    name = ast.unparse(base).split("[")[0].rpartition(".")[2]
                    assert name in allowed, f"{path}: class {node.name}({name})"


def test_no_keyword_pass_through():
    for path in FILES:
        for node in functions(path):
            assert node.args.kwarg is None, f"{path}:{node.name} takes **{node.args.kwarg}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.name)
def test_configs_stay_within_the_leaf_budget(path):
    spec = importlib.util.spec_from_file_location("config", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert len(flatten_config(module.get_config().to_dict())) <= 40
    assert module.__doc__ and "python -m jaxft" in module.__doc__


# Leaves of a config with all defaults: 50 are of every task, the others of this one.
LEAVES = {"llm": 71, "autoencoder": 59, "diffusion": 75, "image_tokens": 67}


@pytest.mark.parametrize("task", OPTIONS)
def test_resolved_configs_stay_within_their_budgets(task):
    config = load_config(str(ROOT / "configs" / f"{task}.py"), (), OPTIONS)
    assert len(flatten_config(config)) <= LEAVES[task]


def test_importing_jaxft_and_the_config_room_is_light():
    code = (
        "import sys, jaxft, jaxft.train, jaxft.core.config;"
        "print([m for m in ('jax', 'flax', 'transformers', 'torch') if m in sys.modules])"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert shown.stdout.strip() == "[]", shown.stdout + shown.stderr


# Modules that are tested where they are used.
TESTED_WITH = {
    "__main__.py": "core/cli/test_helping.py",
    "core/cli/arguments.py": "core/configs/test_synonyms.py",
    "core/cli/commands.py": "core/cli/test_helping.py",
    "core/cli/completion.py": "core/cli/test_helping.py",
    "core/cli/keys.py": "core/cli/test_helping.py",
    "core/configs/schema.py": "core/test_config.py",
    "core/configs/values.py": "core/test_config.py",
    "train.py": "runs/test_train.py",
    "evaluate.py": "test_commands.py",
    "sample.py": "test_commands.py",
    "export.py": "test_commands.py",
    "core/errors.py": "test_bad_input.py",
    "core/processes.py": "test_processes.py",
    "data/sources/table_files.py": "data/sources/images/test_tables.py",
    "data/text/templates.py": "data/text/test_dataset.py",
    "models/decoders/block.py": "models/decoders/test_decoder.py",
    "models/denoisers/joint.py": "parity/test_mmdit.py",
    "models/decoders/families/gemma.py": "parity/test_families.py",
    "models/decoders/families/phi.py": "parity/test_families.py",
    "models/decoders/families/wrapped.py": "parity/test_wrapped.py",
    "models/decoders/families/granite.py": "parity/test_families.py",
    "models/decoders/families/mixtral.py": "parity/test_families.py",
    "models/decoders/families/olmo.py": "parity/test_families.py",
    "models/decoders/generation/generate.py": "test_commands.py",
    "objectives/next_token.py": "parity/test_training.py",
    "objectives/denoising.py": "parity/test_diffusion_training.py",
    "objectives/codes.py": "parity/test_image_tokens_training.py",
    "objectives/reconstruction.py": "parity/test_autoencoder_training.py",
    "predict.py": "tasks/llm/heads/test_task.py",
    "report.py": "runs/pages/test_report.py",
    "runs/pages/gallery.py": "runs/pages/test_report.py",
    "runs/pages/records.py": "runs/pages/test_report.py",
    "runs/pages/style.py": "runs/pages/test_report.py",
    "runs/restoring.py": "runs/test_moved_data.py",
    "runs/state.py": "runs/test_train.py",
    "runs/watch.py": "runs/test_train.py",
    "runs/planning/estimate.py": "test_plan.py",
    "tasks/llm/pairs.py": "tasks/llm/test_preference.py",
    "tasks/llm/inspection.py": "test_inspect_data.py",
    "tasks/common/encoded.py": "tasks/diffusion/test_task.py",
    "tasks/common/writers.py": "test_commands.py",
    "verify/__main__.py": "verify/test_verify.py",
    "verify/llm.py": "verify/test_verify.py",
    "verify/pipelines/denoisers.py": "verify/test_verify_flow.py",
    "verify/pipelines/pictures.py": "verify/test_verify_flow.py",
    "verify/pipelines/text_encoders.py": "verify/test_verify_flow.py",
    "verify/report.py": "verify/test_verify.py",
}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_every_module_has_its_test_file(path):
    """tests/ mirrors jaxft/; a model's tests against its PyTorch twin stand in tests/parity/.

    The parts of a task are tested together, by its test_task.py.
    """
    if path.name == "__init__.py":
        return
    place, name = path.parent.relative_to(PACKAGE), f"test_{path.stem}.py"
    verify = f"test_verify_{path.stem}.py"
    known = TESTED_WITH.get(str(path.relative_to(PACKAGE)), f"verify/{verify}")
    homes = [place / name, Path("parity") / name, Path(known)]
    if path.stem in ("options", "opened", "rows", "preview", "exports"):
        homes.append(place / "test_task.py")
    assert any((ROOT / "tests" / home).exists() for home in homes), f"no test file for {path}"
