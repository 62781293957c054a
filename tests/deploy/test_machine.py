"""Reading a machine: made-up /proc and /sys trees, and lines of nvidia-smi."""

from __future__ import annotations

from pathlib import Path

import pytest

from transload.deploy import machine as machine_module
from transload.deploy.machine import parse_gpus, read_machine, usable_cores

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 16 GiB with 4 cores, 10 GiB of it free, without control groups."""
    write(tmp_path, "proc/meminfo", f"MemTotal: {16 * GIB // 1024} kB\nMemAvailable: {10 * GIB // 1024} kB\n")
    write(tmp_path, "proc/cpuinfo", "processor : 0\nflags : fpu avx512f avx512_bf16\n")
    monkeypatch.setattr(machine_module, "usable_cores", lambda: (0, 1, 2, 3))
    return tmp_path


def write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_memory_and_features_come_from_the_kernel(root: Path) -> None:
    machine = read_machine(root, with_gpus=False)
    assert (machine.memory_bytes, machine.free_bytes) == (16 * GIB, 10 * GIB)
    assert machine.cores == (0, 1, 2, 3)
    assert machine.core_quota is None
    assert machine.has_bfloat16


def test_a_cpu_without_the_instructions_has_no_bfloat16(root: Path) -> None:
    write(root, "proc/cpuinfo", "flags : fpu avx2\n")
    assert not read_machine(root, with_gpus=False).has_bfloat16


def test_an_arm_cpu_names_its_features_otherwise(root: Path) -> None:
    write(root, "proc/cpuinfo", "processor : 0\nFeatures : fp asimd bf16\n")
    assert read_machine(root, with_gpus=False).has_bfloat16


def test_a_cgroup_v2_limit_counts_without_the_page_cache(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/box/inner\n")
    write(root, "sys/fs/cgroup/box/memory.max", str(4 * GIB))
    write(root, "sys/fs/cgroup/box/memory.current", str(3 * GIB))
    write(root, "sys/fs/cgroup/box/memory.stat", f"anon 5\ninactive_file {2 * GIB}\n")
    write(root, "sys/fs/cgroup/box/cpu.max", "150000 100000\n")
    write(root, "sys/fs/cgroup/box/inner/memory.max", "max\n")
    write(root, "sys/fs/cgroup/box/inner/cpu.max", "max 100000\n")
    machine = read_machine(root, with_gpus=False)
    assert (machine.memory_bytes, machine.free_bytes) == (4 * GIB, 3 * GIB)
    assert machine.core_quota == 1.5


def test_a_container_whose_own_path_is_hidden_is_read_at_the_mount(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/../../elsewhere\n")
    write(root, "sys/fs/cgroup/memory.max", str(2 * GIB))
    write(root, "sys/fs/cgroup/memory.current", str(GIB))
    machine = read_machine(root, with_gpus=False)
    assert (machine.memory_bytes, machine.free_bytes) == (2 * GIB, GIB)


def test_cgroup_v1_limits_count_too_and_its_huge_number_means_none(root: Path) -> None:
    write(root, "proc/self/cgroup", "4:memory:/box\n2:cpu,cpuacct:/box\n0::/\n")
    write(root, "sys/fs/cgroup/memory/memory.limit_in_bytes", "9223372036854771712")
    write(root, "sys/fs/cgroup/memory/box/memory.limit_in_bytes", str(6 * GIB))
    write(root, "sys/fs/cgroup/memory/box/memory.usage_in_bytes", str(GIB))
    write(root, "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us", "300000")
    write(root, "sys/fs/cgroup/cpu/box/cpu.cfs_period_us", "100000")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1")
    write(root, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000")
    machine = read_machine(root, with_gpus=False)
    assert (machine.memory_bytes, machine.free_bytes) == (6 * GIB, 5 * GIB)
    assert machine.core_quota == 3.0


def test_a_limit_above_the_hardware_gives_no_memory_that_is_not_there(root: Path) -> None:
    write(root, "proc/self/cgroup", "0::/\n")
    write(root, "sys/fs/cgroup/memory.max", str(64 * GIB))
    assert read_machine(root, with_gpus=False).memory_bytes == 16 * GIB


def test_one_thread_of_each_physical_core_comes_first(root: Path) -> None:
    for core, siblings in {0: "0-1", 1: "0-1", 2: "2-3", 3: "2-3"}.items():
        write(root, f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list", f"{siblings}\n")
    assert read_machine(root, with_gpus=False).cores == (0, 2, 1, 3)


def test_this_machine_can_be_read() -> None:
    machine = read_machine(with_gpus=False)
    assert set(machine.cores) == set(usable_cores())
    assert 0 < machine.free_bytes <= machine.memory_bytes


LISTING = """\
0, GPU-aaaa-1, NVIDIA A100-SXM4-80GB, 81920, 80000, 8.0
1, GPU-bbbb-2, Tesla T4, 15360, 15000, 7.5
2, GPU-cccc-3, Odd, [N/A], [N/A], [N/A]
"""


def test_gpus_are_read_from_the_listing() -> None:
    a100, t4, odd = parse_gpus(LISTING, None)
    assert (a100.index, a100.name, a100.memory_bytes, a100.has_bfloat16) == (0, "NVIDIA A100-SXM4-80GB", 80 * GIB, True)
    assert (t4.index, t4.free_bytes, t4.has_bfloat16) == (1, 15000 * 2**20, False)
    assert odd.memory_bytes == 0


@pytest.mark.parametrize(
    ("visible", "names"),
    [
        ("1,0", ["Tesla T4", "NVIDIA A100-SXM4-80GB"]),
        ("GPU-bbbb", ["Tesla T4"]),
        ("", []),
        ("-1", []),
        ("1,9,0", ["Tesla T4"]),
    ],
)
def test_cuda_visible_devices_chooses_and_numbers_them_as_cuda_does(visible: str, names: list[str]) -> None:
    gpus = parse_gpus(LISTING, visible)
    assert [gpu.name for gpu in gpus] == names
    assert [gpu.index for gpu in gpus] == list(range(len(names)))


def test_a_driver_that_prints_an_error_shows_no_gpu() -> None:
    assert parse_gpus("NVIDIA-SMI has failed because it couldn't communicate\n", None) == ()
