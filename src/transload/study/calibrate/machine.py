"""Calibrates this machine: bare steps in probe processes, then a server under light loads, into one chip file."""

from __future__ import annotations

import resource
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import fmean, median

import msgspec

from transload import __version__
from transload.deploy.machine import read_machine
from transload.deploy.placement import place
from transload.deploy.plan import Placement, WorkerPlan
from transload.deploy.spec import Deployment
from transload.errors import DeploymentError
from transload.hardware.cost.measured import MeasuredStepCost
from transload.hardware.measured import MeasuredSteps, Slowdown, Speed
from transload.model.native.library import load
from transload.model.source import ModelFiles, locate
from transload.study.calibrate import fit as fitting
from transload.study.calibrate.effort import Effort, Say, warn_if_busy
from transload.study.calibrate.probes import Probe, StepOrder, probes
from transload.study.calibrate.served import measure_served
from transload.study.calibrate.server import Played, ServerProcess, new_folder, play
from transload.study.calibrate.serving import front_end_cpu, observe_serving, prefill_slowdown
from transload.study.calibrate.speed import SpeedWatch, core_of, drift, watching
from transload.study.calibrate.together import measure_interference
from transload.study.metrics import RequestRecord
from transload.study.provenance import machine_facts
from transload.study.timeline import Step, read_timeline
from transload.study.workload import ClosedLoop, Fixed, Synthetic, synthetic
from transload.transfer.layout import kv_layout

REPEATS = 6
"""Of a step in a round, prompts half as often; the first one does not count."""


def calibrate_machine(deployment: Deployment, effort: Effort, say: Say, *, command: str) -> MeasuredSteps:
    """Measure what `deployment` would run on. Takes minutes; the machine should have nothing else to do.

    Raises `TransloadError` if something cannot be started or measured.
    """
    warn_if_busy(say)
    files = locate(deployment.model)
    placement = place(deployment, read_machine(has_kernels=load() is not None), files.arch)
    plans = _representatives(placement)
    if any(plan.hop is not None for plan in placement.workers):
        with watching() as watch:
            return _as_served(deployment, placement, files, watch, effort, say, command=command)
    say(f"measuring steps of {plans[0].name}: {files.name}, {plans[0].dtype}, {plans[0].threads} thread(s)")
    with watching() as watch, probes(plans) as running:
        times, speed = _measure_steps(running[0], watch, effort, say)
        beside = measure_interference(running, effort, say)
        for probe in running:
            probe.close()  # a server is to have its memory
        section = _section(fitting.fit(times), times, plans[0], files, command=command, threads=plans[0].threads)
        section = msgspec.structs.replace(section, beside=beside, load_seconds=running[0].load_seconds, speed=speed)
        return _served(deployment, placement, section, watch, effort, say)


def _served(
    deployment: Deployment, placement: Placement, section: MeasuredSteps, watch: SpeedWatch, effort: Effort, say: Say
) -> MeasuredSteps:
    """With what serving adds, on a machine whose speed is looked at meanwhile."""
    speed = section.speed
    assert speed is not None
    say("starting a server to measure what serving adds")
    with new_folder() as name, ServerProcess(deployment, Path(name)) as server:
        _loop(server, num_requests=2, concurrency=1, output=8, seed=1)  # first uses
        watch.since()
        section = _with_serving(section, server, effort, say)
        moved = drift(speed, watch.since())
    serving = Slowdown(
        prefill=section.serving.prefill / moved,
        decode=section.serving.decode / moved,
        streaming=section.serving.streaming,
    )
    section = msgspec.structs.replace(section, serving=serving)
    say(
        f"  the machine takes {moved:.2f} x what it did before; without that, serving takes "
        f"{serving.prefill * serving.streaming:.2f} x, {serving.decode:.2f} x"
    )
    if all(plan.role != "prefill" for plan in placement.workers):
        return section
    local = _local_prefill(deployment, section, watch, effort)
    say(f"  prompts take {local:.2f} x while serving where they are not streamed to another worker")
    streaming = section.serving.prefill * section.serving.streaming / local
    serving = msgspec.structs.replace(section.serving, prefill=local, streaming=streaming)
    return msgspec.structs.replace(section, serving=serving)


def _local_prefill(deployment: Deployment, section: MeasuredSteps, watch: SpeedWatch, effort: Effort) -> float:
    """How much longer prompts take while serving, on a worker that keeps their cache."""
    assert section.speed is not None
    router = msgspec.structs.replace(deployment.router, local_prefill="always")
    bare = MeasuredStepCost(msgspec.structs.replace(section, serving=Slowdown(), step_gap_seconds=0.0))
    with (
        new_folder() as name,
        ServerProcess(msgspec.structs.replace(deployment, router=router), Path(name)) as server,
    ):
        _loop(server, num_requests=2, concurrency=1, output=4, seed=1)
        before = read_timeline(server.event_log).duration_seconds
        watch.since()
        _loop(server, num_requests=effort.single_requests, concurrency=1, output=4, seed=2)
        moved = drift(section.speed, watch.since())
        steps = [step for step in read_timeline(server.event_log).steps if step.start_seconds > before]
    return (prefill_slowdown(steps, bare) or 1.0) / moved


