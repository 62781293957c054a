"""The vocabulary of the whole system: ids, events and commands.

Two machines speak it. `Controller` (one per cluster) decides per request; `Engine` (one per worker) decides per
step. Both are `handle(event, now) -> list[Command]`. Events are facts, commands are wishes. Messages are frozen and
travel unchanged over a socket (msgpack) or a virtual link, so nothing in here may depend on how they got there.

Times are seconds on the clock of whoever reads them; a duration that crosses between workers is always *remaining*
milliseconds (`lease_ms`), never a time of day.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NewType

import msgspec

RequestId = NewType("RequestId", int)
"""One choice of one API call. Unique for the life of a controller."""
WorkerId = NewType("WorkerId", str)
"""Name of a worker: `<pool>-<index>`. A restarted worker keeps its name and gets a higher incarnation."""
BlockId = NewType("BlockId", int)
"""Index of a KV block in one worker's pool."""
BlockKey = NewType("BlockKey", bytes)
"""Chained hash of a full block's tokens and all before it, in the namespace of a model, dtype and layout."""
TransferId = NewType("TransferId", int)
"""Random 64-bit name of one KV transfer. Never the API's request id."""

Role = Literal["aggregated", "prefill", "decode"]
FinishReason = Literal["stop", "length", "cancelled", "error"]


class Message(msgspec.Struct, frozen=True, tag=True, array_like=True, gc=False):
    """Base of everything the machines exchange."""


# ---------------------------------------------------------------------------------------------------------------------
# What a request is


class Sampling(Message, frozen=True):
    """How tokens are drawn. The n-th output token of a request depends on these fields, the tokens before it and
    (seed, n) alone: not on the batch, the worker or the split."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None  # None: none wanted; k >= 0: the drawn token's and the k best
    min_tokens: int = 0
    stop_ids: tuple[int, ...] = ()  # end the text when drawn (end-of-sequence ids included)
    ignore_eos: bool = False  # then stop_ids holds only what the caller asked for


class Request(Message, frozen=True):
    """An admitted request. `prompt` is empty in virtual runs that only count tokens."""

    id: RequestId
    num_prompt_tokens: int
    max_tokens: int
    sampling: Sampling = Sampling()
    prompt: tuple[int, ...] = ()
    block_keys: tuple[bytes, ...] = ()  # one per full block of the prompt; empty: no prefix cache
    deadline_seconds: float = 600.0  # from arrival; every request ends by then
    caller: int = 0  # who asks for what, as a number: a place is kept under it when it is refused; 0: nobody


class TokenLogprobs(Message, frozen=True):
    """Natural log-probability of a drawn token and of the best `top` tokens at its place (before temperature)."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Token(Message, frozen=True):
    """The `index`-th output token of a request, and `more` that followed it in the same run of steps. `finish` is set
    if the last of them is the last of the text."""

    request: RequestId
    epoch: int
    index: int
    token: int
    finish: Literal["stop", "length"] | None = None
    logprobs: TokenLogprobs | None = None
    more: tuple[int, ...] = ()


# ---------------------------------------------------------------------------------------------------------------------
# Frames between two workers: the handoff protocol. `block_lo/hi` count blocks of the request, not pool ids.


class KvData(Message, frozen=True):
    """Layers [layer_lo, layer_hi) of the request's blocks [block_lo, block_hi). The bytes travel beside it."""

    transfer: TransferId
    epoch: int
    sequence: int
    layer_lo: int
    layer_hi: int
    block_lo: int
    block_hi: int
    num_bytes: int
    checksum: int = 0  # xxh3-64 over the cells, layer by layer, block by block; filled in by the transport
    in_place: bool = False  # the sender's steps have written the receiver's blocks: nothing is copied or summed


class KvDone(Message, frozen=True):
    """Everything was sent. Carries the sampler's state, which is the output tokens so far: see `Sampling`."""

    transfer: TransferId
    epoch: int
    num_frames: int
    outputs: tuple[int, ...]


class KvReady(Message, frozen=True):
    """The receiver has verified the transfer; the sender may release its blocks."""

    transfer: TransferId
    epoch: int


class KvRenew(Message, frozen=True):
    """The receiver still wants the transfer: hold the blocks `lease_ms` longer."""

    transfer: TransferId
    epoch: int
    lease_ms: int


