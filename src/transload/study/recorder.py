"""Listens to a virtual run and keeps what a result needs: a few numbers a request, and bins of time.

Nothing is kept per token unless asked for, so memory grows with the number of requests by some dozens of bytes each.
"""

from __future__ import annotations

import math
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from transload.control.controller import Controller
from transload.control.messages import Finish, Load, Reject, RequestId, Stream, WorkerId
from transload.control.tracking import Tracked
from transload.deploy.spec import Targets
from transload.runtime.base import Waterfall
from transload.runtime.flight import StepTimes
from transload.runtime.records import waterfall
from transload.study.bins import LogHistogram, TimeBins
from transload.study.metrics import ErrorKind, RequestRecord
from transload.study.result import Step
from transload.study.workload import ArrivalSpec

MOST_SAMPLES = 48
"""Waterfalls kept of requests here and there, to choose a typical one from."""
MOST_STEPS = 200_000


class LiveRequest:
    """A request under way."""

    __slots__ = ("arrival", "due", "first", "index", "last", "num_tokens", "times")

    def __init__(self, index: int, arrival: ArrivalSpec, due: float) -> None:
        self.index = index
        self.arrival = arrival
        self.due = due
        self.first = -1.0
        self.last = -1.0
        self.num_tokens = 0
        self.times: list[float] = []


class PoolTally:
    """What one pool's workers did."""

    def __init__(self) -> None:
        self.busy = TimeBins()
        self.batch = TimeBins()
        """Requests in the step, times seconds."""
        self.waiting = TimeBins()
        self.kv = TimeBins()
        """Share of blocks referenced, times seconds."""
        self.busy_seconds = 0.0
        self.batch_seconds = 0.0
        self.kv_seconds = 0.0
        self.peak_kv_share = 0.0
        self.num_steps = 0
        self.num_prefill_tokens = 0
        self.num_decode_tokens = 0
        self.num_preemptions = 0


class LinkTally:
    """What went from one pool to another."""

    def __init__(self) -> None:
        self.bytes = TimeBins()
        self.num_bytes = 0
        self.num_transfers = 0
        self.busy_seconds = 0.0
        self.busy_until = 0.0
        self.exposed_seconds = 0.0
        self.wire_seconds = 0.0


