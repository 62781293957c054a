"""What the front end knows of FFN workers: how often experts are chosen goes into the plans of new ones."""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec

from tests.model.stepping import arch_of
from tests.model.tiny_models import tiny_model
from transload.arch import ModelArch
from transload.control.messages import WorkerId
from transload.deploy.machine import read_machine
from transload.deploy.overrides import parse_override
from transload.deploy.placement import place
from transload.deploy.plan import WorkerPlan
from transload.deploy.resolve import resolve
from transload.model.ffn_pieces import piece_stride, pieces_of
from transload.runtime.ffn_pools import FfnPools
from transload.runtime.remote import RemoteWorker
from transload.runtime.wire import FfnCounted


class Said(msgspec.Struct):
    """As much of a worker as is asked for here."""

    name: WorkerId


def plans_of(arch: ModelArch) -> dict[WorkerId, WorkerPlan]:
    changes = ("pools.decode.ffn.split=expert", "pools.decode.ffn.replicas=1")
    deployment = resolve(topology="1p2a2f", overrides=[parse_override(change) for change in changes])
    return {WorkerId(plan.name): plan for plan in place(deployment, read_machine(), arch).workers}


def test_copies_are_of_the_experts_that_attention_workers_choose_most() -> None:
    arch = arch_of(tiny_model("mixtral"))
    assert arch.experts is not None
    plans, count, stride = plans_of(arch), arch.experts.num_experts, piece_stride(arch)
    pools = FfnPools(plans, {}, restart=lambda *_: None, changed=asyncio.Event(), counted=lambda *_: None)
    cold = tuple(tuple(1 for _ in range(count)) for _ in range(arch.num_layers))

    def hot(expert: int) -> tuple[tuple[int, ...], ...]:
        return tuple(tuple(50 if number == expert else 1 for number in range(count)) for _ in range(arch.num_layers))

    def copied() -> set[int]:
        owned = []
        for name in (WorkerId("ffn-0"), WorkerId("ffn-1")):
            share = pools.with_loads(plans[name]).share
            assert share is not None
            owned.append(pieces_of(share, arch))
        return {piece % stride for piece in owned[0] & owned[1]}

    def say(worker: str, loads: tuple[tuple[int, ...], ...]) -> None:
        pools.said(cast("RemoteWorker", Said(WorkerId(worker))), FfnCounted({}, (), loads))

    before = plans[WorkerId("ffn-0")]
    assert pools.with_loads(before) is before
    say("prefill-0", hot(0))
    assert pools.with_loads(before) is before
    say("decode-0", cold)
    say("decode-1", hot(count - 1))
    assert copied() == {count - 1}
    say("decode-1", hot(1))
    assert copied() == {1}
