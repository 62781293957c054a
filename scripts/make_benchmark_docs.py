"""Writes docs/benchmarks.md from benchmarks/results/*.json, so that no figure in it is typed. A test compares them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from benchmark_docs import endurance, engine, faults, movement, serving, simulated  # noqa: E402

RESULTS = ROOT / "benchmarks" / "results"
TARGET = ROOT / "docs" / "benchmarks.md"
HEAD = """# Benchmarks

Made by `scripts/make_benchmark_docs.py` from `benchmarks/results/`; each result was printed by a committed script, with
the machine, versions and commit it ran on. Every ratio is to a baseline of the same run. A machine of two virtual cores
is noisy: treat differences under a fifth as equal.
"""
SECTIONS: dict[str, Callable[[dict[str, Any]], str]] = {
    "validation.json": simulated.validation,
    "validation-afd.json": simulated.split_validation,
    "engine.json": engine.engine,
    "start.json": serving.start,
    "split_peer.json": serving.split_peer,
    "interference.json": serving.interference,
    "poisson.json": serving.poisson,
    "overload.json": endurance.overload,
    "soak.json": endurance.soak,
    "handoff.json": movement.handoff,
    "handoff_hidden.json": movement.hidden,
    "afd.json": movement.afd,
    "front_end.json": serving.front_end,
    "gpu-llama-1b-h100.json": engine.gpu,
    "gpu-llama-8b-h100.json": engine.gpu,
    "gpu-serving-h100.json": engine.gpu_serving,
    "simulation.json": simulated.simulation,
    "torture.json": faults.torture,
    "torture_afd.json": faults.torture,
    "real_faults.json": faults.real_faults,
}


def page() -> str:
    """The whole page: a section for each result that is there."""
    parts = [HEAD]
    for name, section in SECTIONS.items():
        path = RESULTS / name
        if path.exists():
            parts.append(section(json.loads(path.read_text())))
    return "".join(parts)


def figures() -> dict[str, str]:
    """The page's figures by file name."""
    path = RESULTS / "poisson.json"
    return {"benchmarks-goodput.svg": serving.goodput_figure(json.loads(path.read_text()))} if path.exists() else {}


if __name__ == "__main__":
    TARGET.write_text(page())
    for name, figure in figures().items():
        (TARGET.parent / name).write_text(figure)
    sys.stdout.write(f"wrote {TARGET}\n")
