"""What is asked of a system, and when: a workload is a sequence of arrivals that its seed alone determines.

The load generator plays it against a server and the virtual runtime against a model of one; neither adds chance of its
own. This file must never look at a clock, a socket or a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice, takewhile
from typing import assert_never

import msgspec
import numpy as np

from transload.errors import DeploymentError

SYNTHETIC_BLOCK_SIZE = 16
"""Tokens that one hash of a generated session stands for."""


class ArrivalSpec(msgspec.Struct, frozen=True, gc=False):
    """One request to make."""

    at_seconds: float
    """Since the workload began. Arrivals of a workload never go back in time."""
    num_input_tokens: int
    num_output_tokens: int
    block_hashes: tuple[int, ...] = ()
    """One per started block of the prompt (`Workload.block_size` tokens each, the last may be partial). Two prompts
    are equal up to the end of the last block in which their hashes agree. Empty: shares nothing with any other."""
    session: int | None = None
    turn: int = 0
    think_seconds: float | None = None
    """If set, this turn arrives so long after the turn before it in its session has ended, not before `at_seconds`."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """Arrivals in order. Iterating starts over: each pass yields the same. `Schedule` says when each may start."""

    name: str
    arrivals: Callable[[], Iterator[ArrivalSpec]]
    seed: int = 0
    """Decides the contents of prompts; their lengths and times are decided by whoever made `arrivals`."""
    block_size: int = SYNTHETIC_BLOCK_SIZE
    """Tokens that one of `ArrivalSpec.block_hashes` stands for."""
    concurrency: int | None = None
    """Closed loop: at most so many requests at once, the next starts as one ends. None: open loop."""
    duration_seconds: float | None = None
    """Nothing starts after this. None: until the arrivals are used up."""
    num_requests: int | None = None
    """How many arrivals there are, if that is known without counting them."""

    def __iter__(self) -> Iterator[ArrivalSpec]:
        return self.arrivals()


# ---------------------------------------------------------------------------------------------------------------------
# When requests arrive


class Poisson(msgspec.Struct, frozen=True, tag="poisson"):
    """Independent users: exponential gaps, `rate` arrivals a second."""

    rate: float


class Gamma(msgspec.Struct, frozen=True, tag="gamma"):
    """Bursts: gamma-distributed gaps of mean 1/`rate` and coefficient of variation `cv` (1: Poisson; above: bursts)."""

    rate: float
    cv: float


class Constant(msgspec.Struct, frozen=True, tag="constant"):
    """Equal gaps; the first arrival is at 0."""

    rate: float


class Ramp(msgspec.Struct, frozen=True, tag="ramp"):
    """Poisson arrivals whose rate goes in a straight line from `start_rate` to `end_rate`, and stays there."""

    start_rate: float
    end_rate: float
    seconds: float


class ClosedLoop(msgspec.Struct, frozen=True, tag="closed"):
    """So many users who each ask again as soon as they are answered."""

    concurrency: int


Arrivals = Poisson | Gamma | Constant | Ramp | ClosedLoop


def arrival_times(arrivals: Arrivals, rng: np.random.Generator) -> Iterator[float]:
    """Endless arrival times in seconds. A closed loop's are all 0: its schedule waits for answers instead."""
    match arrivals:
        case Poisson(rate):
            yield from _running_sum(lambda: float(rng.exponential(1 / rate)))
        case Gamma(rate, cv):
            shape = 1 / cv**2
            yield from _running_sum(lambda: float(rng.gamma(shape, 1 / (rate * shape))))
        case Constant(rate):
            number = 0
            while True:
                yield number / rate
                number += 1
        case Ramp():
            expected = _running_sum(lambda: float(rng.exponential()))
            yield from (_ramp_inverse(arrivals, count) for count in expected)
        case ClosedLoop():
            while True:
                yield 0.0
        case _:
            assert_never(arrivals)


def _running_sum(gap: Callable[[], float]) -> Iterator[float]:
    at = 0.0
    while True:
        at += gap()
        yield at


def _ramp_inverse(ramp: Ramp, count: float) -> float:
    """When `count` arrivals are expected: the inverse of the rate's integral (time rescaling of a Poisson process)."""
    slope = (ramp.end_rate - ramp.start_rate) / ramp.seconds
    during = (ramp.start_rate + ramp.end_rate) / 2 * ramp.seconds
    if count >= during:
        return ramp.seconds + (count - during) / ramp.end_rate
    # start*t + slope*t^2/2 = count, in the form that is exact for slope = 0 too.
    return 2 * count / (ramp.start_rate + math.sqrt(max(0.0, ramp.start_rate**2 + 2 * slope * count)))


