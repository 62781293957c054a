"""Experts that are not chosen evenly: what a step of a split over experts then takes, with copies of hot ones or not.

Rows choose their experts by chance, weighted by how hot each is; the shipped `ExpertMap` places them, the shipped
`FfnClient` chooses among the owners of a hot one, and the step is played event by event. An FFN worker takes as long as
the cost model says of a worker to whom chance gives as many rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from transload.control.expert_map import build_expert_map
from transload.control.ffn_messages import CallName, FfnRequest, Piece, Wanted
from transload.hardware.afd.pipeline import Hop, Pipeline
from transload.hardware.afd.stages import SplitWorker
from transload.hardware.cost.plan import Experts, busiest_assignments
from transload.runtime.ffn_step import FfnRules, play_step

PATIENT = FfnRules(timeout_seconds=1e9, deadline_seconds=1e9)


class SkewedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step of attention workers whose calls come as one."""

    seconds: float
    busiest: float
    """Rows of the busiest FFN worker over the mean, over all calls."""
    experts_held: int
    """Of one layer, by the FFN worker that has most of them."""


def zipf_loads(num_experts: int, exponent: float, seed: int = 0) -> list[float]:
    """How often experts are chosen: the n-th hottest by 1 / n^exponent; 0: evenly. Sum 1, in the order of chance."""
    heat = 1.0 / np.arange(1, num_experts + 1) ** exponent
    return [float(each) for each in np.random.default_rng(seed).permutation(heat / heat.sum())]


def skewed_step(
    worker: SplitWorker,
    num_rows: int,
    context_tokens: float,
    *,
    attention_workers: int,
    ffn_workers: int,
    loads: Sequence[float],
    knows_loads: bool = True,
    num_replicas: int = 0,
    micro_batches: int = 2,
    num_layers: int | None = None,
    seed: int = 0,
) -> SkewedStep:
    """`worker` is split by expert, over `ffn_workers` of one chip each; `num_rows` decode in the step of each of
    `attention_workers`, whose calls come as one. `knows_loads`: experts are placed by how hot they are; else as if all
    were alike. `num_replicas`: copies of experts in each layer beside one of each. `num_layers`: only so many
    are played."""
    card = worker.card
    assert worker.split == "expert", worker.split
    assert card.experts is not None, card.id
    known = [loads] if knows_loads else None
    table = build_expert_map([len(loads)], ffn_workers, loads=known, num_replicas=num_replicas)
    owners = [frozenset(Piece(expert) for expert in table.experts_of(each, 0)) for each in range(ffn_workers)]
    pipeline = worker.pipeline(
        num_rows,
        context_tokens,
        attention_workers=attention_workers,
        ffn_workers=ffn_workers,
        micro_batches=micro_batches,
    )
    if num_layers is not None:
        layer = msgspec.structs.replace(pipeline.layers[0], count=num_layers)
        pipeline = msgspec.structs.replace(pipeline, layers=(layer,))
    rows = -(-num_rows // pipeline.micro_batches) * attention_workers
    choices = _Choices(loads, rows, card.experts.per_token, seed)
    seconds = _Seconds(worker, ffn_workers)
    done = np.zeros(ffn_workers)

    def batch(server: int, requests: Sequence[FfnRequest]) -> float:
        count = sum(rows for request in requests for _, rows in request.pieces)
        done[server] += count
        return seconds.of(count)

    played = play_step(as_one(pipeline), PATIENT, owners=owners, wanted=choices.of, batch_seconds=batch, rows=rows)
    assert played.problems == (None,), played.problems
    return SkewedStep(
        seconds=played.seconds[0],
        busiest=float(done.max() / done.mean()),
        experts_held=max(len(pieces) for pieces in owners),
    )


def as_one(pipeline: Pipeline) -> Pipeline:
    """With one attention worker that sends for all: they do the same at the same time."""

    def all_of(hop: Hop) -> Hop:
        count = pipeline.attention_workers
        return msgspec.structs.replace(
            hop, ffn_port_seconds=hop.ffn_port_seconds * count, shared_seconds=hop.shared_seconds * count
        )

    layers = tuple(
        msgspec.structs.replace(layer, out=all_of(layer.out), back=all_of(layer.back)) for layer in pipeline.layers
    )
    return msgspec.structs.replace(pipeline, layers=layers, attention_workers=1)


class _Choices:
    """Which experts the rows of each call choose: drawn once a call, whoever computes it."""

    def __init__(self, loads: Sequence[float], num_rows: int, per_token: int, seed: int) -> None:
        self._heat, self._num_rows, self._per_token = np.log(np.asarray(loads)), num_rows, per_token
        self._seed = seed
        self._drawn: dict[CallName, Wanted] = {}

    def of(self, call: CallName) -> Wanted:
        found = self._drawn.get(call)
        if found is None:
            random = np.random.default_rng((self._seed, call.step, call.layer, call.micro_batch))
            # The largest of heat plus Gumbel noise: a draw of distinct experts with these weights.
            keys = self._heat + random.gumbel(size=(self._num_rows, len(self._heat)))
            chosen = np.argpartition(-keys, self._per_token - 1, axis=1)[:, : self._per_token]
            counts = np.bincount(chosen.ravel(), minlength=len(self._heat))
            found = tuple((Piece(int(expert)), int(counts[expert])) for expert in np.flatnonzero(counts))
            self._drawn[call] = found
        return found


class _Seconds:
    """A layer's feed-forward at one of the FFN workers, for so many rows times experts."""

    def __init__(self, worker: SplitWorker, ffn_workers: int) -> None:
        self._worker, self._ffn_workers = worker, ffn_workers
        experts = worker.ffn_plan(ffn_workers).experts
        assert experts is not None
        self._experts: Experts = experts
        self._known: dict[int, float] = {}

    def of(self, num_assignments: int) -> float:
        """The cost model answers for rows in all and adds what chance gives the busiest of its ranks: this is its
        answer for the number of rows whose busiest rank has these."""
        found = self._known.get(num_assignments)
        if found is None:
            low, high = 0.0, num_assignments * float(self._ffn_workers)
            for _ in range(40):
                middle = (low + high) / 2
                is_more = busiest_assignments(self._experts, middle) < num_assignments
                low, high = (middle, high) if is_more else (low, middle)
            rows = max(1, round(high))
            found = self._worker.ffn_layer_seconds(rows, self._ffn_workers, direct=True)
            self._known[num_assignments] = found
        return found
