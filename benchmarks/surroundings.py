"""What a result was made with, for its file: commit, machine, versions."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec

from transload.study.provenance import machine_facts, versions


def surroundings(libraries: Sequence[str] = (), commit: str | None = None) -> dict[str, Any]:
    """`libraries`: to be named besides the usual. `commit`: where git cannot tell."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return {
        "commit": commit or told.stdout.strip(),
        "machine": msgspec.to_builtins(machine_facts()),
        "versions": versions() | {name: version(name) for name in libraries},
    }
