"""A validation as a file, and its simulated half made anew from it: the measured half costs minutes, and stays true
when the simulation gets better or the machine is measured again.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from transload.deploy.load import loads, to_yaml
from transload.deploy.spec import Deployment
from transload.errors import DeploymentError
from transload.hardware.measured import MeasuredSteps, Speed
from transload.study.json_file import write_out
from transload.study.metrics import Distribution, Summary
from transload.study.provenance import MachineFacts
from transload.study.validate.beside import Beside, MeasuredRun, simulate_beside
from transload.study.validate.compare import Comparison, Seen
from transload.study.validate.drift import drift_of
from transload.study.validate.steps import StepSum
from transload.study.validate.virtual import measured_of
from transload.study.workload import ArrivalSpec, Workload

SCHEMA: Literal["transload-validation-4"] = "transload-validation-4"
Say = Callable[[str], None]


class PlayedLoad(msgspec.Struct, frozen=True, kw_only=True):
    """What was played on what."""

    deployment: str
    """As a file."""
    workload: str
    seed: int
    block_size: int
    concurrency: int | None
    duration_seconds: float | None
    arrivals: tuple[ArrivalSpec, ...]
    speed: Speed | None
    """Of the machine, all through the load."""
    steps: tuple[StepSum, ...]
    """Of all workers, as long as they took."""

    def as_workload(self) -> Workload:
        """The same arrivals and contents."""
        return Workload(
            name=self.workload,
            arrivals=lambda: iter(self.arrivals),
            seed=self.seed,
            block_size=self.block_size,
            concurrency=self.concurrency,
            duration_seconds=self.duration_seconds,
            num_requests=len(self.arrivals),
        )


def load_of(deployment: Deployment, workload: Workload, speed: Speed | None, steps: tuple[StepSum, ...]) -> PlayedLoad:
    """To be played again."""
    return PlayedLoad(
        deployment=to_yaml(deployment),
        workload=workload.name,
        seed=workload.seed,
        block_size=workload.block_size,
        concurrency=workload.concurrency,
        duration_seconds=workload.duration_seconds,
        arrivals=tuple(workload),
        speed=speed,
        steps=steps,
    )


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file."""

    schema: Literal["transload-validation-4"] = SCHEMA
    command: tuple[str, ...]
    started_at: str
    commit: str
    machine: MachineFacts
    versions: dict[str, str]
    simulated_by: tuple[str, ...]
    """The command that made the simulated half: the same, or a later one with --again."""
    simulated_commit: str
    chip: MeasuredSteps
    """What the simulated half rests on."""
    follows_drift: bool = True
    """Whether `as_calibrated` is of the machine as fast as it was watched to be through each load."""
    comparisons: tuple[Comparison, ...]
    measured: tuple[Summary, ...]
    """In the order of the comparisons."""
    measured_stages: tuple[dict[str, Distribution], ...]
    given_steps: tuple[Summary, ...]
    """Simulated, with steps as long as those of the measured run."""
    as_calibrated: tuple[Summary, ...]
    """Simulated, with what was known beforehand."""
    played: tuple[PlayedLoad, ...]


def simulate_again(
    path: str, chip_path: str, say: Say, *, command: tuple[str, ...], follows_drift: bool = True
) -> Validation:
    """The measured half of the file beside a simulation of today. Raises `DeploymentError` for a file that is none."""
    before, chip = read_validation(path), measured_of(chip_path)
    found: list[Beside] = []
    halves = zip(before.comparisons, before.measured, before.measured_stages, before.played, strict=True)
    for old, measured, stages, load in halves:
        say(f"{old.deployment}, {old.load}: simulated anew")
        run = MeasuredRun(
            name=old.deployment,
            load=old.load,
            deployment=loads(load.deployment, path),
            workload=load.as_workload(),
            seen=Seen(summary=measured, stages=stages),
            steps=load.steps,
            drift=drift_of(chip, load.speed),
        )
        found.append(simulate_beside(run, chip_path, follows_drift=follows_drift))
    return msgspec.structs.replace(
        before,
        simulated_by=command,
        simulated_commit=commit_of_this(),
        chip=chip,
        follows_drift=follows_drift,
        comparisons=tuple(each.comparison for each in found),
        given_steps=tuple(each.given_steps.summary for each in found),
        as_calibrated=tuple(each.as_calibrated.summary for each in found),
    )


def read_validation(path: str) -> Validation:
    """Raises `DeploymentError` if there is no such file, or it is none of this form."""
    try:
        return msgspec.json.decode(Path(path).read_bytes(), type=Validation)
    except OSError as problem:
        raise DeploymentError(f"--again {path}: cannot read: {problem.strerror}") from None
    except msgspec.DecodeError as problem:
        raise DeploymentError(
            f"--again {path}: want a file that `transload validate --json` of this version wrote; {problem}"
        ) from None


def write_validation(validation: Validation, path: str) -> None:
    """As indented JSON; "-": to stdout."""
    encoded = msgspec.json.format(msgspec.json.encode(validation), indent=1) + b"\n"
    write_out("--json", path, encoded)


def commit_of_this() -> str:
    """Of the checkout this runs from; empty where it is none."""
    try:
        done = subprocess.run(
            ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10.0,
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip()
