"""Compile the machines and the virtual runtime ahead of time, for simulations that run faster.

    python scripts/compile.py [--to build/compiled]
    PYTHONPATH=build/compiled python -m transload simulate ...

    python scripts/compile.py --with-checks
    PYTHONPATH=build/compiled python scripts/torture.py ...

Makes a copy of the package in which the modules below are compiled by mypyc (it comes with mypy; a C compiler and
Python's headers have to be there). What the copy computes is what the plain package computes, bit for bit. Nothing
else looks at the copy: who does not put it on the path runs the plain modules.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MODULES = (
    "control/admission.py",
    "control/batcher.py",
    "control/blocks.py",
    "control/controller.py",
    "control/drawn.py",
    "control/engine.py",
    "control/exchange.py",
    "control/handoff.py",
    "control/lifecycle.py",
    "control/load_report.py",
    "control/rates.py",
    "control/router.py",
    "control/step_run.py",
    "control/tracking.py",
    "control/views.py",
    "control/work.py",
    "runtime/cluster.py",
    "runtime/decode_run.py",
    "runtime/flight.py",
    "runtime/flows.py",
    "runtime/virtual.py",
    "runtime/virtual_links.py",
    "runtime/virtual_steps.py",
    "study/bins.py",
    "study/recorder.py",
    "study/schedule.py",
)
"""Where a simulation spends its time. Messages stay as they are: msgspec has made them of C already."""
CHECKS = ("tests/invariants.py", "tests/kv_contents.py", "tests/world.py")
"""What looks at the machines after every event of a schedule of faults."""
SETUP = """
import sys
from mypyc.build import mypycify
from setuptools import setup
opt_level = sys.argv.pop(1)
setup(
    name="transload-compiled",
    script_args=["-q", "build_ext", "--inplace"],
    ext_modules=mypycify(["--ignore-missing-imports", *sys.argv[1:]], opt_level=opt_level, debug_level="0"),
)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--to", type=Path, default=ROOT / "build" / "compiled")
    parser.add_argument("--quick", action="store_true", help="compile in half the time to something slower, to try it")
    parser.add_argument("--with-checks", action="store_true", help="and what scripts/torture.py checks with")
    arguments = parser.parse_args()
    target = arguments.to.resolve()
    shutil.rmtree(target, ignore_errors=True)
    shutil.copytree(ROOT / "src" / "transload", target / "transload", ignore=shutil.ignore_patterns("__pycache__"))
    files = [f"transload/{module}" for module in MODULES]
    if arguments.with_checks:
        shutil.copytree(ROOT / "tests", target / "tests", ignore=shutil.ignore_patterns("__pycache__"))
        files += CHECKS
    environment = {**os.environ, "PYTHONPATH": str(target), "MYPYPATH": str(target)}
    subprocess.run(
        [sys.executable, "-c", SETUP, "0" if arguments.quick else "2", *files], cwd=target, env=environment, check=True
    )
    print(f"compiled; use it with PYTHONPATH={target}")


if __name__ == "__main__":
    main()