# ---------------------------------------------------------------------------------------------------------------------
# How long they are


class Fixed(msgspec.Struct, frozen=True, tag="fixed"):
    num_tokens: int


class LogNormal(msgspec.Struct, frozen=True, tag="lognormal"):
    """Mean and coefficient of variation are of the distribution before it is cut to [low, high]."""

    mean: float
    cv: float
    low: int = 1
    high: int = 1_000_000


Lengths = Fixed | LogNormal


def lengths(kind: Lengths, rng: np.random.Generator) -> Iterator[int]:
    """Endless lengths in tokens, each at least 1."""
    match kind:
        case Fixed(num_tokens):
            while True:
                yield num_tokens
        case LogNormal(mean, cv, low, high):
            sigma = math.sqrt(math.log1p(cv**2))
            mu = math.log(mean) - sigma**2 / 2
            while True:
                yield min(high, max(low, round(float(rng.lognormal(mu, sigma)))))
        case _:
            assert_never(kind)


class Sessions(msgspec.Struct, frozen=True):
    """Conversations: every turn's prompt is all that was said before plus a new message."""

    turns: int
    think_seconds: float = 0.0
    """Mean of the exponential pause between an answer and the next question."""
    num_shared_tokens: int = 0
    """Tokens that the prompts of all sessions begin with (a system prompt)."""


class Synthetic(msgspec.Struct, frozen=True, kw_only=True):
    """A workload made from distributions. With `sessions`, `arrivals` says when sessions begin, and `input` how long
    each new message is; `num_requests` always counts requests."""

    arrivals: Arrivals
    input: Lengths
    output: Lengths
    sessions: Sessions | None = None
    num_requests: int | None = None
    duration_seconds: float | None = None
    seed: int = 0


def synthetic(spec: Synthetic) -> Workload:
    """The workload that `spec` describes. Raises `DeploymentError` for numbers that describe none."""
    _check(spec)
    return Workload(
        name=_name(spec),
        arrivals=lambda: _arrivals(spec),
        seed=spec.seed,
        concurrency=spec.arrivals.concurrency if isinstance(spec.arrivals, ClosedLoop) else None,
        duration_seconds=spec.duration_seconds,
        num_requests=spec.num_requests,
    )


def _arrivals(spec: Synthetic) -> Iterator[ArrivalSpec]:
    # A stream of chance for each quantity: changing the rate leaves the lengths as they were.
    when, how_long, how_much, pauses = (np.random.default_rng((spec.seed, stream)) for stream in range(4))
    times = arrival_times(spec.arrivals, when)
    inputs, outputs = lengths(spec.input, how_long), lengths(spec.output, how_much)
    every: Iterator[ArrivalSpec]
    if spec.sessions is None:
        every = (ArrivalSpec(at, next(inputs), next(outputs)) for at in times)
    else:
        every = _conversations(spec.sessions, times, inputs, outputs, pauses)
    if spec.duration_seconds is not None:
        end = spec.duration_seconds
        every = takewhile(lambda arrival: arrival.at_seconds < end, every)
    yield from islice(every, spec.num_requests)


def _conversations(
    sessions: Sessions,
    times: Iterator[float],
    inputs: Iterator[int],
    outputs: Iterator[int],
    pauses: np.random.Generator,
) -> Iterator[ArrivalSpec]:
    """The turns of a session follow each other in the sequence; all but the first wait for the one before."""
    for session, at in enumerate(times):
        num_tokens = sessions.num_shared_tokens
        for turn in range(sessions.turns):
            num_tokens += next(inputs)
            think = None if turn == 0 else float(pauses.exponential(sessions.think_seconds))
            num_outputs = next(outputs)
            hashes = _session_hashes(session, num_tokens, sessions.num_shared_tokens)
            yield ArrivalSpec(at, num_tokens, num_outputs, hashes, session, turn, think)
            num_tokens += num_outputs