class KvCredit(Message, frozen=True):
    """The receiver has taken in `sequence` frames of a transfer in all, so the sender's window moves on."""

    transfer: TransferId
    epoch: int
    num_frames: int


class KvAbort(Message, frozen=True):
    """The receiver gives up; the sender answers with `KvAbortAck` once its writes have drained."""

    transfer: TransferId
    epoch: int
    reason: str


class KvAbortAck(Message, frozen=True):
    """No write of this transfer is under way or will start: the receiver's blocks may leave quarantine."""

    transfer: TransferId
    epoch: int


Frame = KvData | KvDone | KvReady | KvRenew | KvCredit | KvAbort | KvAbortAck


# ---------------------------------------------------------------------------------------------------------------------
# Controller -> engine


class Grant(Message, frozen=True):
    """Room that a decode worker has reserved, and the name of the transfer that may fill it."""

    transfer: TransferId
    blocks: tuple[int, ...]  # pool ids at the receiver, for the request's blocks from first_block on
    first_block: int  # earlier blocks are in the receiver's prefix cache already
    lease_ms: int
    prefix: tuple[int, ...] = ()  # those, for a sender whose steps can read them there
    link_name: int = 0  # of the link it holds for: with the link the room is given up, whoever hears of it when
    in_place: bool = False  # the sender's steps may work in these blocks; else cells must be copied there


class Run(Message, frozen=True):
    """Prefill and decode this request here. `outputs` are tokens it has made already (after a recovery)."""

    request: Request
    epoch: int
    outputs: tuple[int, ...] = ()


class Reserve(Message, frozen=True):
    """Make room for this request's KV cache, which `source` will fill. Answered by `Reserved`."""

    request: Request
    epoch: int
    source: WorkerId
    outputs: tuple[int, ...] = ()


class Prefill(Message, frozen=True):
    """Prefill this request and stream its KV cache into `target`'s reserved blocks."""

    request: Request
    epoch: int
    target: WorkerId
    grant: Grant
    outputs: tuple[int, ...] = ()


class Cancel(Message, frozen=True):
    """Free everything of this request up to and including `epoch`. Never fails, may come twice."""

    request: RequestId
    epoch: int


# ---------------------------------------------------------------------------------------------------------------------
# Driver -> engine


class Sampled(Message, frozen=True):
    """A token the executor drew at the end of a chunk."""

    request: RequestId
    token: int
    logprobs: TokenLogprobs | None = None
    more: tuple[int, ...] = ()  # drawn in the steps that followed, if several were run at once


class StepDone(Message, frozen=True):
    """The step is computed, or `count` steps of it, each a token further; `seconds` is how long the chip worked.
    `goes_on`: the run is not over, and the next step of the same requests is under way."""

    step: int
    sampled: tuple[Sampled, ...]
    seconds: float
    count: int = 1
    goes_on: bool = False


class StepFailed(Message, frozen=True):
    """The executor could not compute the step (out of memory, a bug). Its requests are failed by name."""

    step: int
    reason: str


class LayersReady(Message, frozen=True):
    """Layers [layer_lo, layer_hi) of the running step have been written to the KV cache."""

    step: int
    layer_lo: int
    layer_hi: int


class PeerUp(Message, frozen=True):
    """A link to a peer is open. `one_sided`: the peer writes straight into our memory (and we into its). `link` tells
    it from those that were open to this peer before. `window`: where our steps can work in the peer's blocks
    themselves, and its in ours: its block b is our block `window + b`, of `window_blocks`. None: they cannot. `name` is
    the link's, the same at both ends."""

    peer: WorkerId
    one_sided: bool
    link: int = 0
    window: int | None = None
    window_blocks: int = 0
    name: int = 0


class PeerLost(Message, frozen=True):
    """The link is gone and no write of the peer can be under way any more."""

    peer: WorkerId


class PeerFrame(Message, frozen=True):
    """A frame came in. For `KvData`, `arrived_checksum` is computed over the bytes as they lie here."""

    peer: WorkerId
    frame: Frame
    arrived_checksum: int = 0


class SendsDrained(Message, frozen=True):
    """After `CancelSends`: no send of this transfer reads or writes memory any more."""

    transfer: TransferId
    epoch: int


class ReportTokens(Message, frozen=True):
    """Somebody wants to know how far every request is: report the tokens that are held back."""


