"""What a result was made with: the machine and the software, so that numbers can be compared at all."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

import transload
from transload.deploy.machine import read_machine

_LIBRARIES = ("h11", "httptools", "msgspec", "numpy", "torch", "uvicorn")


class MachineFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A computer as a result should name it. Holds no name of a host or a user."""

    cpu: str
    num_cores: int
    """Cores that this process may run on."""
    core_quota: float | None
    """Cores' worth of time that a container limit leaves; None: no limit."""
    memory_bytes: int
    gpus: tuple[str, ...]
    os: str
    load_average: float | None
    """Of the machine, over the minute before."""


def machine_facts() -> MachineFacts:
    """This machine, now."""
    machine = read_machine()
    return MachineFacts(
        cpu=_cpu_name(),
        num_cores=len(machine.cores),
        core_quota=machine.core_quota,
        memory_bytes=machine.memory_bytes,
        gpus=tuple(gpu.name for gpu in machine.gpus),
        os=f"{platform.system()} {platform.release()}",
        load_average=round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
    )


def versions() -> dict[str, str]:
    """Of Transload, Python and the libraries that speed depends on, where installed. Imports none of them."""
    found = {"transload": transload.__version__, "python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()