def _session_hashes(session: int, num_tokens: int, num_shared_tokens: int) -> tuple[int, ...]:
    num_shared = num_shared_tokens // SYNTHETIC_BLOCK_SIZE
    num_blocks = -(-num_tokens // SYNTHETIC_BLOCK_SIZE)
    # 2**24 blocks are 268 million tokens: no session is that long, so sessions never share a hash by chance.
    own = (session + 1) << 24
    return (*range(num_shared), *range(own + num_shared, own + num_blocks))


def _check(spec: Synthetic) -> None:
    numbers: list[tuple[str, float, float]] = []  # what, got, must be above
    match spec.arrivals:
        case Poisson(rate) | Constant(rate):
            numbers += [("rate", rate, 0)]
        case Gamma(rate, cv):
            numbers += [("rate", rate, 0), ("cv", cv, 0)]
        case Ramp(start_rate, end_rate, seconds):
            numbers += [("start_rate", start_rate, -1e-300), ("end_rate", end_rate, 0), ("ramp seconds", seconds, 0)]
        case ClosedLoop(concurrency):
            numbers += [("concurrency", concurrency, 0)]
    for name, kind in (("input", spec.input), ("output", spec.output)):
        match kind:
            case Fixed(num_tokens):
                numbers += [(f"{name} tokens", num_tokens, 0)]
            case LogNormal(mean, cv, low, high):
                numbers += [(f"{name} mean", mean, 0), (f"{name} cv", cv, 0), (f"{name} low", low, 0)]
                numbers += [(f"{name} high (low is {low})", high, low - 1)]
    if spec.sessions is not None:
        numbers += [("turns", spec.sessions.turns, 0), ("think seconds", spec.sessions.think_seconds, -1e-300)]
        numbers += [("shared tokens", spec.sessions.num_shared_tokens, -1)]
    if spec.num_requests is not None:
        numbers += [("requests", spec.num_requests, 0)]
    if spec.duration_seconds is not None:
        numbers += [("duration", spec.duration_seconds, 0)]
    for what, got, above in numbers:
        if not (math.isfinite(got) and got > above):
            wanted = "a number above 0" if above == 0 else f"a number above {above:g}" if above > 0 else "0 or more"
            raise DeploymentError(f"workload: {what} is {got:g}; give {wanted}")
    if spec.num_requests is None and spec.duration_seconds is None:
        raise DeploymentError("workload: it has no end; give a number of requests or a duration")


def _name(spec: Synthetic) -> str:
    match spec.arrivals:
        case Poisson(rate):
            arrivals = f"Poisson {rate:g}/s"
        case Gamma(rate, cv):
            arrivals = f"gamma {rate:g}/s cv {cv:g}"
        case Constant(rate):
            arrivals = f"constant {rate:g}/s"
        case Ramp(start_rate, end_rate, seconds):
            arrivals = f"ramp {start_rate:g}/s to {end_rate:g}/s in {seconds:g} s"
        case ClosedLoop(concurrency):
            arrivals = f"closed loop of {concurrency}"
        case _:
            assert_never(spec.arrivals)
    sizes = [
        f"{kind.num_tokens}" if isinstance(kind, Fixed) else f"~{kind.mean:g} (cv {kind.cv:g})"
        for kind in (spec.input, spec.output)
    ]
    turns = "" if spec.sessions is None else f", {spec.sessions.turns} turns a session"
    return f"{arrivals}, {sizes[0]} tokens in, {sizes[1]} out{turns}"


# ---------------------------------------------------------------------------------------------------------------------
# What prompts share


def prefix_keys(
    arrival: ArrivalSpec, hash_block_size: int, block_size: int, namespace: bytes = b""
) -> tuple[bytes, ...]:
    """Keys of the full KV blocks (of `block_size` tokens) of an arrival's prompt, for runs that only count tokens.

    `hash_block_size` is the workload's `block_size`. Equal keys mean equal prompts up to the end of that block. Empty
    if the arrival has no hashes.
    """
    if not arrival.block_hashes:
        return ()
    keys: list[bytes] = []
    parent = blake2b(b"transload-workload-1" + namespace, digest_size=16).digest()
    for end in range(block_size, arrival.num_input_tokens + 1, block_size):
        covered = arrival.block_hashes[(end - block_size) // hash_block_size : -(-end // hash_block_size)]
        parent = blake2b(parent + repr((end, covered)).encode(), digest_size=16).digest()
        keys.append(parent)
    return tuple(keys)
