"""What `transload calibrate` measured of a machine, as a section of a chip file: seconds of steps, links and messages.

Owns the form. Holds for one model, in one number format, with so many threads: `hardware/cost/measured.py` makes a cost
of it. All numbers are of the class measured; machine and date stand beside them.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from transload.hardware.quantity import Text

Seconds = Annotated[float, Meta(ge=0, le=3600)]
Tokens = Annotated[int, Meta(ge=1, le=2**24)]
UNKNOWN = "unknown"
"""Number format of an endpoint that was measured from outside: whose model it is, only its own name tells."""
Factor = Annotated[float, Meta(ge=0.05, le=100)]
WorkKind = Literal["prefill", "decode", "front_end"]


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of every mapping of the section."""


class PrefillPoint(Part, frozen=True, kw_only=True):
    """A step that computes one prompt of so many tokens from its beginning, and draws a token."""

    tokens: Tokens
    seconds: Seconds


class DecodePoint(Part, frozen=True, kw_only=True):
    """Steps in which so many requests get a token each: fixed + per context token x the context of all together."""

    requests: Tokens
    fixed_seconds: Seconds
    context_token_seconds: Seconds


class MeasuredLink(Part, frozen=True, kw_only=True):
    latency_seconds: Seconds
    bytes_per_second: Annotated[float, Meta(gt=0)]


class Slowdown(Part, frozen=True, kw_only=True):
    """How many times as long steps take in a worker that serves as in one that only computes."""

    prefill: Factor = 1.0
    decode: Factor = 1.0
    streaming: Factor = 1.0
    """Beyond `prefill`, of prompts whose cache goes to another worker while they are computed."""


class Speed(Part, frozen=True, kw_only=True):
    """Of a machine's cores at a time."""

    product_seconds: Annotated[float, Meta(gt=0)]
    """Of a core, for a piece of arithmetic that stays in its own cache: `study/calibrate/speedometer.py`."""


class BesideEach(Part, frozen=True, kw_only=True):
    """How many times as long a step takes while another core of the machine does this all the time."""

    prefill: Factor = 1.0
    decode: Factor = 1.0
    front_end: Factor = 1.0


class Interference(Part, frozen=True, kw_only=True):
    """What cores of one machine do to each other through what they share. Rows: steps that are slowed."""

    prefill: BesideEach = BesideEach()
    """A step with prompt tokens."""
    decode: BesideEach = BesideEach()

    def factor(self, kind: WorkKind, other: WorkKind) -> float:
        """Of `kind` beside `other`. The front end is slowed by nobody: it waits, for most of its time."""
        if kind == "front_end":
            return 1.0
        row = self.prefill if kind == "prefill" else self.decode
        match other:
            case "prefill":
                return row.prefill
            case "decode":
                return row.decode
            case "front_end":
                return row.front_end


class FrontEnd(Part, frozen=True, kw_only=True):
    """HTTP, tokenizer and client, which users wait for and workers share cores with."""

    request_seconds: Seconds = 0.0
    """From the request on its way to the Controller that has it, and from the first token there to the user."""
    request_cpu_seconds: Seconds = 0.0
    """Of one core, for a request, load generator included."""
    token_cpu_seconds: Seconds = 0.0
    """The same for each output token."""


class MeasuredSteps(Part, frozen=True, kw_only=True):
    """The section `measured` of a chip file."""

    model: Text
    dtype: Text
    threads: Annotated[int, Meta(ge=1, le=4096)] = 1
    machine: Text
    """Processor, cores, operating system."""
    date: Text
    by: Text
    """Version and command that measured."""
    num_cores: Annotated[int, Meta(ge=1, le=65_536)]
    """That workers, front end and load generator shared."""
    kv_tokens: Tokens
    """That a worker's cache holds."""
    kv_bytes_per_token: Tokens
    prefill: Annotated[tuple[PrefillPoint, ...], Meta(min_length=1)]
    """By tokens, ascending."""
    prefill_context_seconds: Seconds = 0.0
    """More for each pair of a prompt token and a token of context that was there before the chunk."""
    decode: Annotated[tuple[DecodePoint, ...], Meta(min_length=1)]
    """By requests, ascending."""
    mixed_share: Factor = 1.0
    """A step with prompts and decodes takes what its prompts take alone and this share of what its decodes do."""
    serving: Slowdown = Slowdown()
    """Event loop, links and executor of a worker that serves share an interpreter."""
    beside: Interference = Interference()
    step_gap_seconds: Seconds = 0.0
    """Between two steps of a worker that has work."""
    message_seconds: Seconds = 0.0
    """Between the Controller and a worker, one way."""
    front_end: FrontEnd = FrontEnd()
    links: dict[str, MeasuredLink] = {}
    """By transport: shm, tcp."""
    speed: Speed | None = None
    """Of the machine to which the steps above belong. None: not measured, as of an endpoint."""
    load_seconds: Seconds = 0.0
    """Of a worker that is started."""
    step_error: Annotated[float, Meta(ge=0)] = 0.0
    """Median relative error of this form at the points it was made from."""

    def __post_init__(self) -> None:
        for name, counts in (
            ("prefill", [point.tokens for point in self.prefill]),
            ("decode", [point.requests for point in self.decode]),
        ):
            if counts != sorted(set(counts)):
                raise ValueError(f"{name}: points must ascend, each once; got {counts}")
