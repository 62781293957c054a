"""What one run gave, simulated or real: numbers, series and a few requests in full, as data.

Owns the form only, so that tables, pages and comparisons read one thing. Series are binned when they are recorded:
a result does not grow with the length of a trace. Everything goes through JSON and back (`decode_result`).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from transload.deploy.spec import PoolRole
from transload.errors import DeploymentError
from transload.runtime.base import Waterfall
from transload.study.metrics import RequestRecord, Summary
from transload.study.provenance import MachineFacts

SCHEMA = "transload-result-1"
NUM_BINS = 200
"""About how many points a series has."""


class PoolSample(msgspec.Struct, frozen=True, kw_only=True):
    """One bin of a pool's history. All are means over the bin and over the pool's live workers."""

    seconds: float
    """Start of the bin, since the run began."""
    busy_share: float
    """Of the time, computing."""
    batch: float
    """Requests in the running step; 0 while there is none."""
    waiting: float
    """Requests that wait for blocks at the pool's workers."""
    kv_share: float
    """KV blocks referenced, as a share of all."""


class PoolResult(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    role: PoolRole
    chip: str
    """Id in the catalog or path; of a real run what the machine calls itself."""
    num_workers: int
    num_chips: int
    """Of all workers together."""
    busy_share: float
    mean_batch: float
    """Requests in a step, over the time that steps ran."""
    num_steps: int
    num_prefill_tokens: int
    num_decode_tokens: int
    num_preemptions: int
    kv_tokens: int
    """That the caches of all workers hold together."""
    kv_share: float
    """Mean share of blocks referenced."""
    peak_kv_share: float
    energy_joules: float | None = None
    """None: the chip's power is not known."""
    usd: float | None = None
    """Rent of all its chips for the duration. None: the chip's price is not known."""
    series: tuple[PoolSample, ...] = ()


class LinkSample(msgspec.Struct, frozen=True, kw_only=True):
    seconds: float
    """Start of the bin, since the run began."""
    bytes_per_second: float
    """Mean over the bin, all pairs of workers together."""


class LinkResult(msgspec.Struct, frozen=True, kw_only=True):
    """All that went from the workers of one pool to those of another."""

    source: str
    target: str
    kind: str
    crosses: Literal["kv", "activations"]
    num_transfers: int
    num_bytes: int
    bytes_per_second_limit: float | None
    """Of one worker's port."""
    busy_seconds: float
    """During which at least one transfer was under way."""
    exposed_seconds: float
    """Sum over requests: the prompt was computed and the decode worker still waited for its KV cache."""
    wire_seconds: float
    """Sum over requests: from the first frame in to the last."""
    series: tuple[LinkSample, ...] = ()


class SplitResult(msgspec.Struct, frozen=True, kw_only=True):
    """An attention pool whose feed-forwards another pool computes: how a mean step of its was spent. Shares are of the
    step; what is left of a side's busy share are its bubbles."""

    attention: str
    ffn: str
    micro_batches: int
    attention_workers: int
    ffn_workers: int
    step_seconds: float
    attention_busy: float
    ffn_busy: float
    exposed_hop_seconds: float
    """By which the step would be shorter if bytes crossed in no time."""
    crossing_bytes: float
    """Out and home, of one attention worker in one step."""
    bytes_per_token: float
    """Out and home, in all layers."""
    waits_for: str
    """What the step is bound by: attention, ffn, out or back (bytes on the way), or latency."""

    @property
    def attention_bubble(self) -> float:
        return 1.0 - self.attention_busy

    @property
    def ffn_bubble(self) -> float:
        return 1.0 - self.ffn_busy

    @property
    def exposed_share(self) -> float:
        return self.exposed_hop_seconds / self.step_seconds if self.step_seconds else 0.0


class FfnLoss(msgspec.Struct, frozen=True, kw_only=True):
    """A death of a worker that computes feed-forwards, and what its attention workers' steps felt of it."""

    worker: str
    at_seconds: float
    back_seconds: float
    """When it can be called again."""
    num_steps: int
    """Under way when it died, or done while nobody had its part."""
    longest_delay_seconds: float
    """Most that one of them took longer than it would have."""
    num_retries: int
    """Calls that another FFN worker was asked for."""
    num_computed_here: int
    """Calls that attention workers computed themselves."""
    num_failed_steps: int
    """After each its requests are started anew, or end in an error."""


class Step(msgspec.Struct, frozen=True, kw_only=True, array_like=True):
    """One step, or a run of steps of the same requests."""

    worker: str
    start_seconds: float
    end_seconds: float
    num_steps: int
    num_prefill_tokens: int
    num_decode: int
    """Requests that decode in each step."""


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """What the run took. None with a reason in `unknown` where the catalog does not say."""

    num_chips: int
    usd: float | None
    usd_per_million_output_tokens: float | None
    energy_joules: float | None
    mean_watts: float | None
    joules_per_output_token: float | None
    """Watts for a million output tokens a second are a million times this."""
    unknown: tuple[str, ...] = ()


class Interval(msgspec.Struct, frozen=True, kw_only=True):
    """By what factors the truth may lie from a simulated figure, and why that is thought so."""

    low: float
    high: float
    basis: str


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """One that was played, in the words of `--fault`."""

    text: str


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """The JSON file of `transload simulate`, and what `transload.simulate` returns."""

    schema: str = SCHEMA
    name: str
    """Of the deployment: its file, or the words of its command line."""
    simulated: bool
    deployment: str
    """As a file that loads."""
    model: str
    workload: str
    seed: int
    command: tuple[str, ...] = ()
    started_at: str = ""
    machine: MachineFacts | None = None
    """That computed this."""
    versions: dict[str, str] = {}
    cpu_seconds: float | None = None
    """That computing it took."""
    was_interrupted: bool = False
    summary: Summary
    curves: dict[str, tuple[float, ...]] = {}
    """Distributions of `ttft`, `tpot`, `itl` and `end_to_end` in seconds: their values at evenly spaced shares from 0
    to 1 (see `curves.py`). What is missing is not known."""
    num_rejected: int = 0
    """Refused at the border, counted among the failed."""
    num_recovered: int = 0
    """Requests that were started anew at least once."""
    pools: tuple[PoolResult, ...]
    links: tuple[LinkResult, ...] = ()
    splits: tuple[SplitResult, ...] = ()
    """Of pools whose feed-forwards are computed elsewhere."""
    ffn_losses: tuple[FfnLoss, ...] = ()
    requests: tuple[RequestRecord, ...] | None = None
    """Only if asked for: it grows with the trace."""
    waterfalls: tuple[Waterfall, ...] = ()
    """Of a few requests: of median and of worst TTFT and latency."""
    steps: tuple[Step, ...] | None = None
    """Only if asked for."""
    cost: Cost | None = None
    ttft_interval: Interval | None = None
    tpot_interval: Interval | None = None
    assumptions: tuple[str, ...] = ()
    """Values of the user's own, as `--assume` takes them."""
    classes: dict[str, int] = {}
    """How many of the catalog's numbers this rests on, by class."""
    notes: tuple[str, ...] = ()
    """What to know before believing it."""
    bottleneck: str = ""
    faults: tuple[Fault, ...] = ()


def encode_result(result: Result) -> bytes:
    """As an indented JSON file."""
    return msgspec.json.format(msgspec.json.encode(result), indent=1) + b"\n"


def decode_result(encoded: bytes, where: str = "result") -> Result:
    """Raises `DeploymentError` if it is not one."""
    try:
        return msgspec.json.decode(encoded, type=Result)
    except msgspec.DecodeError as error:
        raise DeploymentError(f"{where}: not a result of this version ({SCHEMA}): {error}") from None
