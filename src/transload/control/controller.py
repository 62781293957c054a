"""The cluster's machine: decides, per request, who works on it, and sees to it that every request ends, once.

    handle(event, now) -> commands

Admit or refuse, route, reserve, prefill, stream; on a lost worker or a failed transfer start over with the tokens the
request has, one epoch later. It never waits for anything without a timer.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from transload.control.admission import Admission
from transload.control.controller_config import ControllerConfig as ControllerConfig
from transload.control.forecast import first_token_seconds
from transload.control.messages import (
    Arrived,
    Assignment,
    CacheChanged,
    Cancel,
    Cancelled,
    CancelTimer,
    ControllerCommand,
    ControllerEvent,
    Emitted,
    Finish,
    FinishReason,
    HandoffFailed,
    KvVerified,
    LinkMeasured,
    Load,
    Preempted,
    Prefill,
    PrefillSent,
    Reject,
    Request,
    RequestFailed,
    RequestId,
    Reserve,
    Reserved,
    RestartWorker,
    Run,
    SetTimer,
    Started,
    Stream,
    TimerFired,
    Token,
    ToWorker,
    WorkerGone,
    WorkerId,
    WorkerJoined,
)
from transload.control.rates import LinkRate
from transload.control.router import Decision, Router, expected_tokens, uncached_tokens
from transload.control.tracking import Tracked
from transload.control.views import WorkerView

MOST_DOUBLINGS = 30
"""Of the pause before a restart: a worker may fail to start for days."""


class Controller:
    """The machine of one cluster. Not thread-safe: one driver calls `handle` with one event after another."""

    def __init__(self, config: ControllerConfig) -> None:
        self.config = config
        self.requests: dict[RequestId, Tracked] = {}  # admitted and not ended
        self.views: dict[WorkerId, WorkerView] = {}  # alive
        self.links: dict[tuple[WorkerId, WorkerId], LinkRate] = {}
        self.ended: OrderedDict[RequestId, Tracked] = OrderedDict()  # the last `keep_ended`, for whoever asks
        self._router = Router(config.policy, config.local_prefill, config.tpot_seconds)
        self._admission = Admission(config.max_waiting, config.ttft_seconds)
        self._queue: deque[Tracked] = deque()
        self._losses: dict[WorkerId, tuple[int, float]] = {}  # in a row, and when the last one was
        self._out: list[ControllerCommand] = []
        self._take: dict[type, Callable[[Any, float], None]] = {
            Emitted: self._take_tokens,
            Load: self._take_load,
            CacheChanged: self._take_cache_change,
            Arrived: self._arrive,
            Cancelled: self._cancel,
            Reserved: self._progress,
            Started: self._progress,
            KvVerified: self._progress,
            PrefillSent: self._progress,
            Preempted: self._progress,
            HandoffFailed: self._progress,
            RequestFailed: self._progress,
            WorkerJoined: self._join_worker,
            WorkerGone: self._lose_worker,
            LinkMeasured: self._take_link,
            TimerFired: self._deadline_passed,
        }

    @property
    def num_waiting(self) -> int:
        """Admitted requests that no worker has room for yet."""
        return len(self._queue)

    def handle(self, event: ControllerEvent, now: float) -> list[ControllerCommand]:
        """Take in one fact; return what is to be done about it, in order."""
        self._take[type(event)](event, now)
        if self._queue:
            self._dispatch(now)
        commands, self._out = self._out, []
        return commands

    # -- admission and routing ----------------------------------------------------------------------------------------

    def _arrive(self, event: Arrived, now: float) -> None:
        request = event.request
        problem = self._router.why_never(request, list(self.views.values()))
        if problem is not None:
            self._out.append(Reject(request.id, problem))
            return
        foretold = self._first_token_seconds(request)
        retry_after_seconds = self._admission.ask(request.caller, len(self._queue), foretold, now)
        if retry_after_seconds is not None:
            why = f"{len(self._queue)} requests are waiting already"
            if len(self._queue) < self.config.max_waiting:
                why = f"the first token would come after {foretold:.1f} s"
            message = f"{why}; try again in {retry_after_seconds:.0f} s"
            self._out.append(Reject(request.id, message, retry_after_seconds))
            return
        tracked = Tracked(request, now)
        tracked.foretold_seconds = foretold if self.requests else None  # with nobody here nothing was foretold
        self.requests[request.id] = tracked
        self._queue.append(tracked)
        self._out.append(SetTimer(f"deadline/{request.id}", request.deadline_seconds))

    def _first_token_seconds(self, request: Request) -> float:
        """As far as can be told now. Without a target the number of those who wait is enough."""
        if self.config.ttft_seconds is None:
            return len(self._queue) * self._admission.seconds_between
        if not self.requests:
            return 0.0
        queued = [tracked.num_known for tracked in self._queue]
        between = self._admission.seconds_between
        return first_token_seconds(request.num_prompt_tokens, queued, self.views.values(), between)

    def _dispatch(self, now: float) -> None:
        """Send off those who wait, first come first served, as long as a worker has room."""
        while self._queue and self.views:
            tracked, views = self._queue[0], list(self.views.values())
            problem = self._router.why_never(tracked.request, views)
            if problem is not None:
                self._finish(tracked, "error", now, error=problem, code="exceeds_capacity")
                continue
            decision = self._router.choose(
                tracked.request,
                tracked.num_known,
                self._admission.expected_outputs,
                views,
                self.links,
                avoid_handoff=tracked.num_failed_handoffs >= 2,
            )
            if decision is None:
                return
            self._queue.popleft()
            self._assign(tracked, decision, now)

    def _assign(self, tracked: Tracked, decision: Decision, now: float) -> None:
        request, outputs = tracked.request, tuple(tracked.outputs)
        tracked.decision = decision.reason
        tracked.decode = decision.decode
        tracked.prefill = decision.prefill
        decode = self.views[decision.decode]
        num_tokens = expected_tokens(request, tracked.num_known, self._admission.expected_outputs)
        if decision.prefill is None:
            uncached = tracked.num_known - decode.num_cached_tokens(request.block_keys)
            decode.commit(request, num_tokens, uncached)
            tracked.enter("prefilling")
            tracked.begin_stage("prefill queue", decision.decode, now)
            self._send(decision.decode, Run(request, tracked.epoch, outputs))
        else:
            prefill = self.views[decision.prefill]
            decode.commit(request, num_tokens, 0)
            link = self.links.get((decision.prefill, decision.decode))
            uncached = uncached_tokens(request, tracked.num_known, prefill, decode, link)
            prefill.commit(request, tracked.num_known, uncached)
            tracked.enter("reserving")
            tracked.begin_stage("reserve", decision.decode, now)
            self._send(decision.decode, Reserve(request, tracked.epoch, decision.prefill, outputs))

    def _send(self, worker: WorkerId, assignment: Assignment) -> None:
        self._out.append(ToWorker(worker, assignment))

    # -- what workers say, and callers that go away -------------------------------------------------------------------

    def _take_tokens(self, event: Emitted, now: float) -> None:
        for token in event.tokens:
            self._take_token(event.worker, token, now)

    def _take_load(self, event: Load, _now: float) -> None:
        if (view := self.views.get(event.worker)) is not None:
            view.take_load(event)

    def _take_cache_change(self, event: CacheChanged, _now: float) -> None:
        if (view := self.views.get(event.worker)) is not None:
            view.take_cache_change(event)

    def _cancel(self, event: Cancelled, now: float) -> None:
        if (tracked := self.requests.get(event.request)) is not None:
            self._finish(tracked, event.reason, now)

    # -- progress -----------------------------------------------------------------------------------------------------

    def _progress(
        self,
        event: Reserved | Started | KvVerified | Preempted | PrefillSent | HandoffFailed | RequestFailed,
        now: float,
    ) -> None:
        tracked = self.requests.get(event.request)
        if tracked is None or tracked.epoch != event.epoch:
            return
        tracked.is_taken_up = True
        match event:
            case Reserved(_, _, epoch, grant, num_cached):
                assert tracked.prefill is not None
                assert tracked.decode is not None
                tracked.stages[-1].detail["cached_tokens_here"] = num_cached
                tracked.enter("prefilling")
                tracked.begin_stage("prefill queue", tracked.prefill, now)
                outputs = tuple(tracked.outputs)
                self._send(tracked.prefill, Prefill(tracked.request, epoch, tracked.decode, grant, outputs))
            case Started(worker, _, _, num_cached):
                self._started(tracked, worker, num_cached, now)
            case KvVerified():
                self._handed_over(tracked, event, now)
            case PrefillSent(worker):
                self._leave(worker, tracked)
            case Preempted(worker):
                tracked.begin_stage("preempted", worker, now)
            case HandoffFailed(worker) if tracked.handed_over and worker == tracked.prefill:
                self._leave(worker, tracked)  # it has not heard that the decode worker has everything
            case HandoffFailed(worker, _, _, reason):
                tracked.num_failed_handoffs += 1
                self._start_over(tracked, f"handoff failed at {worker}: {reason}", "handoff_failed", now)
            case RequestFailed(worker, _, _, reason):
                self._start_over(tracked, f"failed on {worker}: {reason}", "worker_failed", now)

    def _started(self, tracked: Tracked, worker: WorkerId, num_cached: int, now: float) -> None:
        if worker == (tracked.prefill or tracked.decode) and tracked.num_cached is None:
            tracked.num_cached = min(num_cached, tracked.request.num_prompt_tokens)
        if tracked.phase == "prefilling" and not tracked.handed_over:
            tracked.begin_stage("prefill", worker, now).detail["cached_tokens"] = num_cached
        elif worker == tracked.decode:
            tracked.begin_stage("decode", worker, now)

    def _handed_over(self, tracked: Tracked, verified: KvVerified, now: float) -> None:
        """The decode worker has the KV cache. The first token may still be on its way here from the prefill worker."""
        tracked.handed_over = True
        detail: dict[str, float | int | str] = {
            "bytes": verified.num_bytes,
            "frames": verified.num_frames,
            "wire_seconds": verified.wire_seconds,
        }
        if tracked.phase == "transferring":
            exposed = now - tracked.stages[-1].start
            detail["hidden_seconds"] = max(0.0, verified.wire_seconds - exposed)  # behind the prefill
            detail["waiting_seconds"] = max(0.0, exposed - verified.wire_seconds)  # not on the wire
            tracked.stages[-1].detail.update(detail)
            tracked.enter("decoding")
            tracked.begin_stage("decode queue", tracked.decode, now)
        else:
            tracked.stages[-1].detail.update({f"transfer_{key}": value for key, value in detail.items()})

    def _take_link(self, measured: LinkMeasured, _now: float) -> None:
        """A word about a link may come late, when one of its ends is gone."""
        pair = measured.source, measured.target
        if measured.bytes_per_second > 0 and all(worker in self.views for worker in pair):
            self.links[pair] = LinkRate(measured.bytes_per_second, measured.latency_seconds, measured.transport)
        else:
            self.links.pop(pair, None)

    def _take_token(self, worker: WorkerId, token: Token, now: float) -> None:
        tracked = self.requests.get(token.request)
        if tracked is None:
            return
        for ready in tracked.take_token(token):
            if tracked.phase == "prefilling":
                self._prefilled(tracked, worker, now)
            if tracked.first_token_at is None:
                tracked.first_token_at = now
                self._admission.served(tracked.arrived_at, now, tracked.foretold_seconds)
            self._out.append(Stream(ready))
            if ready.finish is not None:
                self._finish(tracked, ready.finish, now, ended_by_worker=tracked.phase == "decoding")
                return

    def _prefilled(self, tracked: Tracked, worker: WorkerId, now: float) -> None:
        """The first token of this attempt is out."""
        view = self.views.get(worker)
        if view is not None:
            view.prefill_tokens.pop(tracked.request.id, None)
        if tracked.prefill is None:
            tracked.enter("decoding")
            tracked.begin_stage("decode", tracked.decode, now)
        elif tracked.handed_over:
            tracked.enter("decoding")
            tracked.begin_stage("decode queue", tracked.decode, now)
        else:
            tracked.enter("transferring")
            tracked.begin_stage("transfer", tracked.decode, now)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _leave(self, worker: WorkerId, tracked: Tracked) -> None:
        if (view := self.views.get(worker)) is not None:
            view.release(tracked.request.id)

    def _release_all(self, tracked: Tracked, *, cancel: bool) -> None:
        """Take a request off its workers."""
        for worker in tracked.workers():
            if worker in self.views:
                if cancel:
                    self._send(worker, Cancel(tracked.request.id, tracked.epoch))
                self._leave(worker, tracked)

    def _finish(
        self,
        tracked: Tracked,
        reason: FinishReason,
        now: float,
        *,
        error: str | None = None,
        code: str | None = None,
        ended_by_worker: bool = False,
    ) -> None:
        """The one end of a request. `ended_by_worker`: its workers have let go of it already."""
        if tracked.phase == "queued":
            self._queue.remove(tracked)
        self._release_all(tracked, cancel=not ended_by_worker)
        tracked.enter("finished")
        tracked.ended_at = now
        if reason in ("stop", "length"):
            self._admission.finished(len(tracked.outputs))
        request = tracked.request
        del self.requests[request.id]
        self.ended[request.id] = tracked
        if len(self.ended) > self.config.keep_ended:
            self.ended.popitem(last=False)
        self._out.append(CancelTimer(f"deadline/{request.id}"))
        num_cached = tracked.num_cached or 0
        finish = Finish(request.id, reason, request.num_prompt_tokens, len(tracked.outputs), num_cached, error, code)
        self._out.append(finish)

    def _start_over(self, tracked: Tracked, why: str, code: str, now: float) -> None:
        """Give the request to others, with the tokens it has."""
        self._release_all(tracked, cancel=True)
        tracked.num_attempts += tracked.is_taken_up
        if tracked.num_attempts >= self.config.max_attempts or tracked.epoch + 1 >= 4 * self.config.max_attempts:
            message = f"given up after {tracked.num_attempts} attempts: {why}"
            self._finish(tracked, "error", now, error=message, code=code)
            return
        tracked.start_over()
        tracked.begin_stage("recovery queue", None, now).detail["cause"] = why
        self._queue.appendleft(tracked)

    def _deadline_passed(self, event: TimerFired, now: float) -> None:
        tracked = self.requests.get(RequestId(int(event.key.removeprefix("deadline/"))))
        if tracked is not None:
            limit = tracked.request.deadline_seconds
            where = f"while {tracked.phase}" if self.views else "with no worker alive"
            message = f"not finished within {limit:g} s ({where})"
            self._finish(tracked, "error", now, error=message, code="deadline_exceeded")

    def _join_worker(self, joined: WorkerJoined, now: float) -> None:
        self._forget_worker(joined.worker, "it has joined anew", now)
        self.views[joined.worker] = WorkerView(joined)

    def _forget_worker(self, worker: WorkerId, reason: str, now: float) -> None:
        if self.views.pop(worker, None) is not None:
            self.links = {pair: link for pair, link in self.links.items() if worker not in pair}
            for tracked in reversed(
                list(self.requests.values())
            ):  # each goes to the head of the queue: the oldest last
                if self._needs(tracked, worker):
                    self._start_over(tracked, f"lost {worker}: {reason}", "worker_lost", now)

    def _lose_worker(self, gone: WorkerGone, now: float) -> None:
        worker, view = gone.worker, self.views.get(gone.worker)
        if view is not None and view.incarnation > gone.incarnation:
            return  # another one has taken its place already
        self._forget_worker(worker, gone.reason, now)
        num_losses, last = self._losses.get(worker, (0, now))
        num_losses = num_losses + 1 if now - last < 60 else 1
        self._losses[worker] = (num_losses, now)
        pause = self.config.first_restart_seconds * 2.0 ** min(num_losses - 1, MOST_DOUBLINGS)
        self._out.append(RestartWorker(worker, min(pause, self.config.longest_restart_seconds)))

    @staticmethod
    def _needs(tracked: Tracked, worker: WorkerId) -> bool:
        """Whether this attempt cannot go on without the worker."""
        if tracked.phase == "queued":
            return False
        if worker == tracked.decode:
            return True
        return worker == tracked.prefill and tracked.phase != "decoding"
