"""What it costs to compute feed-forwards in another process: the hop alone, and decode steps of the real model.

    python benchmarks/afd.py [--out afd.json] [--steps 30] [--batches 1 8 32] [--context 128] [--micro-batches 1 2]

The hop: 8 KiB there and back between two processes on two cores, through the links that serving uses, once with both
sides spinning and once with both asleep in between; over shared memory with the compiled code and without it. The
steps: an attention worker on one core, an FFN worker on the other, against one worker that computes all of it on both
cores, and on one. Of each step: how much of the time either side computed nothing (its bubble), and how much the
attention side waited beyond what the FFN side's longer work explains (exposed hops; exact with one micro-batch).
Figures are medians of rounds. It takes some two minutes.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
import os
import socket
import statistics
import subprocess
import threading
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec

from transload.control.ffn_messages import CallKey, FfnReply, FfnRequest, Piece, SessionId
from transload.control.messages import Chunk, Request, RequestId, RunStep, Sampling, WorkerId
from transload.deploy.machine import read_machine
from transload.deploy.overrides import parse_override
from transload.deploy.placement import place
from transload.deploy.plan import WorkerPlan
from transload.deploy.resolve import resolve
from transload.model.executor import TorchExecutor
from transload.model.load import build_executor, build_ffn
from transload.model.native.ring import compiled_rings
from transload.model.source import locate
from transload.runtime.ffn_service import FfnService
from transload.study.provenance import machine_facts, versions
from transload.transfer.ffn_link import CalleeEnd, CallerEnd, CallFrame, SlotSizes
from transload.transfer.ffn_meeting import PROTOCOL, FfnWeights, Offer, Opening, Party, accept_ffn, dial_ffn
from transload.transfer.ffn_waiting import Waiter
from transload.transfer.listener import Listener, PeerAddress, host_id

SECRET = b"a secret of a benchmark"
ATTENTION = Party(worker=WorkerId("aggregated-0"), incarnation=1, secret=SECRET)
FFN = Party(worker=WorkerId("ffn-0"), incarnation=1, secret=SECRET)
SESSION = SessionId(1)
HOP_BYTES = 8192
HOP_SIZES = SlotSizes(num_slots=2, call_bytes=HOP_BYTES, answer_bytes=HOP_BYTES)
HOP_WEIGHTS = FfnWeights(weights="none", num_layers=1, hidden_size=1, dtype="float32", deterministic=False)
ROUNDS = 3


class Hop(msgspec.Struct, kw_only=True):
    """Microseconds for a round trip."""

    transport: str
    code: str
    """Of the rings: compiled or Python."""
    waiting: str
    repeat: int
    p50: float
    p99: float
    best: float


class Steps(msgspec.Struct, kw_only=True):
    """Decode steps of one setup. Milliseconds, and shares of the time of the steps."""

    setup: str
    micro_batches: int
    batch: int
    step_ms: float
    tokens_per_second: float
    against_two_cores: float
    """Tokens a second, over those of one worker on both cores."""
    attention_bubble: float | None = None
    ffn_bubble: float | None = None
    exposed_hops: float | None = None
    hop_us: float | None = None
    """Exposed hops of one layer."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=30, help="of each round")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--micro-batches", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--context", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--round-trips", type=int, default=20_000)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    hops = [
        measure_hop(transport, code, spins, options.round_trips, cores)
        for transport, code in (("shm", "compiled"), ("shm", "Python"), ("tcp", "Python"))
        for spins in (True, False)
        if code == "Python" or compiled_rings() is not None
    ]
    for hop in hops:
        print(
            f"hop {hop.transport:4}{hop.code:9}{hop.waiting:9} p50 {hop.p50:7.1f} us  p99 {hop.p99:7.1f}  "
            f"best {hop.best:7.1f}"
        )
    figures = measure_steps(options, cores)
    report = {
        "benchmark": "afd",
        "options": {name: value for name, value in vars(options).items() if name != "out"},
        "commit": subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        ).stdout.strip(),
        "machine": msgspec.to_builtins(machine_facts()),
        "versions": versions(),
        "hops": msgspec.to_builtins(hops),
        "steps": msgspec.to_builtins(figures),
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n")


# -- the hop ----------------------------------------------------------------------------------------------------------


