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
from transload.study.calibrate.serving import gap_seconds
from transload.study.curves import latency_curves
from transload.study.metrics import Summary, summarize
from transload.study.provenance import machine_facts, versions
from transload.study.report.sources import with_timeline
from transload.study.result import Result
from transload.study.timeline import Timeline, read_timeline
from transload.study.told import chosen
from transload.study.validate.beside import Beside, MeasuredRun, simulate_beside
from transload.study.validate.compare import Seen, stage_distributions
from transload.study.validate.drift import drift_of, is_noticed, watch_drift
from transload.study.validate.saved import PlayedLoad, Validation, commit_of_this, load_of
from transload.study.validate.steps import StepSum, sum_steps
from transload.study.validate.virtual import capacity, measured_of
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
    """Of each load."""
    load_seconds: float | None = None
    """As many requests instead as come in about so long: near saturation, where they hang on each other, more."""
    num_input: int = 128
    num_output: int = 48
    cv: float = 0.5
    """Spread of both lengths."""
    seed: int = 1
    repeats: int = 1
    """All loads of all deployments so often, each time in turn and with requests of its own."""
    follows_drift: bool = True
    """What is simulated as calibrated is as fast as the machine was watched to be through each load, not as fast as
    when it was calibrated."""


class _Case(msgspec.Struct, frozen=True, kw_only=True):
    """One deployment under one load."""

    run: MeasuredRun
    beside: Beside
    played: PlayedLoad
    real: Result


def validate(
    cases: Sequence[tuple[str, Deployment]], chip_path: str, load: Load, say: Say, *, command: tuple[str, ...]
) -> tuple[Validation, list[Result]]:
    """What was compared, and the sides of each comparison as results to look at: real, given its steps, as calibrated.

    Raises `TransloadError` if a server cannot be started or a request fails.
    """
    warn_if_busy(say)
    measured = measured_of(chip_path)
    started_at, machine = datetime.now(UTC).isoformat(timespec="seconds"), machine_facts()
    found: list[_Case] = []
    for repeat in range(load.repeats):
        if load.repeats > 1:
            say(f"round {repeat + 1} of {load.repeats}")
        for name, deployment in cases:
            found += _play_case(name, deployment, chip_path, measured, load, repeat, say)
    done = Validation(
        command=command,
        started_at=started_at,
        commit=commit_of_this(),
        machine=machine,
        versions=versions(),
        simulated_by=command,
        simulated_commit=commit_of_this(),
        chip=measured,
        follows_drift=load.follows_drift,
        comparisons=tuple(case.beside.comparison for case in found),
        measured=tuple(case.run.seen.summary for case in found),
        measured_stages=tuple(dict(case.run.seen.stages) for case in found),
        given_steps=tuple(case.beside.given_steps.summary for case in found),
        as_calibrated=tuple(case.beside.as_calibrated.summary for case in found),
        played=tuple(case.played for case in found),
    )
    sides = [(case.real, case.beside.given_steps.result, case.beside.as_calibrated.result) for case in found]
    return done, [result for each in sides for result in each]


def _play_case(
    name: str, deployment: Deployment, chip_path: str, chip: MeasuredSteps, load: Load, repeat: int, say: Say
) -> list[_Case]:
    """One deployment under all its loads, on a server of its own."""
    found: list[_Case] = []
    with new_folder() as folder, ServerProcess(deployment, Path(folder)) as server, watch_drift(chip) as watch:
        _warm_up(server.url)
        drifts = [drift_of(chip, None if watch is None else watch.since())]
        for words, workload in _workloads(deployment, chip_path, load, repeat, drifts, say):
            say(f"{name}, {words}: for real")
            if watch is not None:
                watch.since()  # what was before is not of this load
            played = play(server.url, workload)
            speed = None if watch is None else watch.since()
            drift = drift_of(chip, speed)
            drifts.append(drift)
            if drift is not None and is_noticed(drift):
                say(f"  the machine takes {drift.prefill:.2f} x what it did when it was calibrated")
            timeline = read_timeline(server.event_log)
            run = MeasuredRun(
                name=name,
                load=words,
                deployment=deployment,
                workload=workload,
                seen=Seen(
                    summary=summarize(played.records, Targets()),
                    stages=stage_distributions([_seconds_by_stage(each) for each in played.waterfalls]),
                ),
                steps=_steps_of(timeline, played),
                drift=drift,
            )
            found.append(
                _Case(
                    run=run,
                    beside=simulate_beside(run, chip_path, follows_drift=load.follows_drift),
                    played=load_of(deployment, workload, speed, run.steps),
                    real=_real_result(name, deployment, workload, run.seen.summary, played, timeline),
                )
            )
    return found


def _steps_of(timeline: Timeline, played: Played) -> tuple[StepSum, ...]:
    """Of this load, the last that was played."""
    began = played.clock_seconds - timeline.clock_seconds
    steps = [step for step in timeline.steps if step.start_seconds >= began]
    return sum_steps(steps, began_seconds=began, gap_seconds=gap_seconds(steps))


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
    deployment: Deployment, chip_path: str, load: Load, repeat: int, drifts: Sequence[Slowdown | None], say: Say
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
                    num_requests=load.num_requests
                    if load.load_seconds is None
                    else max(1, round(rate * load.load_seconds)),
                    seed=load.seed + number + repeat * len(wanted),
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
