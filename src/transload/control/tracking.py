"""One admitted request at the controller: where it is, what it has made, and where its time went."""

from __future__ import annotations

from collections.abc import Iterator

from transload.control.lifecycle import Phase, check_transition
from transload.control.messages import Request, Token, WorkerId


class Stage:
    """A stretch of a request's life. Stages follow one another without gap, so their lengths sum to the whole."""

    __slots__ = ("detail", "name", "start", "worker")

    def __init__(self, name: str, worker: WorkerId | None, start: float) -> None:
        self.name = name
        self.worker = worker
        self.start = start
        self.detail: dict[str, float | int | str] = {}


class Tracked:
    """Mutable state of an admitted request; only the Controller touches it."""

    __slots__ = (
        "arrived_at",
        "decision",
        "decode",
        "ended_at",
        "epoch",
        "first_token_at",
        "foretold_seconds",
        "handed_over",
        "is_taken_up",
        "num_attempts",
        "num_cached",
        "num_failed_handoffs",
        "outputs",
        "pending",
        "phase",
        "prefill",
        "request",
        "stages",
    )

    def __init__(self, request: Request, now: float) -> None:
        self.request = request
        self.arrived_at = now
        self.ended_at: float | None = None
        self.phase: Phase = "queued"
        self.epoch = 0
        self.num_attempts = 0  # that have failed after a worker had taken them up
        self.is_taken_up = False  # in this epoch: a worker has been heard of it
        self.num_failed_handoffs = 0
        self.outputs: list[int] = []
        self.pending: dict[int, Token] = {}  # tokens that overtook an earlier one
        self.first_token_at: float | None = None
        self.foretold_seconds: float | None = None  # from arrival to first token, as it was estimated then
        self.decode: WorkerId | None = None
        self.prefill: WorkerId | None = None
        self.handed_over = False  # in this epoch: the KV cache is verified at the decode worker
        self.num_cached: int | None = None
        self.decision = ""
        self.stages = [Stage("queue", None, now)]

    @property
    def num_known(self) -> int:
        return self.request.num_prompt_tokens + len(self.outputs)

    @property
    def is_done(self) -> bool:
        return self.phase == "finished"

    def workers(self) -> Iterator[WorkerId]:
        """The workers that may hold something of this attempt."""
        if self.decode is not None:
            yield self.decode
        if self.prefill is not None and self.prefill != self.decode:
            yield self.prefill

    def enter(self, phase: Phase) -> None:
        """Go to the next phase."""
        if phase != self.phase:
            check_transition(self.phase, phase)
            self.phase = phase

    def begin_stage(self, name: str, worker: WorkerId | None, now: float) -> Stage:
        """The last stage ends and this one begins."""
        stage = Stage(name, worker, now)
        self.stages.append(stage)
        return stage

    def take_token(self, token: Token) -> list[Token]:
        """The tokens that can go to the caller now: in order, once. One that comes early waits for those before it."""
        if token.epoch != self.epoch or token.index < len(self.outputs):
            return []
        self.pending[token.index] = token
        ready: list[Token] = []
        while (following := self.pending.pop(len(self.outputs), None)) is not None:
            self.outputs.append(following.token)
            if following.more:
                self.outputs += following.more
            ready.append(following)
        return ready

    def start_over(self) -> None:
        """The next attempt: everything made so far is kept, nothing of the old attempt counts any more."""
        self.enter("queued")
        self.epoch += 1
        self.is_taken_up = False
        self.pending.clear()
        self.decode = None
        self.prefill = None
        self.handed_over = False
