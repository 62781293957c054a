"""What users felt: latencies, throughput and goodput, computed from the times at which tokens came.

The same functions judge live and simulated runs: they see records of times, never a clock or a server.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec
import numpy as np

from transload.deploy.spec import Targets

ErrorKind = Literal["connect", "http_status", "error_event", "truncated", "timeout", "malformed", "empty"]
"""connect: no connection. http_status: an answer other than 200. error_event: an error told inside the stream.
truncated: the stream broke off without saying it was done. timeout: not done by its deadline. malformed: not the
protocol. empty: complete, but without a token."""


class RequestRecord(msgspec.Struct, kw_only=True):
    """One request, as it went. Times are seconds since the run began."""

    index: int
    """Its place in the workload."""
    due_seconds: float
    """When it was to be sent. Latencies count from here, so a late load generator cannot make a server look fast."""
    start_seconds: float
    """When it was sent."""
    end_seconds: float
    """When its answer was complete, or it had failed."""
    token_seconds: list[float] = []
    """When each output token came; several tokens of one network read share a time."""
    num_input_tokens: int
    """As the server counted them, else as the workload asked."""
    num_output_tokens: int
    """As the server counted them, else `len(token_seconds)`."""
    num_output_asked: int
    num_cached_tokens: int | None = None
    """Of the prompt, as the server told."""
    answer_id: str | None = None
    """What the server calls it."""
    error: ErrorKind | None = None
    error_detail: str = ""
    interrupted: bool = False
    """Cut off by the user's own stop: neither a success nor a failure."""


class Distribution(msgspec.Struct, frozen=True):
    """Of `count` values in seconds. Percentiles interpolate linearly between order statistics (numpy's default)."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True, kw_only=True):
    """A run in numbers. Latencies and throughput are of successful requests; None where there is nothing to measure."""

    duration_seconds: float
    """From the first request due to the last one ended."""
    num_requests: int
    """Successful plus failed; those interrupted by the user are counted apart and nowhere else."""
    num_successful: int
    num_failed: int
    num_interrupted: int
    errors: dict[str, int]
    """By kind."""
    num_input_tokens: int
    num_output_tokens: int
    num_cached_tokens: int | None
    offered_requests_per_second: float | None
    """Rate at which requests were due: (their number - 1) / (last due - first due)."""
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    """Input and output."""
    ttft_seconds: Distribution | None
    """Time to first token: first token - due."""
    tpot_seconds: Distribution | None
    """Time per output token, one value a request: (last token - first token) / (tokens - 1). Needs two tokens."""
    itl_seconds: Distribution | None
    """Inter-token latency: every gap between two tokens that followed each other, of all requests together."""
    end_to_end_seconds: Distribution | None
    """End - due."""
    start_delay_seconds: Distribution | None
    """Start - due: how late the load generator itself was. Zero in a simulated run."""
    peak_in_flight: int
    num_usage_mismatches: int
    """Requests whose tokens as counted in the stream differ from the server's own count."""
    num_short_outputs: int
    """Successful requests with fewer output tokens than were asked for."""
    targets: Targets
    num_good: int
    goodput_requests_per_second: float
    """Good requests a second."""
    attainment: float | None
    """Good requests as a share of all requests, failed ones included."""
    meets_targets: bool | None
    """Whether attainment reaches the wanted share. None if no target is set or nothing ended."""


def ttft_seconds(record: RequestRecord) -> float | None:
    """Time to first token, from when the request was due. None if no token came."""
    return record.token_seconds[0] - record.due_seconds if record.token_seconds else None


def tpot_seconds(record: RequestRecord) -> float | None:
    """Mean time per output token after the first: (last - first) / (n - 1). None for fewer than two tokens.

    n is the server's own count if it gave one: a stream may carry several tokens in one event.
    """
    if record.num_output_tokens < 2 or len(record.token_seconds) < 2:
        return None
    return (record.token_seconds[-1] - record.token_seconds[0]) / (record.num_output_tokens - 1)


