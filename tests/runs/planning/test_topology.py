"""Names of topologies, and the answers that jax gets for a GPU which is not here."""

import jax
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxft.core.errors import UserError
from jaxft.core.runtime import GPU_CHIPS
from jaxft.runs.planning import topology


@pytest.mark.parametrize("name", ["h300:8", "h100", "h100:0", "h100:x", "v5e", "v5e:4", "cpu", ""])
def test_an_unknown_topology_lists_the_known_ones(name):
    with pytest.raises(UserError, match=r"is one of the kind of here, cpu:8, a100:8, h100:8"):
        topology.open_topology(name)


def test_gpus_of_several_hosts_are_whole_hosts():
    with pytest.raises(UserError, match=r"h100:12: more than 8 GPUs are whole hosts of 8|cuda-aot"):
        topology.open_topology("h100:12")


@pytest.mark.parametrize(("name", "extra"), [("h100:8", "cuda-aot"), ("v5e:4x4", "tpu")])
def test_a_missing_compiler_names_its_extra(name, extra, monkeypatch):
    monkeypatch.setattr(topology.importlib.util, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=rf"pip install 'jaxft\[{extra}\]'"):
        topology.open_topology(name)


def test_here_and_cpu_are_the_devices_of_this_process():
    assert topology.open_topology("here") == jax.devices()
    assert topology.open_topology("cpu:8") == jax.devices("cpu")


def test_every_gpu_has_its_published_figures():
    assert {name.upper() for name in topology.GPU_TARGETS} == set(GPU_CHIPS)
    text = topology.target_config("h200")
    assert "memory_bandwidth: 4800000000000" in text and "major: 9 minor: 0" in text


def test_jax_gets_the_answers_of_the_gpu_only_while_it_traces():
    before = cudnn.check_cudnn_version
    with topology.traced_for("a100:1"):
        assert cudnn.check_compute_capability("8.0")
        assert not cudnn.check_compute_capability("9.0")
        assert cudnn.is_cuda_compute_capability_equal("8.0")
        assert cudnn.check_cudnn_version() >= 91000
    assert cudnn.check_cudnn_version is before
    with topology.traced_for("v5e:4x4"):
        assert cudnn.check_cudnn_version is before
