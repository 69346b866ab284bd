"""Devices of a plan: those of this machine, or those of a named topology, which is not at hand."""

import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import jax

from jaxft.core.errors import UserError
from jaxft.core.runtime import GPU_CHIPS

GPUS_PER_HOST = 8
CUDNN = 91000  # 9.10, from which on cuDNN has every form of attention that we use
TPU_FAMILIES = ("v5e", "v5p", "v6e")
KNOWN_TOPOLOGIES = "here, cpu:8, a100:8, h100:8, h200:8, b200:8, v5e:4x4, v5p:2x2x2, v6e:4x4"
# Without these variables libtpu looks for a TPU host for minutes, and prints about it.
TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}


class GPU(NamedTuple):
    """Figures of a GPU that XLA compiles for, beside those of `core.runtime.Chip`.

    shared: bytes of shared memory of a core. clock: GHz.
    """

    capability: tuple[int, int]
    cores: int
    fpus: int
    shared: int
    l2: int
    clock: float


GPU_TARGETS = {
    "a100": GPU((8, 0), 108, 64, 167_936, 40 * 2**20, 1.41),
    "h100": GPU((9, 0), 132, 128, 233_472, 50 * 2**20, 1.98),
    "h200": GPU((9, 0), 132, 128, 233_472, 50 * 2**20, 1.98),
    "b200": GPU((10, 0), 148, 128, 233_472, 126 * 2**20, 1.965),
}


def open_topology(name: str) -> Sequence[Any]:
    """Return the devices of a topology by its name.

    `here` and `cpu:N` are devices of this process. The others can be compiled for and hold no
    arrays. Raises UserError for an unknown name, and where the compiler's package is missing.
    """
    family, _, shape = name.partition(":")
    if name == "here":
        return jax.devices()
    if family == "cpu" and shape.isdigit() and int(shape):
        with suppress(RuntimeError):  # too late, where this process has used its devices
            jax.config.update("jax_num_cpu_devices", int(shape))
        return jax.devices("cpu")[: int(shape)]
    if family in GPU_TARGETS and shape.isdigit() and int(shape):
        return _gpus(family, int(shape))
    if family in TPU_FAMILIES and re.fullmatch(r"\d+(x\d+){1,2}", shape):
        return _tpus(name)
    raise UserError(
        f"--topology={name!r} is not known; it is one of the kind of {KNOWN_TOPOLOGIES}"
    )


def _gpus(family: str, count: int) -> Sequence[Any]:
    from jax.experimental import topologies

    _check_package("jax_plugins.xla_cuda13", "cuda-aot")
    hosts = max(1, count // GPUS_PER_HOST)
    if count > GPUS_PER_HOST and count % GPUS_PER_HOST:
        raise UserError(f"--topology={family}:{count}: more than 8 GPUs are whole hosts of 8")
    layout = f"{hosts}x{count // hosts}x1"
    return topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=layout, target_config=target_config(family)
    ).devices


def _tpus(name: str) -> Sequence[Any]:
    from jax.experimental import topologies

    _check_package("libtpu", "tpu")
    for key, value in TPU_ENVIRONMENT.items():
        os.environ.setdefault(key, value)
    try:
        return topologies.get_topology_desc(name, platform="tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"--topology={name!r} is no shape of such a TPU ({str(error).splitlines()[0]})"
        ) from None


def _check_package(module: str, extra: str) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:
        found = None
    if found is None:
        raise UserError(
            f"the compiler for this topology is not installed: pip install 'jaxft[{extra}]'; it"
            " needs no such device"
        )


def target_config(family: str) -> str:
    """Return XLA's description of a GPU, a GpuTargetConfig as text."""
    gpu, chip = GPU_TARGETS[family], GPU_CHIPS[family.upper()]
    major, minor = gpu.capability
    features = " feature_extension: ACCELERATED_FEATURES" if major >= 9 else ""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: {gpu.shared}
  shared_memory_per_block_optin: {gpu.shared - 1024}
  core_count: {gpu.cores} fpus_per_core: {gpu.fpus} clock_rate_ghz: {gpu.clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {gpu.l2}
  device_memory_size: {chip.memory:.0f}
  cuda_compute_capability {{ major: {major} minor: {minor}{features} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA"
dnn_version_info {{ major: {CUDNN // 10000} minor: {CUDNN // 100 % 100} patch: 0 }}
device_description_str: "NVIDIA {family.upper()}"
"""


@contextmanager
def traced_for(name: str) -> Iterator[None]:
    """Answer for the topology's GPU while a program is traced.

    While jax traces cuDNN's attention it asks the card for its compute capability and cuDNN's
    version. It has no argument for a card of another machine, so its three functions are replaced
    within this context.
    """
    family = name.partition(":")[0]
    if family not in GPU_TARGETS:
        yield
        return
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    own = GPU_TARGETS[family].capability

    def numbers(capability: str) -> tuple[int, ...]:
        return tuple(int(part) for part in capability.split("."))

    answers = {
        "check_cudnn_version": lambda: CUDNN,
        "check_compute_capability": lambda least: own >= numbers(least),
        "is_cuda_compute_capability_equal": lambda one: own == numbers(one),
    }
    kept = {key: getattr(cudnn, key) for key in answers}
    try:
        for key, answer in answers.items():
            setattr(cudnn, key, answer)
        yield
    finally:
        for key, function in kept.items():
            setattr(cudnn, key, function)
