"""Devices that this machine does not have, for tracing: a mesh of one, in use."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from jaxft.core.sharding import AXES

KINDS = {"gpu": "NVIDIA H200", "tpu": "TPU v5 lite", "cpu": "cpu"}


def traced_for(platform: str, sizes: tuple[int, ...] = (1, 1, 1)):
    """A context in which everything is traced for devices of this platform."""
    one = AbstractDevice(device_kind=KINDS[platform], num_cores=None, platform=platform)
    mesh = AbstractMesh(sizes, AXES, (AxisType.Auto,) * len(sizes), abstract_device=one)
    return jax.sharding.use_abstract_mesh(mesh)
