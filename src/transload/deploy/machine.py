"""What this machine lets us have: cores, memory, GPUs. Reads /proc, cgroups and nvidia-smi; never imports torch.

Everything is what *this process* may use: affinity masks and container limits count, not what the hardware has.
"""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
"""CPU features (x86, x86, Arm) without which bfloat16 is emulated, slower than float32."""
BFLOAT16_COMPUTE = 8.0
"""CUDA compute capability from which bfloat16 is native (Ampere)."""
NVIDIA_SMI_SECONDS = 10.0
NO_LIMIT = 2**60
"""cgroup v1 writes "no limit" as a number about this large."""
GPU_FIELDS = "index,uuid,name,memory.total,memory.free,compute_cap"


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU that CUDA shows to this process. `index` is the N of `cuda:N`."""

    index: int
    name: str
    memory_bytes: int
    free_bytes: int
    has_bfloat16: bool


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a deployment is placed on."""

    cores: tuple[int, ...]
    """Cores this process may run on, best first: one of each physical core, then their hyperthreads."""
    memory_bytes: int
    """Memory this process may use in all."""
    free_bytes: int
    """What of it is not in use now."""
    core_quota: float | None = None
    """Cores' worth of time a container limit leaves; None: no limit."""
    cpu_flags: frozenset[str] = frozenset()
    gpus: tuple[Gpu, ...] = ()
    has_kernels: bool = False
    """Whether our own CPU kernels can be built here. They widen bfloat16 weights as they read them, on any CPU."""
    has_memfd: bool = True
    """Whether workers on this host can share memory."""

    @property
    def has_bfloat16(self) -> bool:
        """Whether the CPU computes in bfloat16 rather than emulating it."""
        return bool(self.cpu_flags & BFLOAT16_FLAGS)


def read_machine(root: Path = Path("/"), *, with_gpus: bool = True, has_kernels: bool = False) -> Machine:
    """Look at this machine. `root` is where proc and sys lie. Whether it has kernels is for the caller to say."""
    cores = usable_cores()
    total, free = _memory(root)
    for limit, used in _memory_limits(root):
        total = min(total, limit)
        free = min(free, max(0, limit - used))
    return Machine(
        cores=_physical_first(cores, root),
        memory_bytes=total,
        free_bytes=free,
        core_quota=min(_core_quotas(root), default=None),
        cpu_flags=_cpu_flags(root / "proc/cpuinfo"),
        gpus=read_gpus() if with_gpus else (),
        has_kernels=has_kernels,
        has_memfd=sys.platform == "linux",
    )


def usable_cores() -> tuple[int, ...]:
    """Cores in this process's affinity mask, in order."""
    if sys.platform == "linux":
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _physical_first(cores: tuple[int, ...], root: Path) -> tuple[int, ...]:
    """One hyperthread of each physical core before the second of any: two busy ones on one core slow each other."""
    seen: dict[str, int] = {}
    ranked: list[tuple[int, int]] = []
    for core in cores:
        siblings = _read(root / f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list") or str(core)
        ranked.append((seen.get(siblings, 0), core))
        seen[siblings] = seen.get(siblings, 0) + 1
    return tuple(core for _, core in sorted(ranked))


def _memory(root: Path) -> tuple[int, int]:
    """Bytes in all and bytes free, as the kernel sees them."""
    fields: dict[str, int] = {}
    for line in _read(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        words = rest.split()
        if words and words[0].isdigit():
            fields[name] = int(words[0]) * 1024
    if "MemTotal" in fields:
        return fields["MemTotal"], fields.get("MemAvailable", fields["MemTotal"])
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return total, total


def _memory_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(limit, used without what the kernel can drop) in bytes, of each control group around this process."""
    for folder, version in _groups(root, "memory"):
        limit = _number(folder / ("memory.max" if version == 2 else "memory.limit_in_bytes"))
        used = _number(folder / ("memory.current" if version == 2 else "memory.usage_in_bytes"))
        if limit is None or limit >= NO_LIMIT:
            continue
        droppable = "inactive_file" if version == 2 else "total_inactive_file"
        statistics = dict(line.split() for line in _read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
        yield limit, max(0, (used or 0) - int(statistics.get(droppable, 0)))


def _core_quotas(root: Path) -> Iterator[float]:
    """Cores' worth of time that each control group around this process leaves it."""
    for folder, version in _groups(root, "cpu"):
        if version == 2:
            words = _read(folder / "cpu.max").split()
            quota, period = (words[0], words[1]) if len(words) == 2 else ("max", "1")
        else:
            quota = _read(folder / "cpu.cfs_quota_us").strip()
            period = _read(folder / "cpu.cfs_period_us").strip()
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            yield int(quota) / int(period)


def _groups(root: Path, controller: str) -> Iterator[tuple[Path, int]]:
    """This process's control group and all around it, with the cgroup version. In a container its own path may not be
    visible; then what is mounted is its group."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if number == "0" and not names:
            mount, version = root / "sys/fs/cgroup", 2
        elif controller in names.split(","):
            mount, version = root / "sys/fs/cgroup" / controller, 1
        else:
            continue
        below = [part for part in path.split("/") if part not in ("", "..")]
        for depth in range(len(below), -1, -1):
            folder = mount.joinpath(*below[:depth])
            if folder.is_dir():
                yield folder, version


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    for line in _read(cpuinfo).splitlines():
        name, _, words = line.partition(":")
        if name.strip().lower() in ("flags", "features"):
            return frozenset(words.split())
    return frozenset()


def read_gpus(environment: Mapping[str, str] = os.environ) -> tuple[Gpu, ...]:
    """GPUs that nvidia-smi lists and CUDA_VISIBLE_DEVICES leaves, in that order. None if there is no nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return ()
    command = [program, f"--query-gpu={GPU_FIELDS}", "--format=csv,noheader,nounits"]
    try:
        listing = subprocess.run(
            command, capture_output=True, text=True, timeout=NVIDIA_SMI_SECONDS, check=True, stdin=subprocess.DEVNULL
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ()  # a driver that does not answer: no GPU can be used, and `doctor` says why
    return parse_gpus(listing, environment.get("CUDA_VISIBLE_DEVICES"))


def parse_gpus(listing: str, visible: str | None) -> tuple[Gpu, ...]:
    """nvidia-smi's lines of `GPU_FIELDS` to GPUs, numbered as CUDA numbers them."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(listing.splitlines()) if len(row) == 6]
    if visible is not None:
        chosen: list[list[str]] = []
        for word in (word.strip() for word in visible.split(",")):
            match = [row for row in rows if word and (row[0] == word or (row[1].startswith(word) and word[0] == "G"))]
            if not match:
                break  # CUDA too stops at the first one it does not know
            chosen.append(match[0])
        rows = chosen
    return tuple(
        Gpu(
            index=index,
            name=name,
            memory_bytes=_mebibytes(total),
            free_bytes=_mebibytes(free),
            has_bfloat16=_decimal(capability) >= BFLOAT16_COMPUTE,
        )
        for index, (_, _, name, total, free, capability) in enumerate(rows)
    )


def _mebibytes(text: str) -> int:
    return int(_decimal(text) * 2**20)


def _decimal(text: str) -> float:
    """0 for "[N/A]" and the like."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def _read(path: Path) -> str:
    """A small file of the kernel; nothing if it is not there."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").rstrip("\n")
    except OSError:
        return ""


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdigit() else None
