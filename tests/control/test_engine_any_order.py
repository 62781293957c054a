"""The engine under events in any order: assignments, frames right and wrong, lost links, failing steps. Whatever
comes, it keeps its books, and when all is cancelled it holds nothing."""

from __future__ import annotations

from typing import Any

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from tests.control.feeding import P0, P1, a_request
from tests.world import BLOCK_SIZE, NAMESPACE, NUM_LAYERS
from transload.control.engine import Engine, EngineConfig
from transload.control.messages import (
    Cancel,
    CancelSends,
    CancelTimer,
    Emitted,
    EngineCommand,
    EngineEvent,
    ExpectKv,
    ForgetKv,
    Frame,
    Grant,
    KvAbort,
    KvAbortAck,
    KvData,
    KvDone,
    KvReady,
    KvRenew,
    LayersReady,
    PeerFrame,
    PeerLost,
    PeerUp,
    Prefill,
    Reserve,
    Run,
    RunStep,
    Sampled,
    SendFrame,
    SendsDrained,
    SetTimer,
    StepDone,
    StepFailed,
    TimerFired,
    ToController,
    TransferId,
    WorkerId,
)

ME = WorkerId("me")
PEERS = (P0, P1)
NUMBERS = st.integers(1, 4)
SMALL = st.integers(0, 6)


