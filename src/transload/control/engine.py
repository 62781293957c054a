"""The worker's machine: decides, per step, which tokens are computed and which blocks hold them.

    handle(event, now) -> commands

It runs one step at a time. Whatever happens while a step is under way is noted and takes effect when the step returns:
blocks are never freed while the executor may touch them. Its half of every handoff is in `exchange.py`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from random import Random
from typing import Any

from transload.control.batcher import plan_chunks
from transload.control.blocks import BlockPool
from transload.control.drawn import all_unreported, finish_of, unreported
from transload.control.engine_config import EngineConfig as EngineConfig
from transload.control.exchange import Exchange
from transload.control.load_report import NO_STEP, LoadReport
from transload.control.messages import (
    CacheChanged,
    Cancel,
    Chunk,
    Emitted,
    EndRun,
    EngineCommand,
    EngineEvent,
    EngineReport,
    HandoffFailed,
    KvVerified,
    LayersReady,
    PeerFrame,
    PeerLost,
    PeerUp,
    Preempted,
    Prefill,
    PrefillSent,
    ReportTokens,
    RequestFailed,
    RequestId,
    Reserve,
    Reserved,
    Run,
    RunStep,
    Sampled,
    SendsDrained,
    Started,
    StepDone,
    StepFailed,
    TimerFired,
    ToController,
    Token,
)
from transload.control.outcome import Failed, Outcome, Released, Verified
from transload.control.prefix import root_key
from transload.control.step_run import StepRun, hold
from transload.control.work import Work, WorkKind


class Engine:
    """The machine of one worker. Not thread-safe: one driver calls `handle` with one event after another."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self._root = root_key(config.namespace)
        self._out: list[EngineCommand] = []
        self.exchange = Exchange(
            pool=self.pool,
            num_layers=config.num_layers,
            cell_bytes=config.cell_bytes,
            lease_seconds=config.lease_seconds,
            random=Random(f"{config.seed}/{config.worker}"),
            out=self._out,
        )
        self._works: dict[RequestId, Work] = {}  # everything that has not ended, by request
        self._waiting: deque[Work] = deque()
        self._running: dict[RequestId, Work] = {}
        self._num_arrivals = 0
        self._step = 0
        self._chunks: tuple[tuple[Work, Chunk], ...] = ()  # of the step under way
        self._arrived: list[int] = []  # blocks filled by other workers that no step has taken in yet
        self._num_taken_in = 0  # of them, by the step under way
        self._run = StepRun(config.run_steps)
        self._cache_sequence = 0
        self._load = LoadReport(config.worker, self.pool)
        self._take: dict[type, Callable[[Any, float], None]] = {
            StepDone: self._step_done,
            StepFailed: self._step_failed,
            LayersReady: self._layers_ready,
            PeerFrame: self._take_frame,
            Run: self._take_assignment,
            Reserve: self._take_assignment,
            Prefill: self._take_assignment,
            Cancel: self._cancel,
            SendsDrained: lambda event, _: self.exchange.sends_drained(event.transfer),
            PeerUp: lambda event, _: self.exchange.peer_up(event),
            PeerLost: lambda event, _: self._settle(self.exchange.peer_lost(event.peer)),
            ReportTokens: lambda _event, _: self._report_tokens(self._running.values()),
            TimerFired: lambda _event, _: self._settle(self.exchange.tick()),
        }

    def handle(self, event: EngineEvent, now: float) -> list[EngineCommand]:
        """Take in one fact; return what is to be done about it, in order."""
        self._take[type(event)](event, now)
        if self._waiting:
            self._admit()
        if not self._chunks:
            self._start_step()
        if self._run.repeats > 1 and self._run.must_end(self.pool):
            self._out.append(EndRun(self._step))
        self._report_changes()
        commands = self._out.copy()
        self._out.clear()
        return commands

    # -- assignments --------------------------------------------------------------------------------------------------

    def _take_frame(self, event: PeerFrame, now: float) -> None:
        self._settle(self.exchange.take_frame(event.peer, event.frame, event.arrived_checksum, now))

    def _take_assignment(self, event: Run | Reserve | Prefill, _now: float) -> None:
        self._num_arrivals += 1
        kind: WorkKind = "run" if isinstance(event, Run) else "receive" if isinstance(event, Reserve) else "send"
        work = Work(event.request, event.epoch, event.outputs, kind, self._num_arrivals)
        problem = None
        if isinstance(event, Reserve):
            work.source = event.source
        elif isinstance(event, Prefill):
            problem = self.exchange.open_send(work, event.target, event.grant)
        self._enqueue(work, problem)

    def _enqueue(self, work: Work, problem: str | None = None) -> None:
        stale = self._works.get(work.request.id)
        if stale is not None:
            self._drop(stale, "replaced by a newer attempt")
        self._works[work.request.id] = work
        most_tokens = work.num_known + (0 if work.kind == "send" else work.request.max_tokens - work.num_outputs - 1)
        if work.window_blocks is None and self.pool.blocks_for(most_tokens) > self.pool.num_blocks:
            problem = f"needs {most_tokens} tokens of KV cache, {self.config.worker} holds {self.pool.num_tokens}"
        if problem is not None:
            self._fail(work, problem)
        else:
            self._waiting.append(work)

    def _cancel(self, event: Cancel, _now: float) -> None:
        work = self._works.get(event.request)
        if work is not None and work.epoch <= event.epoch:
            self._drop(work, "cancelled")

    # -- admission: blocks for those who wait -------------------------------------------------------------------------

    def _admit(self) -> None:
        """First come, first served: the head of the queue waits for room, and nobody overtakes it."""
        while self._waiting:
            work = self._waiting[0]
            if work.kind != "send" and self._is_full:
                return
            if not self._acquire_blocks(work):
                return
            self._waiting.popleft()
            match work.kind:
                case "run" | "send":
                    self._begin(work)
                case "receive":
                    self._open_receive(work)

    @property
    def _is_full(self) -> bool:
        """Whether as many requests decode here, or will as soon as their KV cache has come, as may."""
        most = self.config.max_batch
        if len(self._works) - len(self._waiting) < most:
            return False
        return sum([work.kind != "send" and work.phase != "waiting" for work in self._works.values()]) >= most

    def _acquire_blocks(self, work: Work) -> bool:
        """Blocks for every token known so far, cached ones first. Leaves a block of growth to each running request."""
        size = self.pool.block_size
        if work.window_blocks is not None:
            return work.enter_window(size)
        comes_whole = work.kind == "receive" and not self.exchange.works_in_place(work.source)
        last = work.num_known - (not comes_whole)  # one token must be computed, here or into these very blocks
        prefix = self.pool.match(work.keys(last // size, size, self._root))
        num_new = self.pool.blocks_for(work.num_known) - len(prefix)
        room = self.pool.room_beside(prefix)
        if self._running and num_new + len(self._running) > room:
            growth = sum([other.kind != "send" for other in self._running.values()])
            if num_new + growth > room:
                return False
        blocks = self.pool.acquire(prefix, num_new)
        if blocks is None:
            return False
        work.blocks = blocks
        work.num_cached = work.num_computed = len(prefix) * size
        work.num_registered = len(prefix)
        return True

    def _begin(self, work: Work) -> None:
        work.phase = "running"
        self._running[work.request.id] = work
        self._run.is_stale = True

    def _open_receive(self, work: Work) -> None:
        request_id = work.request.id
        source = work.source
        assert source is not None
        if not self.exchange.is_linked(source):
            self._fail(work, f"no link to {source}")
            return
        work.phase = "receiving"
        grant = self.exchange.open_receive(work, source, work.num_registered)
        self._report(Reserved(self.config.worker, request_id, work.epoch, grant, work.num_cached))

    # -- steps --------------------------------------------------------------------------------------------------------

    def _start_step(self) -> None:
        if not (self._running or self._run.length):
            return
        planned = self._plan()
        continues = self._run.goes_on_with([work for work, _ in planned])
        if self._run.length and not continues:
            self._report_run()
        if planned:
            self._run_step(planned, self._run.plan(self.pool), tuple(self._arrived), continues=continues)

    def _run_step(
        self, planned: list[tuple[Work, int]], repeats: int, arrived: tuple[int, ...], *, continues: bool
    ) -> None:
        self._step += 1
        chunks = [self._chunk(work, num_tokens) for work, num_tokens in planned]
        self._chunks = tuple([(work, chunk) for (work, _), chunk in zip(planned, chunks, strict=True)])
        self._out.append(RunStep(self._step, tuple(chunks), arrived, repeats, continues))
        self._num_taken_in = len(arrived)

    def _plan(self) -> list[tuple[Work, int]]:
        running, size = self._running.values(), self.pool.block_size
        decoding = [work for work in running if work.num_known - work.num_computed == 1 and work.num_outputs > 0]
        short = [work for work in decoding if len(work.blocks) * size < work.num_known]
        if short:
            for work in short:
                self._grow(work)
            decoding = [work for work in decoding if work.phase == "running"]
        prefilling: list[Work] = []
        if len(decoding) < len(self._running):
            prefilling = [work for work in running if not work.is_decoding]
        return plan_chunks(decoding, prefilling, step_tokens=self.config.step_tokens, block_size=size)

    def _chunk(self, work: Work, num_tokens: int) -> Chunk:
        work.in_step = True
        if not work.started:
            work.started = True
            self._report(Started(self.config.worker, work.request.id, work.epoch, work.num_cached))
        return Chunk(
            request=work.request,
            start=work.num_computed,
            num_tokens=num_tokens,
            tokens=work.tokens,
            blocks=work.blocks,
            samples=work.num_computed + num_tokens == work.num_known,
            num_outputs=work.num_outputs,
            streams=work.sender is not None,
            num_sent_blocks=work.sender.next_block if work.sender is not None else 0,
        )

    def _grow(self, work: Work) -> None:
        """Room for the next token; takes it from the youngest request if there is none, which may be itself."""
        while work.phase == "running" and self.pool.blocks_for(work.num_known) > len(work.blocks):
            block = self.pool.acquire((), 1)
            if block is not None:
                work.blocks += block
                continue
            at_home = [other for other in self._running.values() if other.kind != "send"]
            self._preempt(max(at_home, key=lambda other: other.arrival))

    def _preempt(self, work: Work) -> None:
        """Take its blocks; it goes to the head of the queue with all its tokens and is computed again."""
        self._report_tokens([work])
        del self._running[work.request.id]
        self.pool.release(work.blocks)
        work.restart()
        self._waiting.appendleft(work)
        self._report(Preempted(self.config.worker, work.request.id, work.epoch))

    def _layers_ready(self, event: LayersReady, _now: float) -> None:
        assert event.step == self._step, f"layers of step {event.step} while step {self._step} runs"
        for work, chunk in self._chunks:
            if work.sender is not None and not work.failed:
                self.exchange.layers_ready(work, event.layer_lo, event.layer_hi, self._complete_blocks(work, chunk))

    def _complete_blocks(self, work: Work, chunk: Chunk) -> int:
        """Blocks that are complete once this chunk is computed; the last, partial one is when the prompt ends."""
        end = chunk.start + chunk.num_tokens
        return self.pool.blocks_for(end) if end == work.num_known else end // self.pool.block_size

    def _step_done(self, done: StepDone, _now: float) -> None:
        assert done.step == self._step, f"step {done.step} returned while step {self._step} runs"
        self._step += done.count - 1
        chunks, self._chunks = self._chunks, ()
        del self._arrived[: self._num_taken_in]  # not if it fails: then others may still find them by their keys
        sampled = {item.request: item for item in done.sampled}
        tokens: list[Token] = []
        num_decode = num_tokens = 0
        more, goes_on, size = done.count - 1, done.goes_on, self.pool.block_size
        for work, chunk in chunks:
            work.in_step = False
            num_tokens += chunk.num_tokens
            num_decode += chunk.num_tokens == 1 and chunk.num_outputs > 0
            if work.failed and not goes_on:
                self._free(work)
                continue
            if work.sender is not None:
                work.sender.chunk_done(self._complete_blocks(work, chunk))
            computed = work.num_computed = work.num_computed + chunk.num_tokens + more
            if computed + goes_on > len(work.blocks) * size:
                hold(work, computed + goes_on, self.pool)
            drawn = sampled[work.request.id] if chunk.samples else None
            if drawn is not None:
                work.append(drawn.token, drawn.more)
            if computed >= (work.num_registered + 1) * size:
                self._register_blocks(work)
            if drawn is not None and (token := self._take_tokens(work, drawn)) is not None:
                tokens.append(token)
        if tokens:
            self._report(Emitted(self.config.worker, tuple(tokens)))
        self._run.add(done.count, done.seconds, (len(chunks), num_tokens - num_decode, num_decode))
        if self._run.length >= self.config.run_steps:
            self._report_run()
        if done.goes_on:
            repeats = 1 if self._run.is_stale else self._run.plan(self.pool)
            self._run_step([(work, 1) for work, _ in chunks], repeats, (), continues=True)

    def _take_tokens(self, work: Work, drawn: Sampled) -> Token | None:
        """What has just been drawn is one of the request's tokens now: say so, unless that can wait."""
        held = work.num_outputs - work.num_reported
        finish, token = finish_of(work), None
        if finish is not None or held >= self.config.hold_tokens or work.num_outputs == work.num_given + 1:
            token = unreported(work, finish, drawn.logprobs)
        if finish is not None:
            self._drop(work, "finished")
        elif work.sender is not None:
            del self._running[work.request.id]
            self.exchange.send_done(work)
        return token

    def _report_tokens(self, works: Iterable[Work]) -> None:
        """Those that were held back."""
        tokens = all_unreported(works)
        if tokens:
            self._report(Emitted(self.config.worker, tokens))

    def _register_blocks(self, work: Work) -> None:
        """Make the blocks that have just become full findable."""
        num_full = work.num_computed // self.pool.block_size
        if num_full > work.num_registered:
            keys = work.keys(num_full, self.pool.block_size, self._root)
            for index in range(work.num_registered, len(keys)):
                self.pool.register(work.blocks[index], keys[index])
            work.num_registered = num_full

    def _step_failed(self, event: StepFailed, _now: float) -> None:
        chunks, self._chunks = self._chunks, ()
        for work, _ in chunks:
            work.in_step = False
            if work.failed:
                self._free(work)
            else:
                self._fail(work, event.reason)

    # -- ends ---------------------------------------------------------------------------------------------------------

    def _settle(self, outcomes: list[Outcome]) -> None:
        for outcome in outcomes:
            work = outcome.work
            match outcome:
                case Verified():
                    self._take_over(work)
                case Released():
                    self._forget(work)
                    self.exchange.release_sent(work)
                    self._report(PrefillSent(self.config.worker, work.request.id, work.epoch))
                case Failed(_, reason):
                    if work.failed or work.phase == "draining":
                        continue
                    self._fail(work, reason)

    def _take_over(self, work: Work) -> None:
        """The KV cache is here: go on from the token the sender has drawn."""
        receiver = work.receiver
        assert receiver is not None
        assert receiver.outputs is not None
        work.num_computed = work.num_known
        work.tokens = [*work.request.prompt, *receiver.outputs]
        work.num_outputs = work.num_reported = len(receiver.outputs)
        work.num_known = work.request.num_prompt_tokens + work.num_outputs
        self._arrived += receiver.grant.blocks
        work.receiver = None
        work.kind = "run"  # from here on like any other: it may be preempted, and fails alone
        self._register_blocks(work)
        self._begin(work)
        wire_seconds = receiver.last_at - (receiver.first_at or receiver.last_at)
        self._report(
            KvVerified(
                self.config.worker, work.request.id, work.epoch, receiver.num_bytes, wire_seconds, receiver.num_frames
            )
        )

    def _fail(self, work: Work, reason: str) -> None:
        failure = RequestFailed if work.kind == "run" else HandoffFailed
        self._report(failure(self.config.worker, work.request.id, work.epoch, reason))
        self._drop(work, reason)

    def _drop(self, work: Work, reason: str) -> None:
        """This request is over here. Its blocks follow as soon as nobody can touch them."""
        self._forget(work)
        if work.in_step:
            work.failed = True
            self._run.is_stale = True
        elif work.phase == "receiving" and work.receiver is not None:
            self.exchange.abort_receive(work, reason)
        else:
            self._free(work)

    def _free(self, work: Work) -> None:
        if work.sender is not None:
            self.exchange.abort_send(work)
        else:
            self.pool.release(work.blocks)
            work.blocks = []

    def _forget(self, work: Work) -> None:
        request_id = work.request.id
        if self._works.get(request_id) is work:
            del self._works[request_id]
        self._running.pop(request_id, None)
        if work.phase == "waiting" and work in self._waiting:
            self._waiting.remove(work)

    # -- reports ------------------------------------------------------------------------------------------------------

    def _report(self, event: EngineReport) -> None:
        self._out.append(ToController(event))

    def _report_changes(self) -> None:
        stored, evicted = self.pool.take_changes()
        if stored or evicted:
            self._cache_sequence += 1
            self._report(CacheChanged(self.config.worker, self._cache_sequence, stored, evicted))
        if not self._chunks:
            self._report_load(0.0, NO_STEP, 1)

    def _report_run(self) -> None:
        """The steps since the last report, all of the same requests."""
        seconds, num_steps = self._run.take()
        self._report_load(seconds, self._run.shape, num_steps)

    def _report_load(self, step_seconds: float, shape: tuple[int, int, int], num_steps: int) -> None:
        load = self._load.make(
            len(self._running),
            self._waiting,
            holds_nothing=not (self._works or self._chunks or self.exchange.num_open),
            step_seconds=step_seconds,
            shape=shape,
            num_steps=num_steps,
        )
        if load is not None:
            self._report(load)

    def check(self) -> None:
        """Assert every invariant of the worker. For tests, after any event."""
        works = [*self._works.values(), *(work for work, _ in self._chunks if work.failed)]
        held = [work.blocks for work in works if work.window_blocks is None]
        self.pool.check([*held, *self.exchange.tables()])
        for work in self._works.values():
            assert work.num_computed <= work.num_known <= work.request.num_prompt_tokens + work.request.max_tokens
            assert (work.phase == "waiting") == (work in self._waiting), "a request waits, or it does not"

    def depends_on_run(self, event: EngineEvent) -> bool:
        """Whether it makes a difference to this event how far the run of steps under way has got: then `StepDone`
        should tell first."""
        if self._waiting:
            return True
        if isinstance(event, PeerFrame | TimerFired | LayersReady | ReportTokens):
            return False
        if isinstance(event, Run | Reserve | Prefill):
            num_known = event.request.num_prompt_tokens + len(event.outputs)
            num_new = self.pool.blocks_for(num_known) + len(self._running)
            return num_new + self._run.most_blocks(self.pool) > self.pool.num_free
        return True

    @property
    def holds_tokens(self) -> bool:
        """Whether some tokens have not been reported."""
        return any(work.num_reported < work.num_outputs for work in self._running.values())

    @property
    def is_idle(self) -> bool:
        """Nothing is held: no request, no transfer, no quarantine."""
        return not self._works and not self._chunks and not self.exchange.num_open and not self.pool.num_quarantined
