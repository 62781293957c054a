"""Feeding a machine by hand: the shortest way to make its events, and to read what it wants."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tests.world import BLOCK_SIZE, NAMESPACE, NUM_LAYERS, make_request
from transload.control.controller import Controller, ControllerConfig
from transload.control.engine import Engine, EngineConfig
from transload.control.messages import (
    Assignment,
    CacheChanged,
    ControllerCommand,
    ControllerEvent,
    Emitted,
    EngineCommand,
    EngineEvent,
    EngineReport,
    Frame,
    Grant,
    LinkMeasured,
    Load,
    PeerFrame,
    PeerUp,
    Request,
    Role,
    RunStep,
    Sampled,
    SendFrame,
    StepDone,
    ToController,
    Token,
    ToWorker,
    TransferId,
    WorkerGone,
    WorkerId,
    WorkerJoined,
)

P0, P1, D0, D1, A0 = (WorkerId(name) for name in ("p0", "p1", "d0", "d1", "a0"))
ROLES: dict[str, Role] = {"p": "prefill", "d": "decode", "a": "aggregated"}


class EngineFeed:
    """An engine with a block of 4 tokens and 4 layers of 1024 bytes; checks itself after every event."""

    def __init__(
        self,
        worker: WorkerId = D0,
        *,
        num_blocks: int = 16,
        max_batch: int = 8,
        step_tokens: int = 16,
        lease_seconds: float = 3.0,
    ) -> None:
        self.now = 0.0
        self.engine = Engine(
            EngineConfig(
                worker=worker,
                num_blocks=num_blocks,
                block_size=BLOCK_SIZE,
                num_layers=NUM_LAYERS,
                cell_bytes=1024,
                namespace=NAMESPACE,
                max_batch=max_batch,
                step_tokens=step_tokens,
                lease_seconds=lease_seconds,
            )
        )
        self.step: RunStep | None = None
        self.load: Load | None = None

    def give(self, event: EngineEvent) -> list[EngineCommand]:
        """All it wants, but for the reports of load and cache; the step it starts is kept in `step`."""
        commands = self.engine.handle(event, self.now)
        self.engine.check()
        wanted: list[EngineCommand] = []
        for command in commands:
            match command:
                case ToController(Load() as load):
                    self.load = load
                case ToController(CacheChanged()):
                    pass
                case RunStep():
                    assert self.step is None, "two steps at once"
                    self.step = command
                    wanted.append(command)
                case _:
                    wanted.append(command)
        return wanted

    def link(self, peer: WorkerId, *, one_sided: bool = True) -> None:
        assert self.give(PeerUp(peer, one_sided)) == []

    def finish_step(self, tokens: dict[int, int] | None = None) -> list[EngineCommand]:
        """The step is done; each sampling request draws the token given for it, or 1000 + the place of the token."""
        step, self.step = self.step, None
        assert step is not None, "no step is under way"
        sampled = tuple(
            Sampled(chunk.request.id, (tokens or {}).get(chunk.request.id, 1000 + chunk.num_outputs))
            for chunk in step.chunks
            if chunk.samples
        )
        return self.give(StepDone(step.step, sampled, 0.01))

    def from_peer(self, peer: WorkerId, frame: Frame, arrived_checksum: int = 0) -> list[EngineCommand]:
        return self.give(PeerFrame(peer, frame, arrived_checksum))

    @property
    def arrived(self) -> tuple[int, ...]:
        """Blocks that the step under way is told to take in."""
        return () if self.step is None else self.step.arrived

    @property
    def chunks(self) -> list[tuple[int, int, int, bool]]:
        """(request, start, num_tokens, samples) of the step under way."""
        step = self.step
        return [] if step is None else [(c.request.id, c.start, c.num_tokens, c.samples) for c in step.chunks]


class ControllerFeed:
    """A controller whose workers have 64 blocks of 4 tokens; every prefill worker is linked to every decode worker."""

    def __init__(self, workers: str = "", config: ControllerConfig | None = None, *, max_batch: int = 64) -> None:
        self.now = 0.0
        self.max_batch = max_batch
        self.controller = Controller(config or ControllerConfig(local_prefill="fallback"))
        for name in workers.split():
            self.join(WorkerId(name))

    def give(self, event: ControllerEvent) -> list[ControllerCommand]:
        return self.controller.handle(event, self.now)

    def join(self, worker: WorkerId, incarnation: int = 1, num_blocks: int = 64) -> list[ControllerCommand]:
        role = ROLES[worker[0]]
        commands = self.give(
            WorkerJoined(worker, incarnation, role, role, num_blocks, BLOCK_SIZE, 1024, self.max_batch)
        )
        for other in list(self.controller.views.values()):
            if {role, other.role} == {"prefill", "decode"}:
                source, target = (worker, other.worker) if role == "prefill" else (other.worker, worker)
                commands += self.give(LinkMeasured(source, target, "shm", 1e9, 1e-4))
        return commands

    def lose(self, worker: WorkerId, incarnation: int = 1) -> list[ControllerCommand]:
        return self.give(WorkerGone(worker, incarnation, "killed"))


def reports(commands: Iterable[EngineCommand]) -> list[EngineReport]:
    return [command.event for command in commands if isinstance(command, ToController)]  # type: ignore[misc]


def outputs(commands: Iterable[EngineCommand]) -> list[Token]:
    """The tokens that were emitted."""
    return [token for event in reports(commands) if isinstance(event, Emitted) for token in event.tokens]


def frames(commands: Iterable[EngineCommand]) -> list[Frame]:
    return [command.frame for command in commands if isinstance(command, SendFrame)]


def sent(commands: Iterable[ControllerCommand]) -> list[tuple[str, Assignment]]:
    """What goes to which worker."""
    return [(command.worker, command.event) for command in commands if isinstance(command, ToWorker)]


def a_request(number: int, num_prompt: int, max_tokens: int = 4, *, first: int | None = None) -> Request:
    """Prompts of different requests share nothing, unless their `first` token is the same."""
    start = 100 * number if first is None else first
    return make_request(number, list(range(start, start + num_prompt)), max_tokens)


def a_token(request: Request, index: int, epoch: int = 0, *, finish: object = None) -> Token:
    return Token(request.id, epoch, index, 1000 + index, finish)  # type: ignore[arg-type]


def a_grant(transfer: int, blocks: Sequence[int], first_block: int = 0, lease_ms: int = 3000) -> Grant:
    return Grant(TransferId(transfer), tuple(blocks), first_block, lease_ms)
