"""The compiled kernels: built once per machine into the cache folder by the compiler found there, loaded with ctypes.

Owns the compiler's command line, the name under which a build is kept, and the signatures. Never raises for a machine
that cannot build them: `load` then says why, and torch computes. Imports no torch.

A build's name is a hash of the sources, the flags, the compiler and the processor's features, so that a cache folder
shared by unlike machines never hands out instructions that one of them lacks.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from ctypes import POINTER, c_char_p, c_int, c_int64, c_uint64, c_void_p
from pathlib import Path
from typing import Any

from transload.errors import MachineError
from transload.model.cache import cache_folder, locked
from transload.model.native.python_calls import builtin, python_struct
from transload.model.native.structs import TWINS, LayerStruct, LinearStruct, ModelStruct, PythonStruct, StepStruct

SWITCH = "TRANSLOAD_NATIVE"
"""Environment variable: 0 leaves the kernels alone."""
SOURCES = (
    "llama.c",
    "attention.h",
    "cells.h",
    "groups.h",
    "pool.h",
    "python.h",
    "ring.h",
    "split.h",
    "stored.h",
    "tiles.h",
    "vector.h",
)
MAIN = SOURCES[0]
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-w", "-shared", "-fPIC")
COMPILERS = ("cc", "gcc", "clang")
COMPILE_SECONDS = 240.0
ROOM_BYTES = 64 << 20
RETRY_SECONDS = 24 * 3600.0
"""A compiler that failed is asked again after so long: it may have been the machine."""
"""A build that fails with less free in the cache folder may have failed for that."""
_FOLDER = Path(__file__).parent


class Library:
    """The functions of a loaded build."""

    def __init__(self, path: Path) -> None:
        """Raises `OSError` or `AttributeError` if the file is not a build of these sources, and `MachineError` if these
        sources do not fit this Python."""
        library = ctypes.CDLL(str(path))

        def function(name: str, result: type | None, *arguments: object) -> ctypes._NamedFuncPointer:
            found = getattr(library, f"transload_{name}")
            found.restype, found.argtypes = result, arguments
            return found  # type: ignore[no-any-return]

        linear = POINTER(LinearStruct)
        self.allocate = function("allocate", c_void_p, c_int64)
        self.free = function("free", None, c_void_p, c_int64)
        self.packed_bytes = function("packed_bytes", c_int64, linear)
        self.pack = function("pack", None, linear, c_void_p)
        self.multiply = function("multiply", None, linear, c_void_p, c_int64, c_void_p, c_void_p)
        self.open = function("open", c_void_p, POINTER(ModelStruct), c_int64)
        self.close = function("close", None, c_void_p)
        self.run_layers = function("run_layers", c_int, c_void_p, POINTER(StepStruct), c_int64, c_int64)
        self.logits = function("logits", None, c_void_p, c_void_p)
        self.first_largest = function("first_largest", None, c_void_p, c_int64, c_int64, c_void_p)
        self.read_stored = function("read_stored", None, c_int64, c_void_p, c_int64, c_int64, c_void_p)
        self.unpack_rows = function("unpack_rows", None, linear, c_void_p, c_int64, c_void_p)
        self.digest_begin = function("digest_begin", None, c_void_p, c_int64)
        self.digest_end = function("digest_end", c_uint64, c_void_p)
        self.sum_cells = function("sum_cells", None, c_void_p, c_void_p, c_void_p, c_int64, c_int64)
        self.copy_cells = function(
            "copy_cells", None, c_void_p, c_void_p, c_void_p, c_void_p, c_void_p, c_int64, c_int64, c_int64
        )
        self._check_sizes(function)
        self._add_split(function)
        self._ring_method = function("ring_method", c_void_p, c_char_p)
        function("use_python", None, POINTER(PythonStruct))(ctypes.byref(python_struct()))
        self.lanes: int = function("lanes", c_int64)()
        self.instruction_set: str = function("instruction_set", c_char_p)().decode()

    def _add_split(self, function: Callable[..., ctypes._NamedFuncPointer]) -> None:
        """Of split.h."""
        self.open_lane = function("open_lane", c_void_p, c_void_p)
        self.close_lane = function("close_lane", None, c_void_p)
        self.attend = function("attend", c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_int64, c_void_p)
        self.take_ffn = function("take_ffn", None, c_void_p, c_void_p, c_int64)
        self.residual = function("residual", None, c_void_p, c_void_p)
        self.head = function("head", c_int, c_void_p, c_void_p, c_int64, c_void_p)
        self.feed_forward = function("feed_forward", c_int, c_void_p, POINTER(LayerStruct), c_void_p, c_int64)

    def _check_sizes(self, function: Callable[..., ctypes._NamedFuncPointer]) -> None:
        """Kernels that read other structs than they are given would read anything."""
        size_of = function("size_of", c_int64, c_char_p)
        for name, twin in TWINS.items():
            theirs = size_of(name.encode())
            if theirs != ctypes.sizeof(twin):
                ours = f"{twin.__name__} {ctypes.sizeof(twin)}"
                raise MachineError(f"our own mistake: struct {name} of the kernels has {theirs} bytes, {ours}")

    def ring_function(self, name: str, address: int) -> Callable[..., Any]:
        """A function of ring.h, for the ring that lies there and must stay as long as it is called."""
        method = self._ring_method(name.encode())
        assert method is not None, name
        return builtin(method, address)


def load() -> Library | None:
    """The kernels for this machine, built if need be (a few seconds, once); None where torch must do."""
    return _attempt()[0]


def explanation() -> str:
    """Which instructions the kernels use, or why there are none."""
    library, reason = _attempt()
    return library.instruction_set if library is not None else reason


@functools.cache
def _attempt() -> tuple[Library | None, str]:
    if os.environ.get(SWITCH) == "0":
        return None, f"switched off by {SWITCH}=0"
    if sys.byteorder != "little":
        return None, "this machine's byte order is not one they are written for"
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return None, f"no C compiler found (looked for {', '.join(COMPILERS)})"
    try:
        return _loaded(compiler), ""
    except (OSError, AttributeError, MachineError, subprocess.SubprocessError) as error:
        return None, str(error)


def _loaded(compiler: str) -> Library:
    """Built once more if what the cache holds cannot be loaded."""
    path = _built(compiler)
    try:
        return Library(path)
    except (OSError, AttributeError):
        path.unlink(missing_ok=True)
        return Library(_built(compiler))


def build(compiler: str, flags: tuple[str, ...], target: Path) -> None:
    """Compile into `target` in one move. Raises `MachineError` with what the compiler said."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="build-") as scratch:
        made = Path(scratch) / target.name
        command = [compiler, *flags, str(_FOLDER / MAIN), "-o", str(made), "-lpthread"]
        here = {**os.environ, "TMPDIR": scratch}  # where there is room, or it is said that there is none
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_SECONDS, check=False, env=here)
        if done.returncode != 0:
            raise MachineError(f"{compiler} cannot compile the kernels: {done.stderr.strip()[-500:]}")
        with made.open("rb") as file:
            os.fsync(file.fileno())  # or a name may outlive the power that its content did not
        os.replace(made, target)


def _built(compiler: str) -> Path:
    folder = cache_folder() / "native"
    folder.mkdir(exist_ok=True)
    path = folder / f"{_fingerprint(compiler)}.so"
    failure = path.with_suffix(".failed")
    if path.exists():
        return path
    with locked(folder / "build.lock", wait_seconds=COMPILE_SECONDS):
        if path.exists():
            return path
        if failure.exists() and time.time() - failure.stat().st_mtime < RETRY_SECONDS:
            raise MachineError(failure.read_text())
        try:
            build(compiler, FLAGS, path)
        except MachineError as error:
            if shutil.disk_usage(folder).free > ROOM_BYTES:  # a full disk says nothing of the compiler
                failure.write_text(f"{error} (delete {failure} to try again)")
            raise
    return path


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((_FOLDER / name).read_bytes())
    state = os.stat(os.path.realpath(compiler))
    digest.update(repr((FLAGS, os.path.realpath(compiler), state.st_size, state.st_mtime_ns)).encode())
    digest.update(f"{platform.machine()} {_features()}".encode())
    return digest.hexdigest()[:24]


def _features() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
