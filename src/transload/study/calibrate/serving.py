"""What a serving machine adds to bare steps, read from its event logs and from what the load generator saw.

Pure but for reading the logs: gaps between steps, messages, the front end, and by how much steps of a worker that
serves are slower than those of one that only computes.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import fmean, median

import msgspec

from transload.hardware.cost.measured import MeasuredStepCost
from transload.hardware.cost.shape import StepShape
from transload.hardware.measured import FrontEnd, MeasuredLink, Slowdown
from transload.runtime.event_log import read_event_log
from transload.study.metrics import RequestRecord, ttft_seconds
from transload.study.timeline import CONTROLLER, Step, Timeline

LONGEST_GAP_SECONDS = 0.05
"""Between two steps of a worker that had work all along; longer ones are pauses."""


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """What was seen while single requests were served, one after another."""

    message_seconds: float
    step_gap_seconds: float
    serving: Slowdown
    request_seconds: float
    links: dict[str, MeasuredLink]


def observe_serving(
    folder: Path, timeline: Timeline, records: Sequence[RequestRecord], bare: MeasuredStepCost
) -> Serving:
    """`records`: of requests that were served one after another, the only ones in the logs."""
    return Serving(
        message_seconds=_message_seconds(folder),
        step_gap_seconds=gap_seconds(timeline.steps),
        serving=_slowdown(timeline, records, bare),
        request_seconds=_front_end_seconds(timeline, records),
        links=_links(folder),
    )


def front_end_cpu(short: tuple[int, int, float], long: tuple[int, int, float], request_seconds: float) -> FrontEnd:
    """From two loads of (requests, output tokens, CPU seconds): what a request and a token cost each."""
    (requests1, tokens1, cpu1), (requests2, tokens2, cpu2) = short, long
    determinant = requests1 * tokens2 - requests2 * tokens1
    per_request = (cpu1 * tokens2 - cpu2 * tokens1) / determinant if determinant else 0.0
    per_token = (requests1 * cpu2 - requests2 * cpu1) / determinant if determinant else cpu2 / max(1, tokens2)
    if per_request < 0:
        per_request, per_token = 0.0, (cpu1 + cpu2) / max(1, tokens1 + tokens2)
    return FrontEnd(
        request_seconds=max(0.0, request_seconds),
        request_cpu_seconds=per_request,
        token_cpu_seconds=max(0.0, per_token),
    )


def _message_seconds(folder: Path) -> float:
    """From a worker's StepDone to the Controller's word of it."""
    done: dict[str, deque[tuple[float, float]]] = defaultdict(deque)
    for path in sorted(folder.glob("*.jsonl")):
        worker = path.name.rsplit(".", 2)[0]
        if worker != CONTROLLER:
            done[worker].extend(
                (line["at"], line["seconds"]) for line in read_event_log(path) if line["event"] == "StepDone"
            )
    delays: list[float] = []
    for path in folder.glob(f"{CONTROLLER}.*.jsonl"):
        for line in read_event_log(path):
            if line["event"] != "Load" or not line["step_seconds"]:
                continue
            waiting = done[line["worker"]]
            while waiting:
                at, seconds = waiting.popleft()
                if seconds == line["step_seconds"]:
                    delays.append(line["at"] - at)
                    break
    return max(0.0, median(delays)) if delays else 0.0


def gap_seconds(steps: Iterable[Step]) -> float:
    """Between two steps of a worker that had work all along, typically."""
    by_worker: dict[str, list[Step]] = defaultdict(list)
    for step in steps:
        by_worker[step.worker].append(step)
    gaps = [
        after.start_seconds - before.end_seconds
        for worker in by_worker.values()
        for before, after in pairwise(worker)
        if 0 <= after.start_seconds - before.end_seconds < LONGEST_GAP_SECONDS and after.num_decode
    ]
    return median(gaps) if gaps else 0.0


def _slowdown(timeline: Timeline, records: Sequence[RequestRecord], bare: MeasuredStepCost) -> Slowdown:
    """Steps as served over steps as computed alone. One request at a time: its context is known from its lengths.
    Prompts on prefill workers are streamed."""
    prompt = median(record.num_input_tokens for record in records)
    context = round(prompt + median(record.num_output_tokens for record in records) / 2)
    one = bare.step_seconds(StepShape((), 1, context))
    decodes = [
        (step.end_seconds - step.start_seconds) / step.num_steps / one
        for step in timeline.steps
        if step.num_decode == 1 and not step.num_prefill_tokens
    ]
    streamed, local = (
        prefill_slowdown(
            [step for step in timeline.steps if (timeline.pools[step.worker][1] == "prefill") is streams], bare
        )
        for streams in (True, False)
    )
    prefill = local or streamed or 1.0
    return Slowdown(
        prefill=prefill,
        decode=max(0.05, typical_mean(decodes)) if decodes else 1.0,
        streaming=streamed / prefill if streamed else 1.0,
    )


def prefill_slowdown(steps: Iterable[Step], bare: MeasuredStepCost) -> float | None:
    """Of steps that compute one prompt and nothing else; None if there is none."""
    ratios = [
        (step.end_seconds - step.start_seconds) / bare.step_seconds(StepShape(((0, step.num_prefill_tokens),)))
        for step in steps
        if step.num_prefill_tokens and not step.num_decode
    ]
    return max(0.05, typical_mean(ratios)) if ratios else None


def typical_mean(ratios: Sequence[float]) -> float:
    """Without the tenth at either end. A machine that has two speeds has a median at one of them."""
    cut = len(ratios) // 10
    return fmean(sorted(ratios)[cut : len(ratios) - cut])


def _front_end_seconds(timeline: Timeline, records: Sequence[RequestRecord]) -> float:
    """What users wait for their first token beyond the time the Controller knows of."""
    inside: list[float] = []
    for request in timeline.requests:
        after_prompt = next(
            (stage.start_seconds for stage in request.stages if stage.name in ("transfer", "decode queue", "decode")),
            None,
        )
        if after_prompt is not None:
            inside.append(after_prompt - request.start_seconds)
    outside = [seconds for record in records if (seconds := ttft_seconds(record)) is not None]
    # Both in the order in which they were served.
    return median(felt - known for felt, known in zip(outside, inside, strict=False)) if inside and outside else 0.0


def _links(folder: Path) -> dict[str, MeasuredLink]:
    """The last word on each transport."""
    found: dict[str, MeasuredLink] = {}
    for path in folder.glob(f"{CONTROLLER}.*.jsonl"):
        for line in read_event_log(path):
            if line["event"] == "LinkMeasured" and line["bytes_per_second"] > 0:
                found[line["transport"]] = MeasuredLink(
                    latency_seconds=line["latency_seconds"], bytes_per_second=line["bytes_per_second"]
                )
    return found