def measure_hop(transport: str, code: str, spins: bool, repeat: int, cores: Sequence[int]) -> Hop:
    """Round trips of 8 KiB, each copied in and out on both sides."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=echo, args=(theirs, code, spins, cores[-1]), daemon=True)
    process.start()
    os.sched_setaffinity(0, {cores[0]})
    address = msgspec.msgpack.decode(ours.recv_bytes(), type=PeerAddress)
    rings = compiled_rings() if code == "compiled" else None
    opening = Opening(session=SESSION, weights=HOP_WEIGHTS, sizes=HOP_SIZES)
    end, _ = dial_ffn(ATTENTION, address, transport, opening, rings)
    if not spins:
        repeat = max(200, repeat // 20)
    seconds = sorted(round_trips(end, Waiter(1.0 if spins else 0.0, rings), repeat))
    end.close()
    ours.send_bytes(b"end")
    process.join(10)
    os.sched_setaffinity(0, set(cores))
    return Hop(
        transport=transport,
        code=code,
        waiting="spinning" if spins else "asleep",
        repeat=repeat,
        p50=1e6 * seconds[len(seconds) // 2],
        p99=1e6 * seconds[len(seconds) * 99 // 100],
        best=1e6 * seconds[0],
    )


def round_trips(end: CallerEnd, waiter: Waiter, repeat: int) -> list[float]:
    rows = bytearray(os.urandom(HOP_BYTES))
    answer = memoryview(bytearray(HOP_BYTES))
    address = ctypes.addressof(ctypes.c_char.from_buffer(rows))
    taken: list[float] = []
    for number in range(repeat + 100):
        frame = CallFrame(FfnRequest(CallKey(SESSION, 1, 0, 0, number), ((Piece(0), 1),)), 1)
        started = time.perf_counter()
        slot = end.reserve()
        assert slot is not None
        end.post(slot, frame, HOP_BYTES, address)
        while not (arrived := end.poll()):
            waiter.wait([end], None)
        answer[:] = arrived[0].rows
        end.release(slot)
        taken.append(time.perf_counter() - started)
        assert answer == rows
    return taken[100:]


def echo(pipe: Connection, code: str, spins: bool, core: int) -> None:
    """The other side of a hop."""
    os.sched_setaffinity(0, {core})
    ends: list[CalleeEnd] = []
    rings = compiled_rings() if code == "compiled" else None
    waiter = Waiter(1.0 if spins else 0.0, rings)

    def greet(sock: socket.socket, one_sided: bool) -> None:
        ends.append(accept_ffn(FFN, sock, one_sided, Offer(weights=HOP_WEIGHTS, pieces=(Piece(0),)), rings))
        waiter.nudge()

    listener = Listener(me=FFN.worker, bind_host="127.0.0.1", advertise_host=None, shares_memory=True)
    pipe.send_bytes(msgspec.msgpack.encode(address_of(listener)))
    listener.start(greet)
    while waiter.wait(ends, time.monotonic() + 1.0) or not pipe.poll():  # a look at the pipe takes as long as a hop
        for end in ends:
            try:
                calls = end.poll()
            except Exception:
                return
            for call in calls:
                end.answer_buffer(call.slot)[:] = call.rows
                end.answer(call.slot, FfnReply(call.frame.request.key), HOP_BYTES)


def address_of(listener: Listener) -> PeerAddress:
    return PeerAddress(
        worker=FFN.worker,
        incarnation=1,
        host_id=host_id(),
        unix_name=listener.unix_name,
        host=listener.host,
        port=listener.port,
        layout_digest=PROTOCOL,
    )


# -- steps ------------------------------------------------------------------------------------------------------------


def plan(topology: str, worker: str, options: argparse.Namespace, *changes: str) -> WorkerPlan:
    told = (f"model.dtype={options.dtype}", "model.max_context=1024", "pools.aggregated.memory=512 MiB", *changes)
    deployment = resolve(topology=topology, overrides=[parse_override(change) for change in told])
    placement = place(deployment, read_machine(), locate(deployment.model).arch)
    return next(found for found in placement.workers if found.name == worker)


def measure_steps(options: argparse.Namespace, cores: Sequence[int]) -> list[Steps]:
    figures: list[Steps] = []
    for setup, threads in (("whole, two cores", 2), ("whole, one core", 1)):
        os.sched_setaffinity(0, set(cores[:threads]))
        executor, *_ = build_executor(plan("1agg", "aggregated-0", options, f"pools.aggregated.threads={threads}"))
        for batch in options.batches:
            seconds = median_step(executor, batch, options)
            figures.append(figure(setup, 1, batch, seconds, figures))
        del executor
    for micro_batches in options.micro_batches:
        figures += split_steps(micro_batches, options, cores, figures)
    os.sched_setaffinity(0, set(cores))
    return figures


def figure(setup: str, micro_batches: int, batch: int, step_seconds: float, before: list[Steps]) -> Steps:
    rate = batch / step_seconds
    whole = next((f.tokens_per_second for f in before if f.setup == "whole, two cores" and f.batch == batch), rate)
    made = Steps(
        setup=setup,
        micro_batches=micro_batches,
        batch=batch,
        step_ms=1e3 * step_seconds,
        tokens_per_second=rate,
        against_two_cores=rate / whole,
    )
    print(
        f"{setup:24} m={micro_batches} batch {batch:3}  step {made.step_ms:7.2f} ms  {rate:7.1f} tokens/s  "
        f"{made.against_two_cores:.2f} of two cores",
        flush=True,
    )
    return made


def split_steps(
    micro_batches: int, options: argparse.Namespace, cores: Sequence[int], before: list[Steps]
) -> list[Steps]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    change = f"pools.aggregated.ffn.micro_batches={micro_batches}"
    ffn_plan = msgspec.msgpack.encode(plan("1a1f", "ffn-0", options, change))
    process = context.Process(target=serve_ffn, args=(theirs, ffn_plan, cores[-1]), daemon=True)
    process.start()
    address = msgspec.msgpack.decode(ours.recv_bytes(), type=PeerAddress)
    os.sched_setaffinity(0, {cores[0]})
    attention = plan("1a1f", "aggregated-0", options, change)
    executor, _, source = build_executor(attention)
    assert attention.hop is not None
    up = threading.Event()

    def report(_worker: WorkerId, _transport: str, problem: str | None) -> None:
        if problem is None:
            up.set()

    source.open_remote(attention.hop, ATTENTION, report)
    source.switch(remote=True)
    source.connect(address, "shm")
    assert up.wait(30), "no link came up"
    num_layers = executor.layout.num_layers
    figures = []
    for batch in options.batches:
        if batch < micro_batches:
            continue
        rounds = []
        running = prompts(executor, batch, options)
        for _ in range(ROUNDS):
            hop_before, busy_before = source.counts(), ask(ours)
            seconds = decode(executor, running, options.steps)
            hop, busy = source.counts(), ask(ours)
            waited = hop["exposed_seconds"] - hop_before["exposed_seconds"]
            rounds.append((sum(seconds), waited, busy - busy_before))
        elapsed, waited, busy = sorted(rounds)[len(rounds) // 2]
        made = figure("split", micro_batches, batch, elapsed / options.steps, before)
        made.attention_bubble, made.ffn_bubble = waited / elapsed, 1.0 - busy / elapsed
        explained = busy if micro_batches == 1 else max(0.0, busy - (elapsed - waited))
        made.exposed_hops = max(0.0, waited - explained) / elapsed
        made.hop_us = 1e6 * made.exposed_hops * elapsed / options.steps / num_layers
        print(
            f"{'':24} bubbles: attention {made.attention_bubble:.0%}, FFN {made.ffn_bubble:.0%}; exposed hops "
            f"{made.exposed_hops:.0%} ({made.hop_us:.0f} us a layer)",
            flush=True,
        )
        figures.append(made)
    source.close()
    ours.send_bytes(b"end")
    process.join(10)
    return figures


def serve_ffn(pipe: Connection, raw: bytes, core: int) -> None:
    """The FFN worker's process: answers calls, and tells how long it has computed."""
    os.sched_setaffinity(0, {core})
    told = msgspec.msgpack.decode(raw, type=WorkerPlan)
    assert told.share is not None
    service = FfnService(
        FFN,
        build_ffn(told),
        max_wait_seconds=told.share.max_wait_seconds,
        max_rows=told.share.max_rows,
        spin_seconds=told.spin_seconds,
    )
    service.start()
    pipe.send_bytes(msgspec.msgpack.encode(service.address))
    while pipe.recv_bytes() != b"end":
        pipe.send_bytes(msgspec.msgpack.encode(service.served.busy_seconds))
    service.close()


