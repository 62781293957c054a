"""What a result was made with, for its file: commit, machine, versions; and where it goes."""

from __future__ import annotations

import json
import subprocess
import sys
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


def write_report(report: dict[str, Any], out: Path | None) -> None:
    """To the file, or to stdout."""
    text = json.dumps(report, indent=1) + "\n"
    if out is not None:
        out.write_text(text)
    else:
        sys.stdout.write(text)