class TimerFired(Message, frozen=True):
    """A timer asked for with `SetTimer` is due."""

    key: str


EngineEvent = (
    Run
    | Reserve
    | Prefill
    | Cancel
    | StepDone
    | StepFailed
    | LayersReady
    | PeerUp
    | PeerLost
    | PeerFrame
    | SendsDrained
    | TimerFired
    | ReportTokens
)


# ---------------------------------------------------------------------------------------------------------------------
# Engine -> its driver


class Chunk(msgspec.Struct, frozen=True, gc=False):
    """A run of one request's tokens in a step: positions [start, start + num_tokens).

    `tokens` is the engine's own list of the request's known tokens (prompt, then outputs), shared to save a copy and
    read-only for the executor; it only grows between steps. Empty in virtual runs. `blocks` likewise holds the pool
    ids of the request's KV blocks, in order. A token is drawn after the last position if `samples`; it becomes output
    token number `num_outputs`.
    """

    request: Request
    start: int
    num_tokens: int
    tokens: Sequence[int]
    blocks: Sequence[int]
    samples: bool
    num_outputs: int
    streams: bool = False  # its KV leaves for another worker: report LayersReady
    num_sent_blocks: int = 0  # then: the request's blocks before this one have left already


class RunStep(msgspec.Struct, frozen=True, gc=False):
    """Compute these chunks in one forward pass. One step at a time; answered by `StepDone` or `StepFailed`.

    `arrived` are the blocks that other workers have filled since the last step: an executor whose cache is not the
    memory that links write to fetches them first. Whoever likes may go on with the same requests, each a token
    further, up to `repeats` steps in all, and answer for all of them at once: nothing is planned before that.
    """

    step: int
    chunks: tuple[Chunk, ...]
    arrived: tuple[int, ...] = ()
    repeats: int = 1
    continues: bool = False  # the requests of the step before, each a token further


class EndRun(Message, frozen=True):
    """Let the step under way be the last of its run: there is something new to plan."""

    step: int


class SendFrame(Message, frozen=True):
    """Send a frame to a peer over that link and no later one, in order. For `KvData`: copy `source_blocks` (pool ids
    here) to `target_blocks`; none if the cells are in place already."""

    peer: WorkerId
    frame: Frame
    source_blocks: tuple[int, ...] = ()
    target_blocks: tuple[int, ...] = ()
    link: int = 0


class CancelSends(Message, frozen=True):
    """Drop what is queued of this transfer; answer `SendsDrained` when nothing of it is under way."""

    peer: WorkerId
    transfer: TransferId
    epoch: int
    link: int = 0


class ExpectKv(Message, frozen=True):
    """Let the transport write this transfer's cells into these blocks (pool ids here, from `first_block` on)."""

    transfer: TransferId
    epoch: int
    source: WorkerId
    first_block: int
    blocks: tuple[int, ...]


class ForgetKv(Message, frozen=True):
    """Take the permission of `ExpectKv` back: later bytes of this transfer are read and dropped."""

    transfer: TransferId
    epoch: int


class ToController(Message, frozen=True):
    """Tell the controller."""

    event: ControllerEvent


class SetTimer(Message, frozen=True):
    """Deliver `TimerFired(key)` after so many seconds. A later one with the same key replaces it."""

    key: str
    after_seconds: float


class CancelTimer(Message, frozen=True):
    """Forget the timer, if it is set."""

    key: str


# ---------------------------------------------------------------------------------------------------------------------
# Engine -> controller


class Reserved(Message, frozen=True):
    """Room is made. `num_cached_tokens` of the prompt are in this worker's cache already."""

    worker: WorkerId
    request: RequestId
    epoch: int
    grant: Grant
    num_cached_tokens: int


class Started(Message, frozen=True):
    """The first chunk of this request entered a step here."""

    worker: WorkerId
    request: RequestId
    epoch: int
    num_cached_tokens: int


class Emitted(Message, frozen=True):
    """All tokens that one step of a worker made: one message a step."""

    worker: WorkerId
    tokens: tuple[Token, ...]


class PrefillSent(Message, frozen=True):
    """The prefill worker has released the request: its KV cache is the decode worker's now."""

    worker: WorkerId
    request: RequestId
    epoch: int


