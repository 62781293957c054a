"""Replays a benchmark client in a closed loop against one aggregated worker, step by step, or against a prefill and a
decode pool: TTFT and TPOT in the mean.

The client is the one that measured (so many requests in flight, a new one for each that ends, all of them at once at
the start); the engine is a policy in two numbers. Used to compare with measurements of engines that are not ours; the
simulator proper drives the machines that ship.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.steady import Policy
from transload.hardware.cost.worker import WorkerCost


@dataclass
class Request:
    prompt: int
    output: int
    arrived: float = 0.0
    done: int = 0
    first: float = 0.0
    last: float = 0.0


def requests(count: int, prompt: int, output: int, spread: float, seed: int) -> list[Request]:
    """Lengths drawn evenly from (1 - spread, 1 + spread) times the mean ones; spread 0: all alike."""
    draw = random.Random(seed)

    def length(mean: int) -> int:
        return max(1, round(mean * draw.uniform(1 - spread, 1 + spread))) if spread else mean

    return [Request(length(prompt), max(2, length(output))) for _ in range(count)]


class Replay:
    """One worker and its client."""

    def __init__(self, cost: WorkerCost, policy: Policy, todo: list[Request], in_flight: int, room: int) -> None:
        self.cost, self.policy, self.room = cost, policy, room
        self.todo = deque(todo)
        self.waiting: deque[Request] = deque()
        self.prefilling: deque[Request] = deque()
        self.ends: list[tuple[int, int, Request]] = []
        self.now, self.step, self.context, self.reserved = 0.0, 0, 0, 0
        for _ in range(min(in_flight, len(todo))):
            self._arrive()

    def _arrive(self) -> None:
        if self.todo:
            request = self.todo.popleft()
            request.arrived = self.now
            self.waiting.append(request)

    def run(self) -> None:
        while self.waiting or self.prefilling or self.ends:
            self._admit()
            if self.prefilling:
                self._prefill_step()
            else:
                self._decode_steps()

    def _admit(self) -> None:
        while self.waiting:
            needed = self.waiting[0].prompt + self.waiting[0].output
            batch = len(self.ends) + len(self.prefilling)
            if batch and (self.reserved + needed > self.room or batch >= self.policy.max_batch):
                return
            self.reserved += needed
            self.prefilling.append(self.waiting.popleft())

    def _prefill_step(self) -> None:
        decoding = len(self.ends) if self.policy.mixed else 0
        most = self.policy.max_step_tokens
        budget = max(1, most * self.cost.parallel.data_attention - decoding)  # each attention rank has its own
        chunks: list[tuple[int, int]] = []
        worked: list[Request] = []
        for request in self.prefilling:
            if budget <= 0:
                break
            size = min(budget, most, request.prompt - request.done)
            chunks.append((request.done, size))
            request.done += size
            budget -= size
            worked.append(request)
        shape = StepShape(tuple(chunks), decoding, self.context if decoding else 0)
        self.now += self.cost.step_seconds(shape)
        if decoding:
            self._advance(1)
        for request in worked:
            if request.done >= request.prompt:
                self.prefilling.remove(request)
                request.first = self.now
                self.context += request.prompt + 1
                heapq.heappush(self.ends, (self.step + request.output - 1, id(request), request))

    def _decode_steps(self) -> None:
        count = self.ends[0][0] - self.step
        batch = len(self.ends)
        fixed, each = self.cost.decode_coefficients(batch)
        self.now += count * fixed + each * (count * self.context + batch * count * (count - 1) / 2)
        self._advance(count)

    def _advance(self, count: int) -> None:
        self.step += count
        self.context += count * len(self.ends)
        while self.ends and self.ends[0][0] <= self.step:
            _, _, request = heapq.heappop(self.ends)
            request.last = self.now
            self.context -= request.prompt + request.output
            self.reserved -= request.prompt + request.output
            self._arrive()


def closed_loop(
    cost: WorkerCost, policy: Policy, *, in_flight: int, prompt: int, output: int, waves: float, spread: float,
    seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """(mean TTFT, mean TPOT) in seconds over `waves * in_flight` requests."""
    todo = requests(max(1, round(waves * in_flight)), prompt, output, spread, seed)
    room = cost.kv_tokens
    Replay(cost, policy, list(todo), in_flight, room).run()
    ttft = sum(request.first - request.arrived for request in todo) / len(todo)
    tpot = sum((request.last - request.first) / (request.output - 1) for request in todo) / len(todo)
    return ttft, tpot


@dataclass(frozen=True)
class Pools:
    """A prefill and a decode pool, by their durations."""

    prefill_seconds: Callable[[int], float]
    """Of one step of one worker with so many prompts."""
    most_prompts: int
    """In a step."""
    prefill_workers: int
    step_seconds: Callable[[int], float]
    """From one token to the next where so many requests decode, in all workers together."""


def closed_loop_apart(pools: Pools, todo: list[Request], in_flight: int) -> tuple[float, float]:
    """(mean TTFT, mean TPOT) in seconds. Prompts wait for a worker that is free; those that wait are shared out evenly.
    Whoever decodes gets a token a step, so one clock that counts steps ends all of them."""
    coming = deque(todo)
    waiting = deque(coming.popleft() for _ in range(min(in_flight, len(coming))))
    running: list[tuple[float, int, list[Request]]] = []
    decoding: list[tuple[float, int, Request]] = []
    now, steps, free, started = 0.0, 0.0, pools.prefill_workers, 0
    while waiting or running or decoding:
        while free and waiting:
            count = min(pools.most_prompts, math.ceil(len(waiting) / free))
            batch = [waiting.popleft() for _ in range(count)]
            free, started = free - 1, started + 1
            heapq.heappush(running, (now + pools.prefill_seconds(count), started, batch))
        step = pools.step_seconds(len(decoding)) if decoding else math.inf
        ends = now + (decoding[0][0] - steps) * step if decoding else math.inf
        until = min(ends, running[0][0]) if running else ends
        steps += (until - now) / step
        now = until
        if running and running[0][0] <= ends:
            _, _, batch = heapq.heappop(running)
            free += 1
            for request in batch:
                request.first = now
                heapq.heappush(decoding, (steps + request.output - 1, id(request), request))
        else:
            heapq.heappop(decoding)[2].last = now
            if coming:
                coming[0].arrived = now
                waiting.append(coming.popleft())
    ttft = sum(request.first - request.arrived for request in todo) / len(todo)
    return ttft, sum((request.last - request.first) / (request.output - 1) for request in todo) / len(todo)
