"""The seams between the machines, the real parts and the virtual ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from typing import Protocol

import msgspec

from transload.arch import ModelArch
from transload.control.ffn_messages import Piece
from transload.control.messages import FinishReason, Request, RequestId, RunStep, StepDone, Token, WorkerId
from transload.deploy.plan import HopPlan
from transload.transfer.ffn_callers import HopReport
from transload.transfer.ffn_kernels import RingKernels
from transload.transfer.ffn_link import ArrivedCall
from transload.transfer.ffn_meeting import FfnWeights, Party
from transload.transfer.layout import KvLayout
from transload.transfer.listener import PeerAddress


class Executor(Protocol):
    """Does what a `RunStep` says. Lives on one thread of a worker process; one step at a time."""

    @property
    def layout(self) -> KvLayout: ...
    @property
    def num_blocks(self) -> int: ...

    def run_step(self, step: RunStep, layers_ready: Callable[[int, int], None]) -> StepDone:
        """Compute the step. If a chunk streams, call `layers_ready(layer_lo, layer_hi)` as layers are written."""
        ...


class FfnSource(Protocol):
    """Where a worker's feed-forwards are computed: here, or by FFN workers. Any thread, but for `switch`."""

    def open_remote(self, hop: HopPlan, me: Party, report: HopReport) -> None:
        """Make ready to call FFN workers. `report` is called from any thread."""
        ...

    def connect(self, address: PeerAddress, transport: str) -> None: ...
    def disconnect(self, worker: WorkerId) -> None: ...

    def load(self) -> None:
        """Make ready to compute here: load the weights. Takes as long as that takes."""
        ...

    @property
    def is_loading(self) -> bool:
        """Whether the step under way waits for weights, because the FFN workers that had them are gone."""
        ...

    def switch(self, *, remote: bool) -> None:
        """From the next step on, and let go of what the other way needed. On the step thread, between steps."""
        ...

    def counts(self) -> dict[str, float]:
        """What calling FFN workers has come to, by name; empty if none is called."""
        ...

    def loads(self) -> tuple[tuple[int, ...], ...]:
        """How often each layer's experts were chosen so far; empty where none were."""
        ...

    def hops(self) -> tuple[int, ...]:
        """How many hops took how long, see `transfer/ffn_times.py`; empty if nobody is called."""
        ...

    def close(self) -> None:
        """End all links. After the last step."""
        ...


class FfnCompute(Protocol):
    """The arithmetic of an FFN worker. Lives on one thread."""

    @property
    def weights(self) -> FfnWeights: ...
    @property
    def pieces(self) -> frozenset[Piece]: ...
    @property
    def rings(self) -> RingKernels | None:
        """Compiled code for links through shared memory."""
        ...

    def problem(self, call: ArrivedCall, room_bytes: int) -> str | None:
        """Why a call cannot be computed as it came; its answer may take `room_bytes`."""
        ...

    def compute(self, layer: int, calls: Sequence[ArrivedCall], targets: Sequence[memoryview]) -> list[int]:
        """Answer calls without a problem into their targets; returns how many bytes of each are filled."""
        ...


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended, and what it used."""

    reason: FinishReason
    num_prompt_tokens: int
    num_outputs: int
    num_cached_tokens: int
    error: str | None = None
    error_code: str | None = None


class RequestStream(Protocol):
    """One admitted request, seen by its caller. Iterate: lists of tokens as they come, then one `Finished`."""

    request_id: RequestId

    def __aiter__(self) -> AsyncIterator[list[Token] | Finished]: ...

    def stop(self) -> None:
        """The text is complete (a stop string was found): end with reason "stop"."""
        ...

    def cancel(self) -> None:
        """The caller has gone: free everything, end with reason "cancelled"."""
        ...


class Stage(msgspec.Struct, frozen=True, kw_only=True):
    """One bar of a request's waterfall."""

    name: str
    worker: str | None
    start_seconds: float
    """Since the request arrived."""
    seconds: float
    detail: dict[str, float | int | str] = {}


class Waterfall(msgspec.Struct, frozen=True, kw_only=True):
    """Where a request's time went. The stages follow each other without gap: their seconds sum to the total."""

    request: RequestId
    state: str
    decision: str
    """Where the router sent it, and why."""
    epoch: int
    """How often it was started anew."""
    num_prompt_tokens: int
    num_cached_tokens: int
    num_outputs: int
    total_seconds: float
    stages: tuple[Stage, ...]


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """What the front end must know about the model."""

    name: str
    arch: ModelArch
    dtype: str
    max_context: int
    layout_digest: bytes
    """Namespace of prefix keys."""
    block_size: int


class Backend(Protocol):
    """What the HTTP front end talks to: the real runtime, or a fake one in tests and benchmarks."""

    model: ServedModel

    def next_request_id(self) -> RequestId: ...

    async def submit(self, request: Request) -> RequestStream:
        """Admit a request. Raises `OverCapacity` or `RequestError` if it is refused."""
        ...

    def is_ready(self) -> bool:
        """Whether a token can be made now."""
        ...

    def waterfall(self, request: RequestId) -> Waterfall | None:
        """Of a live or recently ended request; None if unknown."""
        ...

    async def change_split(self, topology: str) -> dict[str, object]:
        """Move the feed-forwards to where `topology` says, with requests under way. Returns what it took. Raises
        `RequestError`, and then all is as it was."""
        ...

    def status(self) -> dict[str, object]:
        """Workers, pools and links in words, for /health."""
        ...
