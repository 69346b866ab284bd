"""The processes of a run: their start, their meeting, and the end of a command."""

import importlib.util
import logging
import os
import platform
import socket
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from jaxft.core.cli.live import live_output
from jaxft.core.errors import DISK_FULL, STALLED, Printed, UserError
from jaxft.core.guards.room import is_full
from jaxft.core.guards.stopping import PREEMPTED, Stopped

HUGE_PAGES = "glibc.malloc.hugetlb=1"
CLUSTER = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
JOIN_TIMEOUT = "JAXFT_JOIN_TIMEOUT"  # seconds that a process waits for the others at its start
JOIN_SECONDS = 120.0  # its default
EXHAUSTED = "RESOURCE_EXHAUSTED"  # in XLA's errors for a memory that is full
LAST_WORDS = 3.0  # seconds in which the others can print their errors before the first one leaves


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

    A UserError is printed as one line on stderr and returns its status. Another error is one line
    too, with the file of its traceback, and returns 1. `--debug` raises it instead. Ctrl-C returns
    130, and a training that a signal stopped returns 75. A process of several that fails ends here
    at once, because jax would make it wait for the others.
    """
    code, debug = 1, "--debug" in argv
    # Pillow warns at other sizes than those that `decode` refuses.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    # transformers would print that PyTorch is absent, which no command needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    try:
        with live_output():
            code = _run(main, [word for word in argv if word != "--debug"])
    except BrokenPipeError:  # nobody reads the output any more, as behind `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except Exception as error:
        if debug:
            raise
        if not joined():
            _tell(error)
            return code
        if "Gloo" not in str(error):  # the transport between CPU processes
            traceback.print_exc()
            return code
        reason = str(error).splitlines()[0]
        print(
            f"jaxft: another process of this run ended ({reason}); its own last line says why, and"
            " the same command on all hosts resumes",
            file=sys.stderr,
        )
        code = STALLED
    finally:
        if code and joined():
            _leave(code)
    return code


def _run(main: Callable[[list[str]], None], argv: list[str]) -> int:
    try:
        main(argv)
    except Printed as answer:
        print(answer)
    except UserError as error:
        print(f"jaxft: {error}", file=sys.stderr)
        return error.status
    except Stopped as stopped:
        print(f"jaxft: {stopped}", file=sys.stderr)
        return PREEMPTED
    except OSError as error:
        if not is_full(error):
            raise
        where = f" at {error.filename}" if error.filename else ""
        print(
            f"jaxft: the disk is full{where}; free space, the same command goes on from"
            " what is saved",
            file=sys.stderr,
        )
        return DISK_FULL
    except KeyboardInterrupt:
        print("jaxft: interrupted; the same command resumes", file=sys.stderr)
        return 130
    return 0


def _tell(error: Exception) -> None:
    """Print one line for an error that no command expects, and keep its traceback in a file."""
    first = next(iter(str(error).strip().splitlines()), "")[:200]
    if EXHAUSTED in str(error):
        line = f"memory is exhausted ({first}); give smaller samples or a smaller batch_size"
    else:
        line = f"unexpected {type(error).__name__}: {first}"
    with tempfile.NamedTemporaryFile("w", prefix="jaxft-", suffix=".txt", delete=False) as file:
        traceback.print_exception(error, file=file)
    print(f"jaxft: {line}; the traceback is in {file.name}, and --debug prints it", file=sys.stderr)


def joined() -> bool:
    """Return True if this process has connected to the others of its run. Does not import jax."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def _leave(code: int) -> None:
    """End this process without jax's shutdown, which waits for the others for five minutes.

    The first process leaves last, because jax ends the others as soon as it is gone.
    """
    import jax

    with suppress(OSError):  # where nobody reads
        sys.stdout.flush()
        sys.stderr.flush()
    try:
        first = jax.process_index() == 0
    except RuntimeError:  # there are no devices
        first = True
    if first:
        time.sleep(LAST_WORDS)
    os._exit(code)


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
    """Initialise jax.distributed, or end the process after `JOIN_TIMEOUT` seconds.

    jax finds the other hosts of Slurm, Open MPI and a TPU without help. Of the variables in
    `CLUSTER` it reads only the address, so the other two are passed. When its own timeout passes,
    jax aborts the process with a stack of C++. So a timer of this process ends it first.
    Raises: UserError for incomplete variables or processes that do not connect.
    """
    import jax

    address, count, place = (os.environ.get(name, "") for name in CLUSTER)
    seconds = _join_seconds()
    if count or place:
        _check_cluster(address, count, place)
    numbers = (int(count), int(place)) if count else (None, None)
    patience = seconds if numbers[1] else seconds + LAST_WORDS  # as in `_leave`
    timer = threading.Timer(patience, _give_up, (launched_by, address, numbers, seconds))
    timer.daemon = True
    timer.start()
    # The service would catch SIGTERM for a notice that no code here reads.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            num_processes=numbers[0],
            process_id=numbers[1],
            initialization_timeout=round(seconds) + 60,
        )
    except (RuntimeError, ValueError, OSError) as error:
        if launched_by == "TPU":  # most likely a single host: `join` checks the process count
            return
        reason = str(error).splitlines()[0]
        raise UserError(
            f"{launched_by} reports other processes, but they do not meet ({reason});"
            f" start all of them, each with {', '.join(CLUSTER)}"
        ) from None
    finally:
        timer.cancel()


