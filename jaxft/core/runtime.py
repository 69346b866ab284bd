"""The devices of a run: their kind, published figures and defaults, and what a manifest says."""

import importlib.metadata
import importlib.util
import os
import platform
import re
import resource
import shlex
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from jaxft.core.errors import UserError, near

# By default XLA:CPU gives matrix products to YNNPACK, which wakes threads for each product. With
# XLA's own products a training step takes 10 % less time, and sampling codes of a small model 20 %.
CPU_OPTIONS = {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
# XLA:CPU splits a sum of over 32 numbers into two launches, for an accuracy that a few hundred
# numbers do not need. Without the split a small model samples its codes 3 % faster.
CPU_LOOP_OPTIONS = {**CPU_OPTIONS, "xla_disable_hlo_passes": "tree_reduction_rewriter"}


CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # of Linux, in bytes, or "max"


class Arguments(NamedTuple):
    """A command line: its plain options and its `--config.…` overrides, in order."""

    options: dict[str, str]
    overrides: list[tuple[str, str]]


def parse_arguments(argv: Iterable[str], allowed: Iterable[str]) -> Arguments:
    """Split `--name=value` / `--name value` into options and config overrides.

    Raises: UserError for any other word, with the nearest allowed option, and for an option with
    two values.
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
        elif options.setdefault(name, value) != value:
            raise UserError(f"--{name} is given twice: {options[name]} and {value}; leave one out")
    return Arguments(options, overrides)


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

    Devices of this process report their own limit. Others have that of their kind. The CPU devices
    of a process share the memory of the machine, or of its container.
    """
    import jax

    if device(mesh).platform == "cpu":
        return host_memory() // max(1, mesh.size // jax.process_count())
    one, chip = mesh.devices.flat[0], find_chip(device(mesh).kind)
    try:
        stats = one.memory_stats() or {}
    except (jax.errors.JaxRuntimeError, NotImplementedError, ValueError):  # of another machine
        stats = {}
    return int(stats.get("bytes_limit", chip.memory if chip else 0))


def host_memory() -> int:
    """Return the bytes of memory of this machine or container, 0 if there is no figure."""
    try:
        size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.is_file() else "max"
    except (OSError, ValueError):
        return 0
    return min(size, int(limit)) if limit.isdigit() else size


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


def command_line() -> str:
    """Return the command that started this process, or "" in a notebook or another program."""
    program, *words = sys.argv
    if Path(program).parent == Path(__file__).resolve().parent.parent:
        program = f"python -m jaxft.{Path(program).stem}"
    elif Path(program).name == "jaxft":
        program = "jaxft"
    else:
        return ""
    return " ".join([program, *map(shlex.quote, words)])


def peak_memory(mesh: Any) -> dict[str, Any]:
    """Return the largest memory so far, of a device of `mesh` or of a process on a CPU."""
    if device(mesh).platform == "cpu":
        kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {"peak_memory_bytes": kib * 1024, "memory_of": "the process"}
    stats = mesh.local_devices[0].memory_stats() or {}
    peak = stats.get("peak_bytes_in_use")
    return {"peak_memory_bytes": int(peak), "memory_of": "a device"} if peak else {}


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
