"""The compiled copy of the machines does what the plain modules do: everything that any machine is told, to the bit."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HAS_COMPILER = shutil.which("cc") is not None and Path(sysconfig.get_path("include"), "Python.h").exists()
PLAY = """
from hashlib import sha256
import transload.control.engine, transload.runtime.virtual
from tests.runtime.test_jumps import play
from tests.schedules import play as play_faults
for seed in range(25):
    for jumps in (False, True):
        seen = play(seed, jumps=jumps)
        print(seed, sha256(repr((seen.tokens, seen.ends, seen.told)).encode()).hexdigest())
for seed in range(25):
    world = play_faults(seed)
    print(seed, sha256(repr(world.events).encode()).hexdigest())
print([module.__file__.rpartition(".")[2] for module in (transload.control.engine, transload.runtime.virtual)])
"""


def played_by(package: Path) -> list[str]:
    environment = {**os.environ, "PYTHONPATH": f"{package}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-c", PLAY]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not HAS_COMPILER, reason="no C compiler, or no headers of Python")
def test_the_compiled_copy_does_what_the_plain_modules_do(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "compile.py"), "--quick", "--to", str(tmp_path)]
    subprocess.run(command, check=True, timeout=800, stdout=subprocess.DEVNULL)
    plain, compiled = played_by(ROOT / "src"), played_by(tmp_path)
    assert compiled[:-1] == plain[:-1]
    assert (plain[-1], compiled[-1]) == ("['py', 'py']", "['so', 'so']")