class AnyOrder(RuleBasedStateMachine):
    """A driver that keeps its word (one step at a time, every drain answered, nothing sent over lost links) between a
    controller and peers that need not."""

    def __init__(self) -> None:
        super().__init__()
        self.engine = Engine(
            EngineConfig(
                worker=ME,
                num_blocks=8,
                block_size=BLOCK_SIZE,
                num_layers=NUM_LAYERS,
                cell_bytes=8,
                namespace=NAMESPACE,
                max_batch=3,
                step_tokens=8,
                lease_seconds=1.0,
            )
        )
        self.linked: set[WorkerId] = set()
        self.step: RunStep | None = None
        self.drains: list[CancelSends] = []
        self.expected: dict[TransferId, ExpectKv] = {}
        self.known: list[TransferId] = [TransferId(1)]
        self.timers: set[str] = set()
        self.epoch = 0
        self.emitted: set[tuple[int, int, int]] = set()

    def give(self, event: EngineEvent) -> None:
        for command in self.engine.handle(event, 0.0):
            self.obey(command)

    def obey(self, command: EngineCommand) -> None:
        match command:
            case RunStep():
                assert self.step is None, "two steps at once"
                self.step = command
            case SendFrame(peer, frame):
                assert peer in self.linked, "a frame for nobody"
                if isinstance(frame, KvData):
                    num_blocks = frame.block_hi - frame.block_lo
                    assert len(command.source_blocks) == len(command.target_blocks) == num_blocks > 0
            case CancelSends():
                self.drains.append(command)
            case ExpectKv(transfer):
                assert transfer not in self.expected, "a transfer is named twice"
                self.expected[transfer] = command
                self.known.append(transfer)
            case ForgetKv(transfer):
                del self.expected[transfer]
            case SetTimer(key):
                self.timers.add(key)
            case CancelTimer(key):
                self.timers.discard(key)
            case ToController(Emitted(_, tokens)):
                for token in tokens:
                    name = token.request, token.epoch, token.index
                    assert name not in self.emitted, "a token twice"
                    self.emitted.add(name)
            case ToController():
                pass

    # -- the controller -----------------------------------------------------------------------------------------------

    @rule(number=NUMBERS, num_prompt=st.integers(1, 24), max_tokens=st.integers(1, 9), data=st.data())
    def assign(self, number: int, num_prompt: int, max_tokens: int, data: Any) -> None:
        self.epoch += 1
        request = a_request(number, num_prompt, max_tokens, first=data.draw(st.sampled_from((0, 50))))
        outputs = tuple(range(1000, 1000 + data.draw(st.integers(0, max_tokens - 1))))
        match data.draw(st.sampled_from(("run", "reserve", "prefill"))):
            case "run":
                self.give(Run(request, self.epoch, outputs))
            case "reserve":
                self.give(Reserve(request, self.epoch, data.draw(st.sampled_from(PEERS)), outputs))
            case "prefill":
                num_blocks = -(-(num_prompt + len(outputs)) // BLOCK_SIZE)
                first = data.draw(st.integers(0, num_blocks))
                transfer = TransferId(10_000 + self.epoch)
                self.known.append(transfer)
                grant = Grant(transfer, tuple(range(70, 70 + num_blocks - first)), first, 1000)
                self.give(Prefill(request, self.epoch, data.draw(st.sampled_from(PEERS)), grant, outputs))

    @rule(number=NUMBERS, back=st.integers(0, 2))
    def cancel(self, number: int, back: int) -> None:
        self.give(Cancel(a_request(number, 1).id, self.epoch - back))

    # -- the driver ---------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.step is not None)
    @rule()
    def finish_step(self) -> None:
        assert self.step is not None
        step, self.step = self.step, None
        tokens = tuple(Sampled(chunk.request.id, 1000 + chunk.num_outputs) for chunk in step.chunks if chunk.samples)
        self.give(StepDone(step.step, tokens, 0.01))

    @precondition(lambda self: self.step is not None)
    @rule()
    def fail_step(self) -> None:
        assert self.step is not None
        step, self.step = self.step, None
        self.give(StepFailed(step.step, "out of memory"))

    @precondition(lambda self: self.step is not None)
    @rule(low=st.integers(0, NUM_LAYERS - 1))
    def layers_ready(self, low: int) -> None:
        assert self.step is not None
        self.give(LayersReady(self.step.step, low, NUM_LAYERS))

    @precondition(lambda self: self.drains)
    @rule()
    def drained(self) -> None:
        command = self.drains.pop(0)
        self.give(SendsDrained(command.transfer, command.epoch))

    @precondition(lambda self: self.timers)
    @rule()
    def timer(self) -> None:
        self.give(TimerFired(self.timers.pop()))

    @rule(one_sided=st.booleans(), peer=st.sampled_from(PEERS))
    def link(self, one_sided: bool, peer: WorkerId) -> None:
        if peer not in self.linked:
            self.linked.add(peer)
            self.give(PeerUp(peer, one_sided))

    @precondition(lambda self: self.linked)
    @rule(data=st.data())
    def lose(self, data: Any) -> None:
        peer = data.draw(st.sampled_from(sorted(self.linked)))
        self.linked.discard(peer)
        self.give(PeerLost(peer))

    # -- the peers ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: self.linked)
    @rule(data=st.data(), back=st.integers(0, 1))
    def frame(self, data: Any, back: int) -> None:
        transfer, peer = data.draw(st.sampled_from(self.known)), data.draw(st.sampled_from(sorted(self.linked)))
        epoch = self.epoch - back
        frames: list[st.SearchStrategy[Frame]] = [
            st.builds(KvData, *map(st.just, (transfer, epoch)), SMALL, SMALL, SMALL, SMALL, SMALL, st.just(8)),
            st.builds(KvDone, *map(st.just, (transfer, epoch)), SMALL, st.sampled_from(((), (1000,), (1000, 1001)))),
            st.just(KvReady(transfer, epoch)),
            st.builds(KvRenew, *map(st.just, (transfer, epoch)), st.integers(1, 5000)),
            st.just(KvAbort(transfer, epoch, "no reason")),
            st.just(KvAbortAck(transfer, epoch)),
        ]
        self.give(PeerFrame(peer, data.draw(st.one_of(frames)), data.draw(st.sampled_from((0, 0, 0, 1)))))

    @precondition(lambda self: self.expected)
    @rule(data=st.data())
    def whole_transfer(self, data: Any) -> None:
        expected = self.expected[data.draw(st.sampled_from(sorted(self.expected)))]
        work = self.engine.exchange._receiving[expected.transfer]
        first, end = expected.first_block, expected.first_block + len(expected.blocks)
        if expected.blocks:
            frame = KvData(expected.transfer, expected.epoch, 0, 0, NUM_LAYERS, first, end, 8)
            self.give(PeerFrame(expected.source, frame))
        if expected.transfer in self.expected:
            outputs = (*work.outputs, 1000 + work.num_outputs)
            self.give(PeerFrame(expected.source, KvDone(expected.transfer, expected.epoch, int(first < end), outputs)))

    # -- what holds ---------------------------------------------------------------------------------------------------

    @invariant()
    def the_books_are_kept(self) -> None:
        self.engine.check()
        exchange = self.engine.exchange
        assert set(self.expected) == set(exchange._receiving), "an open door for nobody, or a closed one for somebody"
        writable = [block for command in self.expected.values() for block in command.blocks]
        assert len(writable) == len(set(writable)), "a block has two writers"
        if (
            exchange._receiving
            or exchange._quarantined
            or any(work.phase != "draining" for work in exchange._sending.values())
        ):
            assert self.timers, "something waits for a peer without a timer"
        if self.engine._running:
            assert self.step is not None, "requests could run, and no step does"

    def teardown(self) -> None:
        """Everything is cancelled, everybody leaves: nothing may be held."""
        self.give(Cancel(a_request(1, 1).id, self.epoch))
        for number in (2, 3, 4):
            self.give(Cancel(a_request(number, 1).id, self.epoch))
        for peer in sorted(self.linked):
            self.linked.discard(peer)
            self.give(PeerLost(peer))
        if self.step is not None:
            self.finish_step()
        while self.drains:
            self.drained()
        assert self.step is None
        assert self.engine.is_idle
        assert self.engine.pool.num_referenced == 0
        assert not self.expected


AnyOrder.TestCase.settings = settings(max_examples=80, stateful_step_count=50, deadline=None)
TestAnyOrder = AnyOrder.TestCase
