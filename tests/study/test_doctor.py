"""What the doctor finds on machines that lack something."""

from __future__ import annotations

import os
import resource
import socket
import stat
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from transload.deploy.machine import Gpu, Machine
from transload.study.doctor import (
    check_arithmetic,
    check_clock,
    check_cores,
    check_gpus,
    check_memory,
    check_model,
    check_open_files,
    check_port,
    check_shared_memory,
    check_torch,
    examine,
)

GIB = 2**30


def machine(
    cores: int = 8, free: int = 16 * GIB, quota: float | None = None, flags: str = "", gpus: tuple[Gpu, ...] = ()
) -> Machine:
    return Machine(
        cores=tuple(range(cores)),
        memory_bytes=32 * GIB,
        free_bytes=free,
        core_quota=quota,
        cpu_flags=frozenset(flags.split()),
        gpus=gpus,
    )


def test_this_machine_is_examined_in_full() -> None:
    checks = examine("127.0.0.1", 0)
    names = [check.name for check in checks]
    assert names[:8] == ["system", "torch", "cores", "arithmetic", "kernels", "memory", "shared memory", "open files"]
    assert all(check.advice for check in checks if check.status != "ok")


@pytest.mark.parametrize(
    ("found", "status"), [(machine(8), "ok"), (machine(1), "warn"), (machine(8, quota=1.0), "warn"), (machine(2), "ok")]
)
def test_a_split_wants_two_cores(found: Machine, status: str) -> None:
    assert check_cores(found).status == status


def test_a_container_limit_on_cores_is_told() -> None:
    assert "limited to 1.5 cores' worth of time" in check_cores(machine(8, quota=1.5)).found


def test_dtype_auto_is_told() -> None:
    assert "dtype auto is bfloat16" in check_arithmetic(machine(flags="avx512_bf16 amx_bf16")).found
    assert "dtype auto is float32" in check_arithmetic(machine(flags="avx2")).found
    with_kernels = msgspec.structs.replace(machine(flags="avx2"), has_kernels=True)
    assert "dtype auto is bfloat16" in check_arithmetic(with_kernels).found


@pytest.mark.parametrize(("free", "status"), [(16 * GIB, "ok"), (2 * GIB, "warn"), (GIB // 2, "fail")])
def test_too_little_memory_is_told(free: int, status: str) -> None:
    assert check_memory(machine(free=free)).status == status


def test_a_kernel_that_refuses_shared_memory_fails_with_the_way_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(_name: str, _flags: int) -> int:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "memfd_create", refused)
    (check,) = check_shared_memory()
    assert (check.status, check.found) == ("fail", "memfd refused: Operation not permitted")
    assert "transport: tcp" in (check.advice or "")


def test_a_low_hard_limit_of_open_files_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, 1024))
    assert check_open_files().status == "warn"
    monkeypatch.setattr(resource, "getrlimit", lambda _which: (256, resource.RLIM_INFINITY))
    assert check_open_files().status == "ok"


def test_a_missing_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert check_torch().status == "fail"


A100 = Gpu(index=0, name="A100", memory_bytes=80 * GIB, free_bytes=79 * GIB, has_bfloat16=True)


def test_a_gpu_that_this_torch_cannot_use_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda _name: "2.13.0+cpu")
    assert check_gpus(machine(gpus=(A100,))).status == "warn"
    monkeypatch.setattr(metadata, "version", lambda _name: "2.13.0")
    assert check_gpus(machine(gpus=(A100,))).status == "ok"


def test_no_gpu_and_no_driver_is_fine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert check_gpus(machine()).status == "ok"


def test_a_driver_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check = check_gpus(machine())
    assert (check.status, check.found) == ("warn", "nvidia-smi: NVIDIA-SMI has failed")


def test_a_model_that_is_not_here_is_told_with_what_will_happen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path))
    check = check_model()
    assert check.status == "warn"
    assert str(tmp_path) in (check.advice or "")


def test_a_cache_that_cannot_be_made_fails(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path / "file" / "below"))
    assert check_model().status == "fail"


def test_a_port_that_is_taken_is_told() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen(1)
        port = taken.getsockname()[1]
        assert check_port("127.0.0.1", port).status == "warn"
    assert check_port("127.0.0.1", port).status == "ok"


@pytest.mark.parametrize("port", [-1, 70_000])
def test_a_port_that_cannot_be_is_told(port: int) -> None:
    assert check_port("127.0.0.1", port).status == "warn"


def test_a_clock_that_is_off_or_coarse_is_told() -> None:
    assert check_clock(0.0, 1e-9).status == "warn"
    assert check_clock(2e9, 0.015).status == "warn"
    assert check_clock(2e9, 1e-9).status == "ok"
