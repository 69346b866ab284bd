"""The process around a run: device errors, defaults for the device, exit codes, the manifest."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxft.core import processes, runtime
from jaxft.core.errors import UserError
from jaxft.core.sharding import AXES, make_mesh
from tests.devices import traced_for

ROOT = Path(__file__).resolve().parents[2]


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
    )


def test_auto_is_fp32_on_a_cpu():
    assert runtime.resolve_dtype("auto") == jnp.float32
    assert runtime.resolve_dtype("bfloat16") == jnp.bfloat16


@pytest.mark.parametrize("platform", ["gpu", "tpu"])
def test_auto_is_bf16_elsewhere(platform):
    with traced_for(platform):
        assert runtime.resolve_dtype("auto") == jnp.bfloat16
        assert runtime.resolve_dtype("float32") == jnp.float32
        assert runtime.compiler_options() is runtime.compiler_options(loop=True) is None
    assert runtime.compiler_options() == runtime.CPU_OPTIONS
    assert runtime.compiler_options(loop=True) == runtime.CPU_LOOP_OPTIONS


def test_the_device_is_that_of_the_mesh_in_use():
    here = runtime.Device("cpu", "cpu")
    assert runtime.device() == runtime.device(make_mesh(2, 2, 2)) == here
    with traced_for("gpu", (2, 2, 2)):
        assert runtime.device() == ("gpu", "NVIDIA H200")
        assert runtime.device(make_mesh()) == here, "a mesh at hand comes before the one in use"
        mesh = jax.sharding.get_abstract_mesh()
        assert runtime.describe_devices() == "8 x NVIDIA H200"
    assert runtime.device(mesh) == ("gpu", "NVIDIA H200") and runtime.device() == here
    assert runtime.describe_devices(mesh) == "8 x NVIDIA H200"
    assert runtime.describe_devices() == "8 x cpu"
    with jax.default_device("cpu"):
        assert runtime.device() == here
    with jax.default_device(jax.devices()[1]):
        assert runtime.device() == here


def test_a_mesh_of_topology_devices_is_a_mesh():
    """jax.experimental.topologies gives devices without a client, of any platform."""

    class TopologyDevice:
        platform, device_kind, id, process_index = "gpu", "NVIDIA H200", 0, 0
        client = None

    mesh = jax.sharding.Mesh(np.array([TopologyDevice()]).reshape(1, 1, 1), AXES)
    assert runtime.device(mesh) == ("gpu", "NVIDIA H200")
    assert runtime.resolve_dtype("auto", mesh) == jnp.bfloat16
    assert runtime.compiler_options(mesh) is None


def test_one_function_is_traced_anew_for_another_device():
    traced = []
    call = jax.jit(lambda x: traced.append(runtime.device().platform) or x)
    for platform in ("cpu", "gpu", "cpu", "tpu", "gpu"):
        with traced_for(platform):
            call.trace(jnp.ones(3))
    assert traced == ["cpu", "gpu", "tpu"]


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (UserError("seed is wrong"), 2, "jaxft: seed is wrong\n"),
        (KeyboardInterrupt(), 130, "jaxft: interrupted; the same command resumes\n"),
    ],
)
def test_a_command_ends_with_a_code_and_a_line(capsys, error, code, line):
    def main(argv):
        assert argv == ["--a=1"]
        if error:
            raise error

    assert processes.command(main, ["--a=1"]) == code
    assert capsys.readouterr() == ("", line)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UserError("seed is wrong"), 2, "jaxft: seed is wrong"),
        (RuntimeError("Gloo failed: closed\nby peer"), 76, "jaxft: another process of this run"),
        (RuntimeError("a bug"), 1, "RuntimeError: a bug"),
    ],
)
def test_a_failed_process_of_several_leaves_at_once(monkeypatch, capsys, error, code, line):
    """The first one waits, so that the others can print their errors."""
    left = []

    def main(argv):
        raise error

    monkeypatch.setattr(processes, "joined", lambda: True)
    monkeypatch.setattr(processes.time, "sleep", left.append)
    monkeypatch.setattr(processes.os, "_exit", left.append)
    processes.command(main, [])
    assert left == [processes.LAST_WORDS, code]
    shown = capsys.readouterr().err.splitlines()
    assert shown[-1].startswith(line) and (len(shown) == 1) == ("bug" not in line)


def test_a_process_of_several_leaves_where_nobody_reads_its_error(monkeypatch):
    class Closed:
        def write(self, text=""):
            raise BrokenPipeError

        flush = write

    def main(argv):
        raise UserError("seed is wrong")

    left = []
    monkeypatch.setattr(processes, "joined", lambda: True)
    monkeypatch.setattr(processes.time, "sleep", left.append)
    monkeypatch.setattr(processes.os, "_exit", left.append)
    monkeypatch.setattr(processes.os, "dup2", lambda old, new: None)  # pytest's own stdout
    monkeypatch.setattr(processes.sys, "stderr", Closed())
    assert processes.command(main, []) == 1
    assert left == [processes.LAST_WORDS, 1]


SLURM = {"SLURM_STEP_NODELIST": "node[001-002]", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize(
    ("env", "said_by"),
    [
        ({}, ""),
        ({"SLURM_NTASKS": "2"}, ""),  # a batch script that did not go through srun
        ({**SLURM, "SLURM_NTASKS": "1"}, ""),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, ""),
        (SLURM, "Slurm"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI"),
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_COORDINATOR_ADDRESS"),
    ],
)
def test_who_tells_of_other_processes(monkeypatch, env, said_by):
    for name in (*processes.CLUSTER, *SLURM, "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert processes.launcher() == said_by


def test_libtpu_tells_of_other_hosts_unless_another_device_is_asked_for(monkeypatch):
    monkeypatch.setattr(runtime.importlib.util, "find_spec", lambda name: name == "libtpu")
    assert processes.launcher() == ""
    monkeypatch.delenv("JAX_PLATFORMS")
    assert processes.launcher() == "TPU"


@pytest.mark.parametrize(
    ("env", "line"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "are '', '2', '': give all three"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI reports other processes, but they do not meet"),
    ],
)
def test_processes_that_cannot_meet_are_one_line(env, line):
    code = (
        "import sys; from jaxft.core import processes, runtime;"
        "sys.exit(processes.command(lambda argv: processes.join(), []))"
    )
    done = python(code, **env)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    (told,) = (one for one in done.stderr.splitlines() if one.startswith("jaxft: "))
    assert line in told and "JAX_COORDINATOR_ADDRESS" in told


def test_a_missing_device_is_one_line():
    code = (
        "import sys; from jaxft.core import processes, runtime;"
        "sys.exit(processes.command(lambda argv: processes.start(), []))"
    )
    done = python(code, JAX_PLATFORMS="cuda")
    lines = [line for line in done.stderr.splitlines() if line.startswith("jaxft: ")]
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert len(lines) == 1
    assert "JAX_PLATFORMS='cuda' asks for a device that is not usable here" in lines[0]
    assert "unset JAX_PLATFORMS" in lines[0]


def test_start_turns_the_compile_cache_on_and_keeps_the_users(tmp_path):
    code = (
        "from jaxft.core import processes, runtime; processes.start(); import jax;"
        "print(jax.config.jax_compilation_cache_dir)"
    )
    done = python(code, XDG_CACHE_HOME=str(tmp_path / "new" / "cache"))
    assert done.stdout.strip() == str(tmp_path / "new" / "cache" / "jaxft" / "xla")
    done = python(code, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "mine"))
    assert done.stdout.strip() == str(tmp_path / "mine")


@pytest.mark.skipif(sys.platform != "linux", reason="glibc tunables are Linux's")
def test_huge_pages_restart_the_process_once_with_its_arguments():
    code = (
        "import os, sys; from jaxft.core import processes, runtime; print('start', flush=True);"
        "processes.restart_with_huge_pages();"
        "print(os.environ['GLIBC_TUNABLES'], sys.flags.utf8_mode)"
    )
    env = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-X", "utf8", "-c", code],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["start", "start", processes.HUGE_PAGES, "1"], done.stderr
    kept = python(code, GLIBC_TUNABLES="glibc.malloc.arena_max=2")
    assert f"glibc.malloc.arena_max=2:{processes.HUGE_PAGES} 0" in kept.stdout
    chosen = python(code, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    assert chosen.stdout.split() == ["start", "glibc.malloc.hugetlb=0", "0"]


def test_the_manifest_says_what_a_run_stood_on():
    manifest = runtime.manifest(make_mesh(2, 2, 2), {"records": 5})
    assert manifest.keys() == {
        "versions", "python", "devices", "processes", "mesh",
        "xla_flags", "glibc_tunables", "data", "revision",
    }  # fmt: skip
    assert manifest["versions"]["jax"] == jax.__version__
    assert manifest["mesh"] == {"data": 2, "fsdp": 2, "tensor": 2}
    assert manifest["devices"] == "8 x cpu" and manifest["processes"] == 1
    assert manifest["data"] == {"records": 5}
    assert "host_platform_device_count=8" in manifest["xla_flags"]
    assert json.loads(json.dumps(manifest)) == manifest


def test_a_revision_is_known_only_in_a_checkout(monkeypatch):
    revision = runtime.manifest(make_mesh(), {})["revision"]
    assert revision is None or len(revision) == 40
    monkeypatch.setenv("PATH", "")
    assert runtime.manifest(make_mesh(), {})["revision"] is None


# ---- the command line -----------------------------------------------------------------------


def test_both_spellings_of_an_option():
    words = ["--config=a.py", "--workdir", "w", "--config.lr", "1", "--config.b.c=x=y"]
    options, overrides = runtime.parse_arguments(words, ("config", "workdir"))
    assert options == {"config": "a.py", "workdir": "w"}
    assert overrides == [("lr", "1"), ("b.c", "x=y")]


def test_a_negative_value_may_stand_apart():
    assert runtime.parse_arguments(["--config.mesh.fsdp", "-1"], ()).overrides == [
        ("mesh.fsdp", "-1")
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--workdri=x"], r"'--workdri=x'; did you mean 'workdir'\?"),
        (["llm.py"], r"unknown argument 'llm.py'"),
        (["--zzz=1"], r"options are config, workdir"),
        (["--workdir"], r"--workdir needs a value: --workdir=VALUE"),
        (["--workdir", "--config=x"], r"--workdir needs a value"),
    ],
)
def test_arguments_that_are_not_understood(words, message):
    with pytest.raises(UserError, match=message):
        runtime.parse_arguments(words, ("config", "workdir"))


@pytest.mark.parametrize(
    ("kind", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("TPU v5", 459),
        ("TPU v5p", 459),
        ("TPU v5 lite", 197),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GB200", None),
        ("TPU v4", 275),
        ("cpu", None),
    ],
)
def test_peak_of_known_devices_only(kind, peak):
    chip = runtime.find_chip(kind)
    assert (chip and chip.flops / 1e12) == peak
