"""Calibrates this machine: bare steps in probe processes, then a server under light loads, into one chip file."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median

import msgspec

from transload import __version__
from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.plan import Placement, WorkerPlan
from transload.deploy.spec import Deployment
from transload.errors import DeploymentError
from transload.hardware.cost.measured import MeasuredStepCost
from transload.hardware.measured import Interference, MeasuredSteps
from transload.model.source import ModelFiles, locate
from transload.study.calibrate import fit as fitting
from transload.study.calibrate.effort import Effort, Say, warn_if_busy
from transload.study.calibrate.endpoint import calibrate_endpoint
from transload.study.calibrate.probes import Probe, StepOrder, measure_together, probes
from transload.study.calibrate.server import Played, ServerProcess, new_folder, play
from transload.study.calibrate.serving import front_end_cpu, observe_serving
from transload.study.metrics import RequestRecord
from transload.study.provenance import machine_facts
from transload.study.timeline import read_timeline
from transload.study.workload import ClosedLoop, Fixed, Synthetic, synthetic
from transload.transfer.layout import kv_layout


def calibrate_machine(deployment: Deployment, effort: Effort, say: Say, *, command: str) -> MeasuredSteps:
    """Measure what `deployment` would run on. Takes minutes; the machine should have nothing else to do.

    Raises `TransloadError` if something cannot be started or measured.
    """
    warn_if_busy(say)
    files = locate(deployment.model)
    placement = place(deployment, read_machine(), files.arch)
    plans = _representatives(placement)
    if any(plan.hop is not None for plan in placement.workers):
        return _from_outside(deployment, plans[0], files, effort, say, command=command)
    say(f"measuring steps of {plans[0].name}: {files.name}, {plans[0].dtype}, {plans[0].threads} thread(s)")
    with probes(plans) as running:
        times = _measure_steps(running[0], effort, say)
        beside = _beside(running, effort, say)
        load_seconds = running[0].load_seconds
    found = fitting.fit(times)
    section = MeasuredSteps(
        model=files.name,
        dtype=plans[0].dtype,
        threads=plans[0].threads,
        machine=_machine_words(),
        date=datetime.now(UTC).date().isoformat(),
        by=f"transload {__version__}: {command}",
        num_cores=machine_facts().num_cores,
        kv_tokens=plans[0].num_blocks * plans[0].block_size,
        kv_bytes_per_token=_kv_bytes_per_token(files, plans[0]),
        prefill=found.prefill,
        prefill_context_seconds=found.prefill_context_seconds,
        decode=found.decode,
        mixed_share=found.mixed_share,
        beside=beside,
        load_seconds=load_seconds,
        step_error=fitting.step_error(found, times),
    )
    return _with_serving(section, deployment, effort, say)


def _representatives(placement: Placement) -> list[WorkerPlan]:
    """One worker, and if there is one another that computes on the same machine at the same time."""
    here = [plan for plan in placement.workers if plan.starts_here and plan.role != "ffn"]
    if not here:
        raise DeploymentError("no worker of this deployment starts here; there is nothing to measure")
    decoding = next((plan for plan in here if plan.role != "prefill"), here[0])
    other = next((plan for plan in here if plan is not decoding), None)
    return [decoding] if other is None else [decoding, other]


def _from_outside(
    deployment: Deployment, plan: WorkerPlan, files: ModelFiles, effort: Effort, say: Say, *, command: str
) -> MeasuredSteps:
    """Steps that are split between processes are measured where they run: on a server, by what its users feel."""
    say("feed-forwards are computed elsewhere: measuring a server of this deployment from outside")
    with new_folder() as name, ServerProcess(deployment, Path(name)) as server:
        felt = calibrate_endpoint(server.url, effort, say, command=command, api_key=None)
    return msgspec.structs.replace(
        felt,
        model=files.name,
        dtype=plan.dtype,
        threads=plan.threads,
        machine=_machine_words(),
        by=f"transload {__version__}: {command}",
        num_cores=machine_facts().num_cores,
        kv_tokens=plan.num_blocks * plan.block_size,
        kv_bytes_per_token=_kv_bytes_per_token(files, plan),
    )


def _kv_bytes_per_token(files: ModelFiles, plan: WorkerPlan) -> int:
    layout = kv_layout(files.arch, files.identity, plan.block_size, plan.dtype)
    return layout.block_bytes // layout.block_size


def _measure_steps(probe: Probe, effort: Effort, say: Say) -> dict[StepOrder, float]:
    plan = probe.plan
    wanted = fitting.orders(
        max_batch=plan.limits.max_batch,
        step_tokens=plan.limits.step_tokens,
        cache_tokens=plan.num_blocks * plan.block_size,
        block_size=plan.block_size,
        quick=effort.quick,
    )
    times: dict[StepOrder, float] = {}
    for index, order in enumerate(wanted, 1):
        seconds = probe.measure(order).seconds[1:]  # the first one grows scratch memory
        times[order] = median(seconds)
        say(f"  step {index} of {len(wanted)}: {_words(order)}: {times[order] * 1e3:.1f} ms")
    return times


def _words(order: StepOrder) -> str:
    parts = [f"{tokens} prompt tokens after {start}" for start, tokens in order.prefill]
    if order.decode:
        parts.append(f"{len(order.decode)} decoding at {order.decode[0]}")
    return " and ".join(parts)


def _beside(running: Sequence[Probe], effort: Effort, say: Say) -> Interference:
    """Prompts on one worker and decodes on another, alone and together."""
    if len(running) < 2:
        return Interference()
    seconds = effort.together_seconds
    decode = StepOrder(decode=(256,) * 4, repeats=3, seconds=seconds)
    prefill = StepOrder(prefill=((0, 128),), repeats=3, seconds=seconds)
    decode_alone = median(running[0].measure(decode).seconds)
    prefill_alone = median(running[1].measure(prefill).seconds)
    decoding, prefilling = measure_together([(running[0], decode), (running[1], prefill)])
    found = Interference(
        prefill=max(1.0, median(prefilling.seconds) / prefill_alone),
        decode=max(1.0, median(decoding.seconds) / decode_alone),
    )
    say(f"  beside each other: prefill takes {found.prefill:.2f} x as long, decode {found.decode:.2f} x")
    return found


def _machine_words() -> str:
    facts = machine_facts()
    gpus = f", {', '.join(facts.gpus)}" if facts.gpus else ""
    return f"{facts.cpu}, {facts.num_cores} cores{gpus}, {facts.os}"


# ---------------------------------------------------------------------------------------------------------------------
# A server


def _with_serving(section: MeasuredSteps, deployment: Deployment, effort: Effort, say: Say) -> MeasuredSteps:
    """With what serving adds: measured on a server of its own, one request after another and then several at once."""
    say("starting a server to measure what serving adds")
    with new_folder() as name, ServerProcess(deployment, Path(name)) as server:
        _loop(server, num_requests=2, concurrency=1, output=8, seed=1)  # first uses
        warm = read_timeline(server.event_log)
        single = _loop(server, num_requests=effort.single_requests, concurrency=1, output=24, seed=2)
        timeline = read_timeline(server.event_log)
        # Only what came after the warm-up.
        later = msgspec.structs.replace(
            timeline,
            steps=tuple(step for step in timeline.steps if step.start_seconds > warm.duration_seconds),
            requests=timeline.requests[len(warm.requests) :],
        )
        seen = observe_serving(server.event_log, later, single.records, MeasuredStepCost(section))
        loads = [_counted(server, effort, output) for output in (8, 48)]
    front_end = front_end_cpu(loads[0], loads[1], seen.request_seconds)
    say(
        f"  steps take {seen.serving.prefill:.2f} x (prefill), {seen.serving.decode:.2f} x (decode) while serving; "
        f"{seen.step_gap_seconds * 1e3:.2f} ms between steps, {seen.message_seconds * 1e3:.2f} ms a message, "
        f"{front_end.request_seconds * 1e3:.1f} ms in the front end, {front_end.token_cpu_seconds * 1e3:.2f} ms of a "
        "core a token there"
    )
    return msgspec.structs.replace(
        section,
        serving=seen.serving,
        step_gap_seconds=seen.step_gap_seconds,
        message_seconds=seen.message_seconds,
        front_end=front_end,
        links=seen.links,
    )


def _loop(server: ServerProcess, *, num_requests: int, concurrency: int, output: int, seed: int) -> Played:
    workload = synthetic(
        Synthetic(
            arrivals=ClosedLoop(concurrency),
            input=Fixed(128),
            output=Fixed(output),
            num_requests=num_requests,
            seed=seed,
        )
    )
    return play(server.url, workload)


def _counted(server: ServerProcess, effort: Effort, output: int) -> tuple[int, int, float]:
    """(requests, output tokens, CPU seconds of front end and load generator) of a load of several at once."""
    before = server.cpu_seconds() + _own_cpu_seconds()
    played = _loop(server, num_requests=effort.loop_requests, concurrency=4, output=output, seed=output)
    spent = server.cpu_seconds() + _own_cpu_seconds() - before
    return len(played.records), _tokens(played.records), spent


def _tokens(records: Sequence[RequestRecord]) -> int:
    return sum(record.num_output_tokens for record in records)


def _own_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime
