"""Reads what results were written to: files of `transload simulate` and `transload bench`, and what logs say beside."""

from __future__ import annotations

from pathlib import Path

import msgspec

from transload.errors import DeploymentError
from transload.runtime.base import Waterfall
from transload.study import bench
from transload.study.curves import latency_curves
from transload.study.metrics import RequestRecord
from transload.study.observed import Window, link_results, pool_results, request_window
from transload.study.result import SCHEMA, Result, decode_result
from transload.study.timeline import RequestSpan, StageSpan, Timeline
from transload.study.timeline import Step as TimelineStep


class _Schema(msgspec.Struct):
    schema: str = ""


def read_result(path: str | Path, timeline: Timeline | None = None) -> Result:
    """One file. `timeline`: of the server that was measured. Raises `DeploymentError` if it cannot be read or is no
    result."""
    try:
        encoded = Path(path).read_bytes()
    except OSError as problem:
        raise DeploymentError(f"{path}: cannot read: {problem.strerror}") from None
    try:
        schema = msgspec.json.decode(encoded, type=_Schema).schema
    except msgspec.DecodeError as problem:
        raise DeploymentError(f"{path}: not a result: {problem}") from None
    if schema == bench.SCHEMA:
        try:
            measured = msgspec.json.decode(encoded, type=bench.Result)
        except msgspec.DecodeError as problem:
            raise DeploymentError(f"{path}: not a result of this version ({schema}): {problem}") from None
        return measured_result(measured, measured.records, name=Path(path).stem, timeline=timeline)
    if schema == SCHEMA:
        return decode_result(encoded, str(path))
    raise DeploymentError(
        f"{path}: schema {schema or '(none)'}: want a file that `transload simulate --json` ({SCHEMA}) or "
        f"`transload bench --json` ({bench.SCHEMA}) wrote"
    )


def measured_result(
    measured: bench.Result, records: list[RequestRecord] | None, *, name: str, timeline: Timeline | None = None
) -> Result:
    """A run of `transload bench` in the form that simulated runs have."""
    server = measured.server
    result = Result(
        name=name,
        simulated=False,
        deployment="",
        model=server.model,
        workload=measured.workload,
        seed=measured.seed,
        command=measured.command,
        started_at=measured.started_at,
        machine=measured.machine,
        versions=measured.versions,
        was_interrupted=measured.was_interrupted,
        summary=measured.summary,
        curves=measured.curves or (latency_curves(records) if records else {}),
        pools=(),
        requests=tuple(records) if records is not None else None,
        waterfalls=measured.waterfalls,
        notes=(
            f"Latencies are what the load generator saw over HTTP at {server.url}; machine and versions are those of "
            "the load generator.",
            *measured.error_details,
        ),
    )
    return result if timeline is None else with_timeline(result, timeline, began_at=measured.clock_seconds)


def with_timeline(result: Result, timeline: Timeline, *, began_at: float | None) -> Result:
    """With what the event logs of the server say of pools and links while the run lasted. `began_at`: when the run
    began on the clock of the logs; None or outside of them: the first request in them is taken for its first."""
    window = request_window(timeline)
    if began_at is not None:
        start = began_at - timeline.clock_seconds
        if 0 <= start <= timeline.duration_seconds:
            window = Window(start, min(timeline.duration_seconds, start + result.summary.duration_seconds))
    chip = result.machine.cpu if result.machine is not None else "unknown"
    return msgspec.structs.replace(
        result, pools=pool_results(timeline, window, chip), links=link_results(timeline, window)
    )


def timeline_of(result: Result) -> Timeline:
    """The steps that a result holds, and its chosen requests laid over one another from the beginning: when they came
    is not in it. Raises `DeploymentError` if it holds no steps."""
    if not result.steps:
        raise DeploymentError(
            f"{result.name}: holds no steps to draw; a simulation writes a trace itself (`transload simulate "
            "--trace-out FILE`), a server's is in its --event-log"
        )
    steps = tuple(
        TimelineStep(
            worker=step.worker,
            start_seconds=step.start_seconds,
            end_seconds=step.end_seconds,
            num_prefill_tokens=step.num_prefill_tokens,
            num_decode=step.num_decode,
            num_requests=step.num_decode + (step.num_prefill_tokens > 0),
            num_steps=step.num_steps,
        )
        for step in sorted(result.steps, key=lambda step: (step.start_seconds, step.worker))
    )
    return Timeline(
        pools={step.worker: (step.worker.rpartition("-")[0], "") for step in steps},
        kv_tokens={},
        transports=(),
        clock_seconds=0.0,
        duration_seconds=max(step.end_seconds for step in steps),
        steps=steps,
        num_steps_left_out=0,
        transfers=(),
        requests=tuple(map(_span, result.waterfalls)),
        loads=(),
        marks=(),
    )


def _span(waterfall: Waterfall) -> RequestSpan:
    return RequestSpan(
        request=waterfall.request,
        num_prompt_tokens=waterfall.num_prompt_tokens,
        num_outputs=waterfall.num_outputs,
        end=waterfall.state,
        stages=tuple(
            StageSpan(
                name=stage.name,
                worker=stage.worker,
                start_seconds=stage.start_seconds,
                end_seconds=stage.start_seconds + stage.seconds,
            )
            for stage in waterfall.stages
        ),
    )
