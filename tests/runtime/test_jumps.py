"""Going through many steps of a batch at once gives what going step by step gives: every token, every time, to the bit,
and everything that any machine is told, whatever else goes wrong."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

import msgspec
import pytest

from tests.schedules import FaultyWires, draw_rates
from tests.world import ROLES, expected_token
from transload.control.controller import ControllerConfig
from transload.control.engine import EngineConfig
from transload.control.messages import (
    Chunk,
    Emitted,
    Finish,
    Load,
    Message,
    Prefill,
    Reject,
    ReportTokens,
    Request,
    RequestId,
    Reserved,
    Sampling,
    StepDone,
    Stream,
    WorkerId,
)
from transload.control.prefix import prompt_keys
from transload.runtime.cluster import VirtualWorker, faithful
from transload.runtime.cost import LinearCost
from transload.runtime.decode_run import DecodeRun
from transload.runtime.flows import Port, Wire
from transload.runtime.virtual import VirtualRuntime

NUM_SEEDS = 120


class SharedPorts(LinearCost, frozen=True, kw_only=True):
    """One port for each end of all wires, so that transfers slow each other down."""

    ports: dict[str, Port]

    def wire(self, source: WorkerId, target: WorkerId) -> Wire:
        ends = (f"out {source}", f"in {target}")
        ports = [self.ports.setdefault(end, Port(self.link_bytes_per_second)) for end in ends]
        return Wire(ports, self.link_latency_seconds)


def without_block_names(event: Message) -> Message:
    """Who takes blocks for many steps at once takes others of the free ones: their number counts, not their names."""
    if isinstance(event, Reserved | Prefill):
        grant = msgspec.structs.replace(event.grant, blocks=(len(event.grant.blocks),))
        return msgspec.structs.replace(event, grant=grant)
    return event


class Everything:
    """Notes all that can be told apart from outside."""

    def __init__(self) -> None:
        self.tokens: list[tuple[RequestId, int, int, float]] = []
        self.ends: list[tuple[float, Finish | Reject]] = []
        self.told: list[tuple[float, WorkerId, Message]] = []
        self.made: dict[WorkerId, list[tuple[RequestId, int, int, int, str | None]]] = {}
        self.num_steps = 0
        self.num_step_events = 0
        self.num_loads = 0

    def stream(self, command: Stream, times: Sequence[float]) -> None:
        token = command.token
        tokens = (token.token, *token.more)
        assert len(tokens) == len(times)
        self.tokens += [(token.request, token.index + i, tokens[i], times[i]) for i in range(len(tokens))]

    def finish(self, command: Finish, now: float) -> None:
        self.ends.append((now, command))

    def reject(self, command: Reject, now: float) -> None:
        self.ends.append((now, command))

    def observe(self, now: float, who: WorkerId, event: Message) -> None:
        match event:
            case Emitted(worker, tokens):
                made = self.made.setdefault(worker, [])
                for token in tokens:
                    every = (token.token, *token.more)
                    for i, value in enumerate(every):
                        finish = token.finish if i == len(every) - 1 else None
                        made.append((token.request, token.epoch, token.index + i, value, finish))
            case StepDone():
                self.num_steps += event.count
                self.num_step_events += 1
            case ReportTokens():
                pass  # asked by whoever jumps
            case _:
                self.num_loads += isinstance(event, Load) and event.step_seconds > 0
                self.told.append((now, who, without_block_names(event)))


def play(seed: int, *, jumps: bool) -> Everything:
    random = Random(f"jumps/{seed}")
    names = random.choice(("p0 d0", "p0 p1 d0", "p0 d0 d1", "a0", "a0 p0 d0")).split()
    one_sided = random.random() < 0.5
    seen = Everything()
    blocks, hold = random.choice((16, 40, 300)), random.choice((0, 7, 256))
    workers = [
        VirtualWorker(
            engine=EngineConfig(
                worker=WorkerId(name),
                num_blocks=blocks,
                block_size=4,
                num_layers=4,
                cell_bytes=random.choice((1024, 100_000)),
                namespace=b"jumps",
                max_batch=random.choice((2, 8)),
                step_tokens=random.choice((8, 64)),
                lease_seconds=1.0,
                run_steps=random.choice((1, 32, 32)),
                hold_tokens=hold if jumps else 0,
            ),
            pool=ROLES[name[0]],
            role=ROLES[name[0]],
            layers_per_frame=2,
            one_sided=one_sided,
        )
        for name in names
    ]
    runtime = VirtualRuntime(
        ControllerConfig(
            local_prefill=random.choice(("auto", "fallback")),
            policy=random.choice(("estimate", "round_robin", "least_loaded")),
        ),
        workers,
        SharedPorts(
            load_seconds=0.5, link_bytes_per_second=random.choice((5e9, 1e7)), link_latency_seconds=1e-5, ports={}
        ),
        seen,
        draw_token=expected_token,
        frame_fault=(
            FaultyWires(random, draw_rates(random), one_sided=one_sided) if random.random() < 0.5 else faithful
        ),
        observe=seen.observe,
        jumps=jumps,
    )
    plan = Random(f"load/{seed}")
    for number in range(1, plan.randint(2, 12)):
        at_seconds = 1 + plan.random() * plan.choice((0.0, 0.3, 3.0))
        runtime.submit(at_seconds, ask(number, plan))
        if plan.random() < 0.2:
            runtime.cancel(at_seconds + plan.random(), RequestId(number))
    for _ in range(plan.choice((0, 0, 1, 2))):
        disturb(runtime, plan, WorkerId(plan.choice(names)), 1 + plan.random() * 2)
    runtime.run(until=3600)
    return seen


def ask(number: int, plan: Random) -> Request:
    prompt = [plan.randint(0, 2), *range(plan.randint(0, 30))]
    is_counted = plan.random() < 0.5  # only counted: its tokens are nobody's business
    request = Request(
        RequestId(number),
        len(prompt),
        plan.randint(1, 60),
        Sampling(),
        () if is_counted else tuple(prompt),
        prompt_keys(b"jumps", prompt, 4),
        plan.choice((1.0, 600.0)),
    )
    if plan.random() < 0.2:
        stop = Sampling(stop_ids=(expected_token(request, plan.randrange(request.max_tokens)),))
        return msgspec.structs.replace(request, sampling=stop)
    return request


def disturb(runtime: VirtualRuntime, plan: Random, worker: WorkerId, at_seconds: float) -> None:
    match plan.choice(("kill", "pause", "lose", "clock", "link")):
        case "kill":
            runtime.kill(at_seconds, worker)
        case "pause":
            runtime.pause(at_seconds, worker, plan.choice((0.05, 0.5, 2.0)))
        case "lose":
            runtime.lose(at_seconds, worker, lingers_seconds=plan.random())
        case "clock":
            runtime.shift_clock(at_seconds, worker, plan.choice((-3600.0, 3600.0)))
        case _:
            runtime.scale_link(at_seconds, "prefill", "decode", 0.1)
            runtime.scale_link(at_seconds + 1, "prefill", "decode", 1.0)


@pytest.mark.parametrize("seed", range(NUM_SEEDS))
def test_a_run_that_jumps_is_the_run_that_steps(seed: int) -> None:
    stepped, jumped = play(seed, jumps=False), play(seed, jumps=True)
    assert jumped.ends == stepped.ends
    assert sorted(jumped.tokens) == sorted(stepped.tokens)
    for worker, made in jumped.made.items():
        assert set(made) <= set(stepped.made[worker])  # not all: nobody needs those of a request that is gone
    assert jumped.told == stepped.told
    assert jumped.num_steps == stepped.num_steps
    assert stepped.num_step_events == stepped.num_steps


def test_most_steps_are_jumped_over() -> None:
    jumped = [play(seed, jumps=True) for seed in range(60)]
    assert sum(run.num_step_events for run in jumped) < 0.75 * sum(run.num_steps for run in jumped)


def test_steps_of_a_batch_end_where_the_cost_of_each_says() -> None:
    cost = LinearCost()
    line = cost.decode_line(WorkerId("d0"), 3)
    assert line is not None
    run = DecodeRun(1.0, *line, 300, 3)
    at = 1.0
    for number in range(1, 200):
        lengths = [98 + number] * 3
        chunks = [Chunk(Request(RequestId(1), 1, 1), length, 1, (), (), True, 1) for length in lengths]
        at += cost.step_seconds(WorkerId("d0"), chunks)
        assert run.end(number) == pytest.approx(at, abs=1e-6)
    run.num_planned = 150
    assert run.num_ended(run.end(70)) == 70
    assert run.num_ended(run.end(71) - 1e-9) == 70
    assert run.num_ended(1e9) == 150