class KvVerified(Message, frozen=True):
    """Every cell has arrived once and every checksum matches: the request may run."""

    worker: WorkerId
    request: RequestId
    epoch: int
    num_bytes: int
    wire_seconds: float  # from the first frame in to the last
    num_frames: int


class HandoffFailed(Message, frozen=True):
    """This attempt cannot be completed here; nothing of it runs. `worker` has freed (or quarantined) its side."""

    worker: WorkerId
    request: RequestId
    epoch: int
    reason: str


class RequestFailed(Message, frozen=True):
    """The worker cannot run this request (a step failed, it can never fit)."""

    worker: WorkerId
    request: RequestId
    epoch: int
    reason: str


class Preempted(Message, frozen=True):
    """Its blocks were taken for an older request; it waits here to be recomputed and loses nothing."""

    worker: WorkerId
    request: RequestId
    epoch: int


class CacheChanged(Message, frozen=True):
    """Which prefix blocks this worker holds, as numbered differences. A gap in `sequence` means: ask anew."""

    worker: WorkerId
    sequence: int
    stored: tuple[bytes, ...]
    evicted: tuple[bytes, ...]


class Load(Message, frozen=True):
    """A worker's state after a step or a run of steps, for routing and metrics."""

    worker: WorkerId
    num_running: int
    num_waiting: int
    waiting_prefill_tokens: int
    blocks_free: int
    blocks_referenced: int
    blocks_cached: int
    blocks_quarantined: int
    blocks_total: int
    blocks_leaked: int  # referenced although nothing is held here: must be 0
    step_seconds: float  # of the last step; of a run, on average
    step_requests: int
    step_prefill_tokens: int
    step_decode_tokens: int
    num_steps: int = 1  # in the run


# ---------------------------------------------------------------------------------------------------------------------
# Driver -> controller


class Arrived(Message, frozen=True):
    """A validated request came in."""

    request: Request


class Cancelled(Message, frozen=True):
    """The caller wants no more of it. `reason` is "stop" when a stop string was found in the text."""

    request: RequestId
    reason: Literal["stop", "cancelled"]


class WorkerJoined(Message, frozen=True):
    """A worker process is connected and its model is loaded."""

    worker: WorkerId
    incarnation: int
    pool: str
    role: Role
    num_blocks: int
    block_size: int
    kv_bytes_per_token: int
    max_batch: int  # requests it takes at once


class WorkerGone(Message, frozen=True):
    """A worker's connection closed: it is dead, and this incarnation will never speak again."""

    worker: WorkerId
    incarnation: int
    reason: str


class LinkMeasured(Message, frozen=True):
    """What a KV link between two workers gives."""

    source: WorkerId
    target: WorkerId
    transport: str
    bytes_per_second: float
    latency_seconds: float


EngineReport = (
    Reserved
    | Started
    | Emitted
    | PrefillSent
    | KvVerified
    | HandoffFailed
    | RequestFailed
    | Preempted
    | CacheChanged
    | Load
)
ControllerEvent = EngineReport | Arrived | Cancelled | WorkerJoined | WorkerGone | LinkMeasured | TimerFired


# ---------------------------------------------------------------------------------------------------------------------
# Controller -> its driver

Assignment = Run | Reserve | Prefill | Cancel


class ToWorker(Message, frozen=True):
    """Send an assignment to a worker."""

    worker: WorkerId
    event: Assignment


class Stream(Message, frozen=True):
    """A token for the caller, in order and once."""

    token: Token


class Finish(Message, frozen=True):
    """The one end of an admitted request."""

    request: RequestId
    reason: FinishReason
    num_prompt_tokens: int
    num_outputs: int
    num_cached_tokens: int
    error: str | None = None  # set if reason is "error": what happened, for the caller
    error_code: str | None = None


class Reject(Message, frozen=True):
    """Not admitted: the queue is full (then `retry_after_seconds` is set) or it can never fit."""

    request: RequestId
    message: str
    retry_after_seconds: float | None = None


class RestartWorker(Message, frozen=True):
    """Start this worker again after a pause."""

    worker: WorkerId
    after_seconds: float


EngineCommand = RunStep | EndRun | SendFrame | CancelSends | ExpectKv | ForgetKv | ToController | SetTimer | CancelTimer
ControllerCommand = ToWorker | Stream | Finish | Reject | RestartWorker | SetTimer | CancelTimer