def _section(
    found: fitting.Fit,
    times: Mapping[StepOrder, float],
    plan: WorkerPlan,
    files: ModelFiles,
    *,
    command: str,
    threads: int,
) -> MeasuredSteps:
    """Bare steps, and on what they were measured."""
    return MeasuredSteps(
        model=files.name,
        dtype=plan.dtype,
        threads=threads,
        machine=_machine_words(),
        date=datetime.now(UTC).date().isoformat(),
        by=f"transload {__version__}: {command}",
        num_cores=machine_facts().num_cores,
        kv_tokens=plan.num_blocks * plan.block_size,
        kv_bytes_per_token=_kv_bytes_per_token(files, plan),
        prefill=found.prefill,
        prefill_context_seconds=found.prefill_context_seconds,
        decode=found.decode,
        mixed_share=found.mixed_share,
        step_error=fitting.step_error(found, times),
    )


def _representatives(placement: Placement) -> list[WorkerPlan]:
    """One worker, and if there is one another that computes on the same machine at the same time."""
    here = [plan for plan in placement.workers if plan.starts_here and plan.role != "ffn"]
    if not here:
        raise DeploymentError("no worker of this deployment starts here; there is nothing to measure")
    decoding = next((plan for plan in here if plan.role != "prefill"), here[0])
    other = next((plan for plan in here if plan is not decoding), None)
    return [decoding] if other is None else [decoding, other]


def _as_served(
    deployment: Deployment,
    placement: Placement,
    files: ModelFiles,
    watch: SpeedWatch,
    effort: Effort,
    say: Say,
    *,
    command: str,
) -> MeasuredSteps:
    """Steps that are split between processes are measured where they run: on a server, one worker with its helpers
    standing for all."""
    say("feed-forwards are computed elsewhere: measuring steps of a server of this deployment")
    plan = _representatives(placement)[0]
    with new_folder() as name, ServerProcess(deployment, Path(name)) as server:
        _loop(server, num_requests=2, concurrency=1, output=8, seed=1)  # first uses
        watch.since()
        seeds = count(1_000)

        def ask(users: int, prompt: int, output: int) -> list[Step]:
            before = read_timeline(server.event_log).duration_seconds
            _loop(server, num_requests=users, concurrency=users, prompt=prompt, output=output, seed=next(seeds))
            timeline = read_timeline(server.event_log)
            return [step for step in timeline.steps if step.start_seconds > before and step.worker == plan.name]

        times = measure_served(ask, max_batch=plan.limits.max_batch, effort=effort, say=say)
        speed = watch.since()
        threads = sum(each.threads for each in placement.workers if each.starts_here)
        section = _section(fitting.fit(times), times, plan, files, command=command, threads=threads)
        section = _with_serving(section, server, effort, say)
    # they were measured while serving
    return msgspec.structs.replace(section, serving=Slowdown(), speed=speed)


def _kv_bytes_per_token(files: ModelFiles, plan: WorkerPlan) -> int:
    layout = kv_layout(files.arch, files.identity, plan.block_size, plan.dtype)
    return layout.block_bytes // layout.block_size


def _measure_steps(probe: Probe, watch: SpeedWatch, effort: Effort, say: Say) -> tuple[dict[StepOrder, float], Speed]:
    """Median seconds of each, over all rounds, as if the machine had been as fast as it typically was all the time:
    each is put right by looks right before and after it, at the same core."""
    plan, core = probe.plan, core_of(probe.plan)
    wanted = fitting.orders(
        max_batch=plan.limits.max_batch,
        step_tokens=plan.limits.step_tokens,
        cache_tokens=plan.num_blocks * plan.block_size,
        block_size=plan.block_size,
        repeats=2 if effort.quick else REPEATS,
        quick=effort.quick,
    )
    found: dict[StepOrder, list[tuple[float, float]]] = {order: [] for order in wanted}
    looks = [watch.look(core).product_seconds]
    for number in range(1, effort.rounds + 1):
        for order in wanted:
            times = probe.measure(msgspec.structs.replace(order, core=core))
            looks.append(watch.look(core).product_seconds)
            seconds = median(probe.alone_seconds(times)[1:])  # the first one grows scratch memory
            found[order].append((seconds, fmean(looks[-2:])))
        say(f"  round {number} of {effort.rounds}: {len(wanted)} steps")
    typical = median(looks)
    medians = {order: median(took * typical / look for took, look in seen) for order, seen in found.items()}
    for order, seconds in medians.items():
        say(f"  {_words(order)}: {seconds * 1e3:.1f} ms")
    return medians, Speed(product_seconds=typical)


def _words(order: StepOrder) -> str:
    parts = [f"{tokens} prompt tokens after {start}" for start, tokens in order.prefill]
    if order.decode:
        parts.append(f"{len(order.decode)} decoding at {order.decode[0]}")
    return " and ".join(parts)


def _machine_words() -> str:
    facts = machine_facts()
    gpus = f", {', '.join(facts.gpus)}" if facts.gpus else ""
    return f"{facts.cpu}, {facts.num_cores} cores{gpus}, {facts.os}"


# ---------------------------------------------------------------------------------------------------------------------
# A server


def _with_serving(section: MeasuredSteps, server: ServerProcess, effort: Effort, say: Say) -> MeasuredSteps:
    """With what serving adds: one request after another and then several at once."""
    before = read_timeline(server.event_log)
    single = _loop(server, num_requests=effort.single_requests, concurrency=1, output=24, seed=2)
    timeline = read_timeline(server.event_log)
    later = msgspec.structs.replace(
        timeline,
        steps=tuple(step for step in timeline.steps if step.start_seconds > before.duration_seconds),
        requests=timeline.requests[len(before.requests) :],
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


def _loop(
    server: ServerProcess, *, num_requests: int, concurrency: int, output: int, seed: int, prompt: int = 128
) -> Played:
    workload = synthetic(
        Synthetic(
            arrivals=ClosedLoop(concurrency),
            input=Fixed(prompt),
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