def is_good(record: RequestRecord, targets: Targets) -> bool:
    """Succeeded within the targets. A request of one token has no TPOT and so cannot miss that target."""
    if record.error is not None or record.interrupted:
        return False
    ttft, tpot = ttft_seconds(record), tpot_seconds(record)
    if targets.ttft_seconds is not None and (ttft is None or ttft > targets.ttft_seconds):
        return False
    return targets.tpot_seconds is None or tpot is None or tpot <= targets.tpot_seconds


def summarize(records: Iterable[RequestRecord], targets: Targets | None = None) -> Summary:
    """The whole run. Costs memory in proportion to the number of tokens."""
    targets = targets or Targets()
    records = list(records)
    ended = [record for record in records if not record.interrupted]
    successful = [record for record in ended if record.error is None]
    good = sum(is_good(record, targets) for record in ended)
    duration = max((r.end_seconds for r in ended), default=0.0) - min((r.due_seconds for r in ended), default=0.0)
    num_input_tokens = sum(record.num_input_tokens for record in successful)
    num_output_tokens = sum(record.num_output_tokens for record in successful)
    cached = [record.num_cached_tokens for record in successful if record.num_cached_tokens is not None]
    has_targets = targets.ttft_seconds is not None or targets.tpot_seconds is not None
    attainment = good / len(ended) if ended else None
    return Summary(
        duration_seconds=duration,
        num_requests=len(ended),
        num_successful=len(successful),
        num_failed=len(ended) - len(successful),
        num_interrupted=len(records) - len(ended),
        errors=dict(Counter(record.error for record in ended if record.error is not None).most_common()),
        num_input_tokens=num_input_tokens,
        num_output_tokens=num_output_tokens,
        num_cached_tokens=sum(cached) if cached else None,
        offered_requests_per_second=_offered_rate(records),
        requests_per_second=_rate(len(successful), duration),
        output_tokens_per_second=_rate(num_output_tokens, duration),
        total_tokens_per_second=_rate(num_input_tokens + num_output_tokens, duration),
        ttft_seconds=distribution([t for r in successful if (t := ttft_seconds(r)) is not None]),
        tpot_seconds=distribution([t for r in successful if (t := tpot_seconds(r)) is not None]),
        itl_seconds=distribution(_gaps(successful)),
        end_to_end_seconds=distribution([r.end_seconds - r.due_seconds for r in successful]),
        start_delay_seconds=distribution([r.start_seconds - r.due_seconds for r in ended]),
        peak_in_flight=_peak_in_flight(records),
        num_usage_mismatches=sum(r.num_output_tokens != len(r.token_seconds) for r in successful),
        num_short_outputs=sum(r.num_output_tokens < r.num_output_asked for r in successful),
        targets=targets,
        num_good=good,
        goodput_requests_per_second=_rate(good, duration),
        attainment=attainment,
        meets_targets=attainment >= targets.attainment if has_targets and attainment is not None else None,
    )


def distribution(values: Sequence[float] | np.ndarray[tuple[int], np.dtype[np.float64]]) -> Distribution | None:
    """None if there are no values."""
    if len(values) == 0:
        return None
    array = np.asarray(values, dtype=np.float64)
    p50, p90, p95, p99 = (float(p) for p in np.percentile(array, (50, 90, 95, 99)))
    return Distribution(len(array), float(array.mean()), p50, p90, p95, p99, float(array.max()))


def _gaps(records: list[RequestRecord]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    gaps = [np.diff(np.asarray(record.token_seconds)) for record in records if len(record.token_seconds) > 1]
    return np.concatenate(gaps) if gaps else np.empty(0)


def _rate(count: float, seconds: float) -> float:
    return count / seconds if seconds > 0 else 0.0


def _offered_rate(records: list[RequestRecord]) -> float | None:
    due = [record.due_seconds for record in records]
    span = max(due) - min(due) if due else 0.0
    return (len(due) - 1) / span if span > 0 and math.isfinite(span) else None


def _peak_in_flight(records: list[RequestRecord]) -> int:
    # At equal times ends (-1) sort before starts, so back-to-back requests do not count as two at once.
    changes = sorted([(r.start_seconds, 1) for r in records] + [(r.end_seconds, -1) for r in records])
    peak = now = 0
    for _, change in changes:
        now += change
        peak = max(peak, now)
    return peak
