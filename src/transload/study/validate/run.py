"""Plays deployments for real and in virtual time and sets the two side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec

from transload.deploy.load import to_yaml
from transload.deploy.spec import Deployment, Targets
from transload.hardware.measured import MeasuredSteps, Slowdown
from transload.runtime.base import Waterfall
from transload.study.calibrate.effort import warn_if_busy
from transload.study.calibrate.server import Played, ServerProcess, new_folder, play
from transload.study.curves import latency_curves
from transload.study.metrics import Distribution, Summary, summarize
from transload.study.provenance import MachineFacts, machine_facts, versions
from transload.study.report.sources import with_timeline
from transload.study.result import Result
from transload.study.timeline import Timeline, read_timeline
from transload.study.told import chosen
from transload.study.validate.compare import Comparison, compare, stage_distributions
from transload.study.validate.drift import drift_of, is_noticed, watch_drift
from transload.study.validate.saved import PlayedLoad, Validation, commit_of_this, load_of
from transload.study.validate.virtual import capacity, measured_of, play_virtual
from transload.study.workload import ClosedLoop, Fixed, LogNormal, Poisson, Synthetic, Workload, synthetic

Say = Callable[[str], None]


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is played against each deployment."""

    shares: tuple[float, ...] = ()
    """Of the simulated capacity."""
    rates: tuple[float, ...] = ()
    """Requests a second."""
    workload: Workload | None = None
    """Instead of both: a trace."""
    num_requests: int = 60
    num_input: int = 128
    num_output: int = 48
    cv: float = 0.5
    """Spread of both lengths."""
    seed: int = 1
    follows_drift: bool = True
    """Simulate the machine as fast as it was around each load, not as fast as when it was calibrated."""


class _Case(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment under one load."""

    comparison: Comparison
    measured: Summary
    measured_stages: dict[str, Distribution]
    simulated: Summary
    played: PlayedLoad
    results: tuple[Result, Result]


def validate(
    cases: Sequence[tuple[str, Deployment]], chip_path: str, load: Load, say: Say, *, command: tuple[str, ...]
) -> tuple[Validation, list[Result]]:
    """What was compared, and both sides of each comparison as results to look at.

    Raises `TransloadError` if a server cannot be started or a request fails.
    """
    warn_if_busy(say)
    measured = measured_of(chip_path)
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), machine_facts()
    found: list[_Case] = []
    for name, deployment in cases:
        with (
            new_folder() as folder,
            ServerProcess(deployment, Path(folder)) as server,
            watch_drift(measured) as watch,
        ):
            _warm_up(server.url)
            drifts = [drift_of(measured, None if watch is None else watch.since())]
            for words, workload in _workloads(deployment, chip_path, load, drifts, say):
                say(f"{name}, {words}: for real")
                if watch is not None:
                    watch.since()  # what was before is not of this load
                played = play(server.url, workload)
                speed = None if watch is None else watch.since()
                drift = drift_of(measured, speed)
                drifts.append(drift)
                if drift is not None and is_noticed(drift):
                    say(f"  the machine takes {drift.prefill:.2f} x what it did when it was calibrated")
                simulated = play_virtual(
                    deployment, chip_path, workload, drift=drift if load.follows_drift else None, name=name
                )
                summary = summarize(played.records, Targets())
                stages = stage_distributions([_seconds_by_stage(each) for each in played.waterfalls])
                compared = compare(name, words, summary, simulated.summary, stages, simulated.stages)
                timeline = read_timeline(server.event_log)
                real = _real_result(name, deployment, workload, summary, played, timeline)
                found.append(
                    _Case(
                        comparison=msgspec.structs.replace(compared, drift=drift),
                        measured=summary,
                        measured_stages=stages,
                        simulated=simulated.summary,
                        played=load_of(deployment, workload, speed),
                        results=(real, simulated.result),
                    )
                )
    done = _summed_up(found, measured, started_at, machine, command, follows_drift=load.follows_drift)
    return done, [result for case in found for result in case.results]


def _summed_up(
    found: Sequence[_Case],
    chip: MeasuredSteps,
    started_at: str,
    machine: MachineFacts,
    command: tuple[str, ...],
    *,
    follows_drift: bool,
) -> Validation:
    return Validation(
        command=command,
        started_at=started_at,
        commit=commit_of_this(),
        machine=machine,
        versions=versions(),
        simulated_by=command,
        simulated_commit=commit_of_this(),
        chip=chip,
        follows_drift=follows_drift,
        comparisons=tuple(case.comparison for case in found),
        measured=tuple(case.measured for case in found),
        measured_stages=tuple(case.measured_stages for case in found),
        simulated=tuple(case.simulated for case in found),
        played=tuple(case.played for case in found),
    )


def _real_result(
    name: str, deployment: Deployment, workload: Workload, summary: Summary, played: Played, timeline: Timeline
) -> Result:
    shown = {record.answer_id for record in chosen(played.records)}
    result = Result(
        name=name,
        simulated=False,
        deployment=to_yaml(deployment),
        model=played.model,
        workload=workload.name,
        seed=workload.seed,
        machine=machine_facts(),
        versions=versions(),
        summary=summary,
        curves=latency_curves(played.records),
        pools=(),
        waterfalls=tuple(
            waterfall
            for record, waterfall in zip(played.records, played.waterfalls, strict=False)
            if record.answer_id in shown
        ),
    )
    return with_timeline(result, timeline, began_at=played.clock_seconds)


def _workloads(
    deployment: Deployment, chip_path: str, load: Load, drifts: Sequence[Slowdown | None], say: Say
) -> Iterable[tuple[str, Workload]]:
    """Each made when it is asked for, and capacity with the last of `drifts` by then: a machine that has become slower
    than it was when it was calibrated would be asked for more than it can do."""
    if load.workload is not None:
        yield load.workload.name, load.workload
        return
    wanted: list[tuple[str, float | None, float]] = [(f"{rate:g} requests/s", rate, 1.0) for rate in load.rates]
    wanted += [(f"{share:.0%} of capacity", None, share) for share in load.shares]
    for number, (words, rate, share) in enumerate(wanted):
        if rate is None:
            most = capacity(deployment, chip_path, load.num_input, load.num_output, drifts[-1])
            say(f"simulated capacity: {most:.2f} requests/s")
            rate = share * most
        yield (  # each with prompts of its own: none is in the cache of the one before
            words,
            synthetic(
                Synthetic(
                    arrivals=Poisson(rate),
                    input=LogNormal(float(load.num_input), load.cv),
                    output=LogNormal(float(load.num_output), load.cv),
                    num_requests=load.num_requests,
                    seed=load.seed + number,
                )
            ),
        )


def _warm_up(url: str) -> None:
    play(
        url,
        synthetic(Synthetic(arrivals=ClosedLoop(2), input=Fixed(64), output=Fixed(8), num_requests=4, seed=2**31)),
    )


def _seconds_by_stage(waterfall: Waterfall) -> dict[str, float]:
    seconds: dict[str, float] = defaultdict(float)
    for stage in waterfall.stages:
        seconds[stage.name] += stage.seconds
    return seconds