def ask(pipe: Connection) -> float:
    pipe.send_bytes(b"busy")
    return msgspec.msgpack.decode(pipe.recv_bytes(), type=float)


class Running:
    """A request that decodes."""

    def __init__(self, number: int, blocks: list[int], context: int, num_outputs: int) -> None:
        tokens = [(number * 7919 + place * 104_729) % 40_000 + 100 for place in range(context)]
        self.request = Request(RequestId(number), context, num_outputs, Sampling(temperature=0.0), tuple(tokens))
        self.tokens = tokens
        self.blocks = blocks
        self.num_computed = 0

    def chunk(self, num_tokens: int) -> Chunk:
        samples = self.num_computed + num_tokens == len(self.tokens)
        num_outputs = len(self.tokens) - self.request.num_prompt_tokens
        return Chunk(self.request, self.num_computed, num_tokens, self.tokens, self.blocks, samples, num_outputs)


def prompts(executor: TorchExecutor, batch: int, options: argparse.Namespace) -> list[Running]:
    """Requests whose prompts are in the cache, each with its first token."""
    num_outputs = ROUNDS * options.steps + 2
    per_request = -(-(options.context + num_outputs) // executor.layout.block_size)
    running = []
    for number in range(batch):
        low = number * per_request
        assert low + per_request <= executor.num_blocks, "the cache is too small: fewer steps, batches or tokens"
        one = Running(number, list(range(low, low + per_request)), options.context, num_outputs)
        advance(executor, [one], options.context)
        running.append(one)
    return running


def advance(executor: TorchExecutor, running: list[Running], num_tokens: int) -> float:
    chunks = tuple(one.chunk(num_tokens) for one in running)
    done = executor.run_step(RunStep(1, chunks), lambda _low, _high: None)
    drawn = {sampled.request: sampled.token for sampled in done.sampled}
    for one in running:
        one.num_computed += num_tokens
        one.tokens.append(drawn[one.request.id])
    return done.seconds


def decode(executor: TorchExecutor, running: list[Running], num_steps: int) -> list[float]:
    return [advance(executor, running, 1) for _ in range(num_steps)]


def median_step(executor: TorchExecutor, batch: int, options: argparse.Namespace) -> float:
    running = prompts(executor, batch, options)
    rounds = [sum(decode(executor, running, options.steps)) for _ in range(ROUNDS)]
    return statistics.median(rounds) / float(options.steps)


if __name__ == "__main__":
    main()
