"""Measures steps: a worker's executor in a process of its own, told over stdin what to compute and how often.

`python -m transload.model.probe` reads one JSON line an order and answers each with one. The first order is the plan of
the worker; nothing here decides what is worth measuring.
"""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

import msgspec

from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling
from transload.deploy.plan import WorkerPlan
from transload.model.executor import TorchExecutor
from transload.model.load import build_executor


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """A step to compute over and over."""

    prefill: tuple[tuple[int, int], ...] = ()
    """(start, tokens) of each prompt chunk."""
    decode: tuple[int, ...] = ()
    """Context of each decoding request, its new token included."""
    repeats: int = 1
    """At least so often,"""
    seconds: float = 0.0
    """and for at least so long."""
    core: int | None = None
    """On this one; None: wherever the plan lets it."""


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """When each step began, on the monotonic clock of the machine, how long it took, and how much processor time."""

    started: tuple[float, ...] = ()
    seconds: tuple[float, ...] = ()
    cpu_seconds: tuple[float, ...] = ()
    error: str | None = None
    load_seconds: float = 0.0


def serve_orders(orders: TextIO, answers: TextIO) -> int:
    """Until the orders end."""
    began = time.monotonic()
    plan = msgspec.json.decode(orders.readline(), type=WorkerPlan)
    if plan.cores:
        os.sched_setaffinity(0, plan.cores)
    executor, _memory, _ = build_executor(plan)
    home = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
    _say(answers, Answer(load_seconds=time.monotonic() - began))
    for line in orders:
        try:
            order = msgspec.json.decode(line, type=Order)
            if home:
                os.sched_setaffinity(0, home if order.core is None else {order.core})
            _say(answers, _measure(executor, order))
        except (RuntimeError, ValueError) as problem:
            _say(answers, Answer(error=f"{type(problem).__name__}: {problem}"))
    return 0


def _say(answers: TextIO, answer: Answer) -> None:
    answers.write(msgspec.json.encode(answer).decode() + "\n")
    answers.flush()


def _measure(executor: TorchExecutor, order: Order) -> Answer:
    step = RunStep(0, _chunks(executor, order))
    started: list[float] = []
    seconds: list[float] = []
    cpu_seconds: list[float] = []
    until = time.monotonic() + order.seconds
    while len(seconds) < order.repeats or time.monotonic() < until:
        began, spent = time.monotonic(), time.process_time()
        executor.run_step(step, lambda _low, _high: None)
        started.append(began)
        seconds.append(time.monotonic() - began)
        cpu_seconds.append(time.process_time() - spent)
    return Answer(started=tuple(started), seconds=tuple(seconds), cpu_seconds=tuple(cpu_seconds))


def _chunks(executor: TorchExecutor, order: Order) -> tuple[Chunk, ...]:
    """Each request in blocks of its own. What lies in them does not change how long it takes to read."""
    size = executor.layout.block_size
    spans = [(start, tokens, False) for start, tokens in order.prefill]
    spans += [(context - 1, 1, True) for context in order.decode]
    chunks: list[Chunk] = []
    next_block = 0
    for number, (start, num_tokens, decodes) in enumerate(spans):
        end = start + num_tokens
        num_blocks = -(-end // size)
        if next_block + num_blocks > executor.num_blocks:
            raise ValueError(f"the order needs more than the {executor.num_blocks} blocks of the cache")
        tokens = [10 + (number * 31 + place) % 900 for place in range(end)]
        num_prompt = end - 1 if decodes else end
        request = Request(RequestId(number), num_prompt, 64, Sampling(temperature=0.0), tuple(tokens[:num_prompt]))
        chunks.append(
            Chunk(
                request,
                start,
                num_tokens,
                tokens,
                list(range(next_block, next_block + num_blocks)),
                samples=True,
                num_outputs=int(decodes),
            )
        )
        next_block += num_blocks
    return tuple(chunks)


if __name__ == "__main__":
    sys.exit(serve_orders(sys.stdin, sys.stdout))
