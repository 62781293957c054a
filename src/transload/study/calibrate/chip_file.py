"""What was measured as a chip file: a user's own chip, which simulations take by its path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import yaml

from transload.deploy.machine import read_machine
from transload.errors import DeploymentError
from transload.hardware.measured import MeasuredSteps
from transload.study.significant import significant

SIGNIFICANT = 5
_HEAD = """\
# Measured by `transload calibrate`. A pool takes it by path: `chip: {name}`.
# Good for the model, number format and threads below, on this machine alone.
"""


def write_chip_file(measured: MeasuredSteps, path: str | Path, *, is_gpu: bool) -> None:
    """Raises `DeploymentError` if it cannot be written."""
    memory: dict[str, Any] = {
        "tier": "HBM" if is_gpu else "DDR",
        "technology": "memory of this machine",
        "capacity": {
            "value": read_machine().memory_bytes,
            "unit": "B",
            "source": f"{measured.machine}, {measured.date}",
            "class": "measured",
        },
    }
    chip = {
        "id": "this-machine",
        "name": f"{measured.machine}, as measured on {measured.date}",
        "vendor": "this machine",
        "kind": "gpu" if is_gpu else "cpu",
        "memory": [memory],
        **_way_out(measured),
        "measured": significant(msgspec.to_builtins(measured), SIGNIFICANT),
    }
    text = yaml.safe_dump(chip, sort_keys=False, allow_unicode=True, width=110)
    try:
        Path(path).write_text(_HEAD.format(name=Path(path).name) + text, encoding="utf-8")
    except OSError as problem:
        raise DeploymentError(f"-o {path}: cannot write: {problem.strerror}") from None


def _way_out(measured: MeasuredSteps) -> dict[str, Any]:
    """The link to other workers, where one was seen, as any chip has it."""
    link = measured.links.get("shm") or next(iter(measured.links.values()), None)
    if link is None:
        return {}
    where = {"source": f"{measured.machine}, {measured.date}", "class": "measured"}
    return {
        "scale_out": {
            "name": "between workers of this machine",
            "bandwidth": {"value": significant(link.bytes_per_second, SIGNIFICANT), "unit": "B/s", **where},
            "latency": {"value": significant(link.latency_seconds, SIGNIFICANT), "unit": "s", **where},
        }
    }
