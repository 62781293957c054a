"""One request on one worker: its tokens, its blocks, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from transload.control.handoff import KvReceiver, KvSender
from transload.control.messages import Request, WorkerId
from transload.control.prefix import block_key

WorkKind = Literal["run", "send", "receive"]
"""run: prefill and decode here; send: prefill here, decode elsewhere; receive: its KV cache comes from elsewhere, and
once it is here this is a `run`."""

WorkPhase = Literal["waiting", "receiving", "running", "sent", "draining"]
"""waiting: for blocks; receiving: for its KV cache; running: has tokens to compute; sent: its cache is on its way and
held until the receiver has verified it; draining: ended, but sends that read its blocks are still under way."""


class Work:
    """Mutable state of a request on a worker; only the Engine touches it.

    The first `num_computed` of its `num_known` tokens have their keys and values in `blocks`. `tokens` lists them all;
    in runs that only count it lists the outputs alone.
    """

    __slots__ = (
        "arrival",
        "blocks",
        "epoch",
        "failed",
        "in_step",
        "kind",
        "known_keys",
        "num_cached",
        "num_computed",
        "num_given",
        "num_known",
        "num_outputs",
        "num_registered",
        "num_reported",
        "phase",
        "receiver",
        "request",
        "sender",
        "source",
        "started",
        "tokens",
        "window_blocks",
    )

    def __init__(self, request: Request, epoch: int, outputs: tuple[int, ...], kind: WorkKind, arrival: int) -> None:
        self.request = request
        self.epoch = epoch
        self.kind: WorkKind = kind
        self.phase: WorkPhase = "waiting"
        self.arrival = arrival
        self.tokens: list[int] = [*request.prompt, *outputs]
        self.num_outputs = len(outputs)
        self.num_given = len(outputs)  # of them: made by attempts before this one
        self.num_reported = len(outputs)  # of them: the controller knows, or will soon
        self.num_known = request.num_prompt_tokens + len(outputs)
        self.num_computed = 0
        self.num_cached = 0
        self.blocks: list[int] = []
        self.known_keys: list[bytes] = list(request.block_keys)
        self.num_registered = 0
        self.source: WorkerId | None = None  # of a reservation: who will fill it
        self.sender: KvSender | None = None
        self.receiver: KvReceiver | None = None
        self.window_blocks: list[int] | None = None  # of a send that works in the receiver's blocks: its table
        self.in_step = False
        self.started = False
        self.failed = False  # ended while its step was running: dropped when the step returns

    @property
    def is_decoding(self) -> bool:
        """Whether one token a step is all it needs now."""
        return self.num_known - self.num_computed == 1 and self.num_outputs > 0

    def append(self, token: int, more: Sequence[int] = ()) -> None:
        """A token was drawn, and perhaps more after it."""
        self.tokens.append(token)
        num_new = 1
        if more:
            self.tokens += more
            num_new += len(more)
        self.num_outputs += num_new
        self.num_known += num_new

    @property
    def outputs(self) -> tuple[int, ...]:
        """The output tokens so far."""
        return tuple(self.tokens[len(self.request.prompt) :])

    def keys(self, num_blocks: int, block_size: int, root: bytes) -> list[bytes]:
        """Prefix keys of the first `num_blocks` full blocks, or of as many as can be told."""
        keys = self.known_keys
        while len(keys) < num_blocks and self.request.prompt:
            start = len(keys) * block_size
            keys.append(block_key(keys[-1] if keys else root, self.tokens[start : start + block_size]))
        return keys[:num_blocks]

    def enter_window(self, block_size: int) -> bool:
        """Work in the receiver's blocks, from behind the prefix that it has cached. There is room: it has reserved
        it."""
        assert self.window_blocks is not None
        assert self.sender is not None
        self.blocks = self.window_blocks
        self.num_cached = self.num_computed = self.sender.grant.first_block * block_size
        self.num_registered = len(self.blocks)  # whom they can be found by is the receiver's business
        return True

    def restart(self) -> None:
        """Its blocks are gone; everything known is to be computed again, and nothing is lost."""
        self.phase = "waiting"
        self.kind = "run"
        self.started = False
        self.num_computed = 0
        self.num_registered = 0
        self.blocks = []
        self.sender = None
        self.receiver = None
