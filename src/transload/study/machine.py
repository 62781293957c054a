"""Facts about the machine and the software that a result was made with, so that numbers can be compared at all."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import msgspec

import transload

_LIBRARIES = ("h11", "msgspec", "numpy", "torch", "uvicorn")


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """The computer. Names no host and no user."""

    cpu: str
    num_cores: int
    num_usable_cores: int
    """Cores that this process may run on."""
    memory_bytes: int | None
    os: str
    load_average: float | None
    """Over the last minute, of this machine."""


def machine() -> Machine:
    """This machine, now."""
    num_cores = os.cpu_count() or 1
    return Machine(
        cpu=_cpu_name(),
        num_cores=num_cores,
        num_usable_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else num_cores,
        memory_bytes=_memory_bytes(),
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


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None