class Recorder:
    """A sink and a watcher of one virtual run."""

    def __init__(
        self,
        pool_of: Mapping[WorkerId, str],
        targets: Targets,
        ended: Callable[[ArrivalSpec, float], None],
        *,
        with_records: bool = False,
        with_steps: bool = False,
    ) -> None:
        """`ended` is told when a request is over, so that the workload can go on."""
        self.controller: Controller | None = None
        self.live: dict[RequestId, LiveRequest] = {}
        self.ttft, self.tpot, self.end_to_end = array("d"), array("d"), array("d")
        self.itl = LogHistogram()
        self.errors: Counter[ErrorKind] = Counter()
        self.error_details: dict[str, int] = {}
        self.num_good = self.num_successful = self.num_rejected = self.num_recovered = 0
        self.num_input_tokens = self.num_output_tokens = self.num_cached_tokens = 0
        self.num_due = self.peak_in_flight = 0
        self.first_due, self.last_due, self.last_end = math.inf, 0.0, 0.0
        self.stage_seconds: dict[str, float] = {}
        self.stage_times: list[dict[str, float]] | None = [] if with_records else None
        """Of each request, in the order in which they ended."""
        self.pools = {name: PoolTally() for name in dict.fromkeys(pool_of.values())}
        self.links: dict[tuple[str, str], LinkTally] = {}
        self.records: list[RequestRecord] | None = [] if with_records else None
        self.step_list: list[Step] | None = [] if with_steps else None
        self.samples: dict[int, Waterfall] = {}
        self.worst: dict[str, tuple[float, Waterfall]] = {}
        self._stride = 1
        self._targets = targets
        self._ended = ended
        self._pool_of = pool_of
        self._tallies = {worker: self.pools[name] for worker, name in pool_of.items()}
        self._links: dict[tuple[WorkerId, WorkerId], LinkTally] = {}
        self._loads: dict[WorkerId, tuple[float, int, float]] = {}

    # -- requests -----------------------------------------------------------------------------------------------------

    def begin(self, request: RequestId, index: int, arrival: ArrivalSpec, due: float) -> None:
        """A request is submitted."""
        self.live[request] = LiveRequest(index, arrival, due)
        self.num_due += 1
        self.first_due = min(self.first_due, due)
        self.last_due = max(self.last_due, due)
        if len(self.live) > self.peak_in_flight:
            self.peak_in_flight = len(self.live)

    def stream(self, command: Stream, times: Sequence[float]) -> None:
        live = self.live.get(command.token.request)
        if live is None:
            return
        first = times[0]
        if live.last < 0:
            live.first = first
        else:
            self._join(first - live.last, times)
        live.last = times[-1]
        live.num_tokens += len(times)
        if self.records is not None:
            live.times += times

    def _join(self, gap: float, times: Sequence[float]) -> None:
        """A request's wait for a token that no step before has made one of: `steps` has counted the step alone."""
        step = times.first_step_seconds if isinstance(times, StepTimes) else 0.0
        if abs(gap - step) > 0.02 * step:
            self.itl.add(LogHistogram.bin_of(gap), 1, gap, gap)
            if step:
                self.itl.add(LogHistogram.bin_of(step), -1, -step, 0.0)

    def finish(self, command: Finish, now: float) -> None:
        live = self.live.pop(command.request)
        good = command.reason in ("stop", "length")
        ttft = live.first - live.due if live.first >= 0 else None
        tpot = (live.last - live.first) / (live.num_tokens - 1) if live.num_tokens > 1 else None
        if good:
            self._succeed(live, command, ttft, tpot, now)
        else:
            self._fail("error_event", f"{command.error_code}: {command.error}", now)
        assert self.controller is not None
        tracked = self.controller.ended[command.request]
        self.num_recovered += tracked.epoch > 0
        self._take_stages(tracked, now)
        self._sample(live, tracked, ttft, now)
        if self.records is not None:
            self.records.append(self._record(live, command, good=good, now=now))
        self._ended(live.arrival, now)

    def _succeed(self, live: LiveRequest, command: Finish, ttft: float | None, tpot: float | None, now: float) -> None:
        self.num_successful += 1
        self.num_input_tokens += command.num_prompt_tokens
        self.num_output_tokens += command.num_outputs
        self.num_cached_tokens += command.num_cached_tokens
        self.end_to_end.append(now - live.due)
        if ttft is not None:
            self.ttft.append(ttft)
        if tpot is not None:
            self.tpot.append(tpot)
        targets = self._targets
        late = targets.ttft_seconds is not None and (ttft is None or ttft > targets.ttft_seconds)
        slow = targets.tpot_seconds is not None and tpot is not None and tpot > targets.tpot_seconds
        self.num_good += not late and not slow
        self.last_end = max(self.last_end, now)

    def _fail(self, kind: ErrorKind, detail: str, now: float) -> None:
        self.errors[kind] += 1
        if detail in self.error_details or len(self.error_details) < 100:
            self.error_details[detail] = self.error_details.get(detail, 0) + 1
        self.last_end = max(self.last_end, now)

    def reject(self, command: Reject, now: float) -> None:
        full = command.retry_after_seconds is not None
        self.refuse(command.request, "the queue is full (429)" if full else command.message, now)

    def refuse(self, request: RequestId, why: str, now: float) -> None:
        """A request is refused at the border."""
        live = self.live.pop(request)
        self.num_rejected += 1
        self._fail("http_status", why, now)
        if self.records is not None:
            self.records.append(
                RequestRecord(
                    index=live.index,
                    due_seconds=live.due,
                    start_seconds=live.due,
                    end_seconds=now,
                    num_input_tokens=live.arrival.num_input_tokens,
                    num_output_tokens=0,
                    num_output_asked=live.arrival.num_output_tokens,
                    error="http_status",
                    error_detail=why,
                )
            )
        self._ended(live.arrival, now)

    @staticmethod
    def _record(live: LiveRequest, command: Finish, *, good: bool, now: float) -> RequestRecord:
        return RequestRecord(
            index=live.index,
            due_seconds=live.due,
            start_seconds=live.due,
            end_seconds=now,
            token_seconds=live.times,
            num_input_tokens=command.num_prompt_tokens,
            num_output_tokens=command.num_outputs,
            num_output_asked=live.arrival.num_output_tokens,
            num_cached_tokens=command.num_cached_tokens,
            error=None if good else "error_event",
            error_detail="" if good else f"{command.error_code}: {command.error}",
        )

    # -- where the time of a request went -----------------------------------------------------------------------------

    def _take_stages(self, tracked: Tracked, now: float) -> None:
        stages, seconds = tracked.stages, self.stage_seconds
        own: dict[str, float] = {}
        if self.stage_times is not None:
            self.stage_times.append(own)
        for index, stage in enumerate(stages):
            end = stages[index + 1].start if index + 1 < len(stages) else now
            seconds[stage.name] = seconds.get(stage.name, 0.0) + end - stage.start
            if self.stage_times is not None:
                own[stage.name] = own.get(stage.name, 0.0) + end - stage.start
            if stage.name == "preempted" and stage.worker is not None:
                self._tallies[stage.worker].num_preemptions += 1
            if stage.name == "transfer":
                self._take_transfer(tracked, end - stage.start, stage.detail.get("wire_seconds", 0.0))
            elif "transfer_wire_seconds" in stage.detail:
                self._take_transfer(tracked, 0.0, stage.detail["transfer_wire_seconds"])

    def _take_transfer(self, tracked: Tracked, exposed: float, wire: float | int | str) -> None:
        if tracked.prefill is None or tracked.decode is None:
            return
        link = self._link(tracked.prefill, tracked.decode)
        link.num_transfers += 1
        link.exposed_seconds += exposed
        link.wire_seconds += float(wire)

    def _sample(self, live: LiveRequest, tracked: Tracked, ttft: float | None, now: float) -> None:
        values = {"ttft": ttft, "end_to_end": now - live.due}
        for name, value in values.items():
            if value is not None and (name not in self.worst or value > self.worst[name][0]):
                self.worst[name] = value, waterfall(tracked, now)
        if live.index % self._stride == 0:
            self.samples[live.index] = waterfall(tracked, now)
            if len(self.samples) > MOST_SAMPLES:
                self._stride *= 2
                self.samples = {index: kept for index, kept in self.samples.items() if index % self._stride == 0}

    # -- the watcher --------------------------------------------------------------------------------------------------

    def _link(self, source: WorkerId, target: WorkerId) -> LinkTally:
        tally = self._links.get((source, target))
        if tally is None:
            pair = self._pool_of[source], self._pool_of[target]
            tally = self._links[source, target] = self.links.setdefault(pair, LinkTally())
        return tally

    def steps(
        self, worker: WorkerId, start: float, end: float, num_steps: int, num_prefill_tokens: int, num_decode: int
    ) -> None:
        pool = self._tallies[worker]
        seconds = end - start
        requests = num_decode + (num_prefill_tokens > 0)
        pool.busy.add(start, end, seconds)
        pool.batch.add(start, end, seconds * requests)
        pool.busy_seconds += seconds
        pool.batch_seconds += seconds * requests
        pool.num_steps += num_steps
        pool.num_prefill_tokens += num_prefill_tokens
        if num_decode:
            count = num_decode * num_steps
            pool.num_decode_tokens += count
            each = seconds / num_steps
            self.itl.add(LogHistogram.bin_of(each), count, seconds * num_decode, each)
        if self.step_list is not None and len(self.step_list) < MOST_STEPS:
            self.step_list.append(
                Step(
                    worker=worker,
                    start_seconds=start,
                    end_seconds=end,
                    num_steps=num_steps,
                    num_prefill_tokens=num_prefill_tokens,
                    num_decode=num_decode,
                )
            )

    def sent(self, source: WorkerId, target: WorkerId, start: float, end: float, num_bytes: int) -> None:
        link = self._link(source, target)
        link.bytes.add(start, end, num_bytes)
        link.num_bytes += num_bytes
        link.busy_seconds += max(0.0, end - max(start, link.busy_until))
        link.busy_until = max(link.busy_until, end)

    def load(self, load: Load, now: float) -> None:
        share = load.blocks_referenced / load.blocks_total
        self._until(load.worker, now)
        self._loads[load.worker] = now, load.num_waiting, share
        pool = self._tallies[load.worker]
        if share > pool.peak_kv_share:
            pool.peak_kv_share = share

    def _until(self, worker: WorkerId, now: float) -> None:
        """What a worker last said of itself held until now."""
        since, waiting, share = self._loads.get(worker, (now, 0, 0.0))
        if now > since and (waiting or share):
            pool = self._tallies[worker]
            pool.kv.add(since, now, share * (now - since))
            pool.kv_seconds += share * (now - since)
            if waiting:
                pool.waiting.add(since, now, waiting * (now - since))

    def close(self, now: float) -> None:
        """The run is over."""
        for worker in self._loads:
            self._until(worker, now)
