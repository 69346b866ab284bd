"""The process around a run: allocator, compile cache, devices, defaults for the device at hand."""

import importlib.metadata
import importlib.util
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError, near

HUGE_PAGES = "glibc.malloc.hugetlb=1"
# XLA:CPU's default hands matrix products to YNNPACK too, where its own take a tenth off a training
# step, and a fifth off the codes that a small model draws: YNNPACK wakes threads for each product.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# XLA:CPU makes two launches of a sum of over 32 numbers, for accuracy that a few hundred do not
# need: without the second a small model draws its codes 3 % faster.
CPU_LOOP_OPTIONS = {**CPU_OPTIONS, "xla_disable_hlo_passes": "tree_reduction_rewriter"}
CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Arguments(NamedTuple):
    """A command line: its plain options and its `--config.…` overrides, in order."""

    options: dict[str, str]
    overrides: list[tuple[str, str]]


def parse_arguments(argv: Iterable[str], allowed: Iterable[str]) -> Arguments:
    """Split `--name=value` / `--name value` into options and config overrides.

    Raises UserError for anything else, with the nearest allowed option.
    """
    allowed, words = tuple(allowed), list(argv)
    options: dict[str, str] = {}
    overrides: list[tuple[str, str]] = []
    while words:
        word = words.pop(0)
        name, has_value, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not (name in allowed or name.startswith("config.")):
            raise UserError(f"unknown argument {word!r}; {near(name, allowed, 'options are')}")
        if not has_value:
            if not words or words[0].startswith("--"):
                raise UserError(f"--{name} needs a value: --{name}=VALUE")
            value = words.pop(0)
        if name.startswith("config."):
            overrides.append((name.removeprefix("config."), value))
        else:
            options[name] = value
    return Arguments(options, overrides)


def restart_with_huge_pages() -> None:
    """Re-exec this process once with huge pages for malloc (Linux, CPU: 10-30 % of a step).

    glibc reads its tunables before Python starts, so setting them here needs a fresh process.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if platform.libc_ver()[0] != "glibc" or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = f"{tunables}:{HUGE_PAGES}".lstrip(":")
    os.execv(sys.executable, sys.orig_argv)


def command(main: Callable[[list[str]], None], argv: list[str]) -> int:
    """Run a command: 0 when it is done, 2 with one line on stderr for a user's mistake."""
    try:
        main(argv)
    except UserError as error:
        print(f"jaxft: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("jaxft: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


class Device(NamedTuple):
    """Platform ("cpu", "gpu" or "tpu") and kind, such as "NVIDIA H200" or "TPU v5 lite"."""

    platform: str
    kind: str


def device(mesh: Any = None) -> Device:
    """Return the device that a program is traced for: the one place that asks.

    mesh: concrete or abstract. By default the mesh in use answers, so that a step may be traced
    here for devices of another machine. Without a mesh, as in a user's plain call of a model, jax's
    default device answers.
    """
    import jax

    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    found = mesh.abstract_mesh.abstract_device
    if found is None:
        chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
        found = jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
    return Device(found.platform, found.device_kind)


def compiler_options(mesh: Any = None, loop: bool = False) -> dict[str, str] | None:
    """Return options for XLA, by the platform of this mesh, or of the mesh in use.

    loop: the program repeats small products many times, as decoding of a small model does.
    """
    if device(mesh).platform != "cpu":
        return None
    return CPU_LOOP_OPTIONS if loop else CPU_OPTIONS


def launcher() -> str:
    """What says that this may be one of many processes of a run; "" on most machines.

    Cheap and without jax: where it is "", there is nobody to wait for.
    """
    env = os.environ
    if any(name in env for name in CLUSTER):
        return "JAX_COORDINATOR_ADDRESS"
    if "SLURM_STEP_NODELIST" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return "Slurm"
    if int(env.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        return "Open MPI"
    on_tpu = "tpu" in env.get("JAX_PLATFORMS", "tpu") and importlib.util.find_spec("libtpu")
    return "TPU" if on_tpu else ""


def join() -> None:
    """Meet the other processes of this run, if any; all but the first are silent from here on.

    Has to come before jax looks for devices. Raises UserError where they do not meet.
    """
    if not launcher():
        return
    import jax

    if not jax.distributed.is_initialized():
        _initialize(launcher())
    start()
    if jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise UserError(
            f"{jax.process_count()} processes share these devices, but jax found no address where"
            f" they meet; set {', '.join(CLUSTER)} on every host"
        )
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def _initialize(said_by: str) -> None:
    """jax finds Slurm, Open MPI and a TPU's other hosts; of our variables it reads the address."""
    import jax

    address, count, place = (os.environ.get(name, "") for name in CLUSTER)
    if (count or place) and not (":" in address and count.isdigit() and place.isdigit()):
        raise UserError(
            f"{', '.join(CLUSTER)} are {address!r}, {count!r}, {place!r}: give all three, such as"
            " 10.0.0.1:1234 (of process 0), 2 and 0"
        )
    numbers = (int(count), int(place)) if count else (None, None)
    try:
        jax.distributed.initialize(num_processes=numbers[0], process_id=numbers[1])
    except (RuntimeError, ValueError, OSError) as error:
        if said_by == "TPU":  # no host tells of others; `join` sees whether there are any
            return
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{said_by} tells of other processes, but they do not meet ({reason});"
            f" start all of them, each with {', '.join(CLUSTER)}"
        ) from None


def start() -> None:
    """Find the devices, or say in one line why they are not there; turn the compile cache on."""
    import jax

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxft" / "xla"
    chosen = jax.config.values["jax_compilation_cache_dir"]
    if not chosen and os.access(_existing(cache), os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(cache))
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # without any plugin jax only asserts
        asked = os.environ.get("JAX_PLATFORMS", "")
        reason = (str(error).splitlines() or ["no plugin for it is installed"])[0]
        raise UserError(
            f"JAX_PLATFORMS={asked!r} asks for a device that is not usable here"
            f" ({reason}); install jaxft[cuda] or jaxft[tpu] on a machine that"
            " has one, or unset JAX_PLATFORMS"
        ) from None


def resolve_dtype(name: str, mesh: Any = None) -> Any:
    """Return a jnp dtype by name. "auto" is float32 on a CPU and bfloat16 on other devices.

    mesh: as in `device`.
    """
    import jax.numpy as jnp

    if name == "auto":
        name = "float32" if device(mesh).platform == "cpu" else "bfloat16"
    return jnp.dtype(name)


def resolve_remat(name: str, mesh: Any = None) -> str:
    """Return a remat policy by name. "auto" is "none" on a CPU and "dots" on other devices.

    mesh: as in `device`.
    """
    if name == "auto":
        return "none" if device(mesh).platform == "cpu" else "dots"
    return name


def describe_devices(mesh: Any = None) -> str:
    """Return a phrase such as "8 x cpu" or "1 x NVIDIA H200".

    mesh: as in `device`. Without a mesh all devices count.
    """
    import jax

    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return f"{mesh.size or jax.device_count()} x {device(mesh).kind}"


def manifest(mesh: Any, data: dict) -> dict:
    """What a run stood on: versions, flags, mesh, data, revision."""
    import jax

    names = ("jaxft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    return {
        "versions": {name: _version(name) for name in names},
        "python": platform.python_version(),
        "devices": describe_devices(mesh),
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
        "data": data,
        "revision": _revision(),
    }


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _existing(path: Path) -> Path:
    while not path.exists():
        path = path.parent
    return path
