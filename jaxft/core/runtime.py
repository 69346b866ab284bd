"""The process around a run: allocator, compile cache, devices, defaults for the device at hand."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxft.core.errors import UserError

HUGE_PAGES = "glibc.malloc.hugetlb=1"


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


def resolve_dtype(name: str) -> Any:
    """A jnp dtype by name; "auto" is bfloat16 where the hardware has it, float32 on a CPU."""
    import jax
    import jax.numpy as jnp

    if name == "auto":
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def resolve_remat(name: str) -> str:
    """ "auto" is no rematerialisation on a CPU and "dots" elsewhere."""
    import jax

    if name == "auto":
        return "none" if jax.default_backend() == "cpu" else "dots"
    return name


def describe_devices() -> str:
    """Such as "8 x cpu" or "1 x NVIDIA H200"."""
    import jax

    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def manifest(mesh: Any, data: dict) -> dict:
    """What a run stood on: versions, flags, mesh, data, revision."""
    import jax

    names = ("jaxft", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers")
    return {
        "versions": {name: _version(name) for name in names},
        "python": platform.python_version(),
        "devices": describe_devices(),
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
