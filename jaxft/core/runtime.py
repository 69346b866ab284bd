"""The process around a run: allocator, compile cache, devices, defaults by device."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError, near

HUGE_PAGES = "glibc.malloc.hugetlb=1"
# By default XLA:CPU gives matrix products to YNNPACK, which wakes threads for each product. With
# XLA's own products a training step takes 10 % less time, and sampling codes of a small model 20 %.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# XLA:CPU splits a sum of over 32 numbers into two launches, for an accuracy that a few hundred
# numbers do not need. Without the split a small model samples its codes 3 % faster.
CPU_LOOP_OPTIONS = {**CPU_OPTIONS, "xla_disable_hlo_passes": "tree_reduction_rewriter"}
CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")


class Arguments(NamedTuple):
    """A command line: its plain options and its `--config.…` overrides, in order."""

    options: dict[str, str]
    overrides: list[tuple[str, str]]


def parse_arguments(argv: Iterable[str], allowed: Iterable[str]) -> Arguments:
    """Split `--name=value` / `--name value` into options and config overrides.

    Raises: UserError for any other word, with the nearest allowed option.
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
    """Run a command and return its exit status: 0 for success.

    A UserError is printed as one line on stderr and returns 2. Ctrl-C returns 130.
    """
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
    """Return the device that a program is traced for. All code that needs it calls this function.

    mesh: concrete or abstract. The default is the mesh in use, so that a step can be traced here
    for devices of another machine. Without a mesh, as in a plain call of a model, the result is
    jax's default device.
    """
    import jax

    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    found = mesh.abstract_mesh.abstract_device
    if found is None:
        chosen = jax.config.jax_default_device  # type: ignore[attr-defined]
        found = jax.devices(chosen)[0] if chosen is None or isinstance(chosen, str) else chosen
    return Device(found.platform, found.device_kind)


class Chip(NamedTuple):
    """Published figures of an accelerator.

    flops: dense bf16 FLOP/s. bandwidth: bytes/s of its memory. memory: bytes that a program may
    use. link: bytes/s that it sends to other chips of its host or slice.
    """

    flops: float
    bandwidth: float
    memory: float
    link: float


# By a word of jax's `device_kind`, from NVIDIA's data sheets: SXM modules, NVLink in one direction.
GPU_CHIPS = {
    "A100": Chip(312e12, 2.039e12, 79 * 2**30, 300e9),
    "H100": Chip(989e12, 3.35e12, 79 * 2**30, 450e9),
    "H200": Chip(989e12, 4.8e12, 139 * 2**30, 450e9),
    "B200": Chip(2250e12, 7.7e12, 178 * 2**30, 900e9),
}
# By jax's `device_kind`, from the pages of Cloud TPU. The memory is what their compiler accepts.
TPU_CHIPS = {
    "TPU v4": Chip(275e12, 1.228e12, 31.75 * 2**30, 300e9),
    "TPU v5 lite": Chip(197e12, 0.819e12, 15.75 * 2**30, 200e9),
    "TPU v5": Chip(459e12, 2.765e12, 95.74 * 2**30, 600e9),
    "TPU v6 lite": Chip(918e12, 1.64e12, 31.25 * 2**30, 448e9),
}
TPU_NAMES = {"TPU v5e": "TPU v5 lite", "TPU v5p": "TPU v5", "TPU v6e": "TPU v6 lite"}


def find_chip(kind: str) -> Chip | None:
    """Return the figures of a device by jax's `device_kind`, or None where none are known.

    The slower variants (PCIe, NVL, MIG) have none.
    """
    words = set(re.split(r"[^A-Za-z0-9]+", kind))
    if words & {"PCIe", "PCIE", "NVL", "MIG"}:
        return None
    for name, chip in GPU_CHIPS.items():
        if name in words:
            return chip._replace(memory=39 * 2**30) if "40GB" in words else chip
    return TPU_CHIPS.get(TPU_NAMES.get(kind, kind))


def compiler_options(mesh: Any = None, loop: bool = False) -> dict[str, str] | None:
    """Return options for XLA, by the platform of `mesh` (default: the mesh in use), or None.

    loop: the program repeats small products many times, as decoding of a small model does.
    """
    if device(mesh).platform != "cpu":
        return None
    return CPU_LOOP_OPTIONS if loop else CPU_OPTIONS


def launcher() -> str:
    """Return the name of the launcher that may have started other processes of this run, or "".

    It reads only the environment and does not import jax. Where it is "", this process is alone.
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
    """Connect to the other processes of this run, if any. All but the first stop printing.

    It has to be called before jax looks for devices.
    Raises: UserError if the processes do not find each other.
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
            f" they can meet; set {', '.join(CLUSTER)} on every host"
        )
    if jax.process_index():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - until the process ends


def _initialize(launched_by: str) -> None:
    """Initialise jax.distributed.

    jax finds the other hosts of Slurm, Open MPI and a TPU without help. Of the variables in
    `CLUSTER` it reads only the address, so the other two are passed.
    Raises: UserError for incomplete variables or processes that do not connect.
    """
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
        if launched_by == "TPU":  # most likely a single host: `join` checks the process count
            return
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{launched_by} reports other processes, but they do not meet ({reason});"
            f" start all of them, each with {', '.join(CLUSTER)}"
        ) from None


def start() -> None:
    """Find the devices and turn the compile cache on. Raises: UserError if there are none."""
    import jax

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxft" / "xla"
    chosen = jax.config.values["jax_compilation_cache_dir"]
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not chosen and os.access(existing, os.W_OK):
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


def memory_limit(mesh: Any) -> int:
    """Return the bytes that a program may use on one device of `mesh`, 0 if there is no figure.

    Devices of this process report their own limit. Others have that of their kind.
    """
    import jax

    one, chip = mesh.devices.flat[0], find_chip(device(mesh).kind)
    try:
        stats = one.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):  # of another machine
        stats = {}
    return int(stats.get("bytes_limit", chip.memory if chip else 0))


def describe_devices(mesh: Any = None) -> str:
    """Return a phrase such as "8 x cpu" or "1 x NVIDIA H200".

    mesh: as in `device`. Without a mesh all devices count.
    """
    import jax

    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh
    return f"{mesh.size or jax.device_count()} x {device(mesh).kind}"


def manifest(mesh: Any, data: dict) -> dict:
    """Return the environment of a run: versions, flags, mesh, data, revision."""
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