def _join_seconds() -> float:
    text = os.environ.get(JOIN_TIMEOUT, str(JOIN_SECONDS))
    if not text.replace(".", "", 1).isdigit():
        raise UserError(f"{JOIN_TIMEOUT}={text!r} must be a number of seconds, such as 300")
    return float(text)


def _check_cluster(address: str, count: str, place: str) -> None:
    """Raise UserError for values of `CLUSTER` with which no run can start."""
    port = address.rpartition(":")[2]
    if not (":" in address and port.isdigit() and count.isdigit() and place.isdigit()):
        raise UserError(
            f"{', '.join(CLUSTER)} are {address!r}, {count!r}, {place!r}: give all three, such as"
            " 10.0.0.1:1234 (of process 0), 2 and 0"
        )
    if int(place) >= int(count):
        raise UserError(
            f"JAX_PROCESS_ID={place} must be less than JAX_NUM_PROCESSES={count}: give the"
            f" processes the numbers 0 to {int(count) - 1}"
        )
    if int(place) == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        try:
            socket.create_server(("", int(port))).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"process 0 cannot listen on port {port} of JAX_COORDINATOR_ADDRESS={address}"
                f" ({error}); give all processes another port"
            ) from None


def _give_up(launched_by: str, address: str, numbers: tuple, seconds: float) -> None:
    """Print why the processes have not met, and end this one with exit status 2."""
    count, place = numbers
    what = f"did not meet within {seconds:g} s ({JOIN_TIMEOUT} sets the limit)"
    if count is None:
        line = f"the processes of {launched_by} {what}; look for a host that did not start"
    elif place and (reason := _unreachable(address)):
        line = (
            f"process {place} cannot reach process 0 at JAX_COORDINATOR_ADDRESS={address}"
            f" ({reason}): the processes {what}; give the address of process 0 and start it"
        )
    else:
        line = (
            f"process {place} waited for all {count} processes at {address}, but they {what};"
            f" start each JAX_PROCESS_ID from 0 to {count - 1} once, with the same address"
        )
    print(f"jaxft: {line}", file=sys.stderr, flush=True)
    os._exit(2)


def _unreachable(address: str) -> str:
    """Return why no connection to an address opens, or "" if one does."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def start() -> None:
    """Find the devices and turn the compile cache on. Raises: UserError if there are none."""
    import jax

    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    # Orbax logs tracebacks of what it raises later, and the commands print that as one line.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "jaxft" / "xla"
    chosen = jax.config.values["jax_compilation_cache_dir"]
    existing = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if not chosen and os.access(existing, os.W_OK):
        jax.config.update("jax_compilation_cache_dir", str(cache))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
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
