"""One decode step of an attention/FFN split, from stage times: closed form, bubbles, and how much of the hops shows.

Knows no chips and no models, only seconds. `events.py` plays the same pipeline event by event and is the authority;
a property test holds the two together.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Split = Literal["replica", "column", "expert"]
"""How several FFN workers share the work. replica: each serves some attention workers with whole FFNs. column and
expert: each holds a part of every layer's FFN, so that a call goes to all of them."""
Bound = Literal["attention", "ffn", "out", "back", "latency"]
"""What a step waits for. out, back: the bytes on the way to the FFN side and home. latency: one micro-batch's round
trip, because there are too few micro-batches to fill it."""
NonNegative = Annotated[float, Meta(ge=0.0)]


class Hop(msgspec.Struct, frozen=True, kw_only=True):
    """One direction between the two sides, for one micro-batch of one attention worker. Seconds."""

    latency_seconds: NonNegative = 0.0
    """From the last byte sent to the last byte there; overlaps with anything."""
    attention_port_seconds: NonNegative = 0.0
    """Bytes of the call over the rate of the attention worker's port."""
    ffn_port_seconds: NonNegative = 0.0
    """Bytes that one FFN worker gets of it over the rate of that worker's port."""
    shared_seconds: NonNegative = 0.0
    """Bytes of the call over the rate of what all workers share (a spine); 0: nothing is shared."""


class LayerTimes(msgspec.Struct, frozen=True, kw_only=True):
    """A run of equal layers. Seconds for one micro-batch."""

    attention_seconds: NonNegative
    ffn_seconds: NonNegative
    """One merged call of a whole cohort at one FFN worker."""
    out: Hop = Hop()
    back: Hop = Hop()
    count: Annotated[int, Meta(ge=1)] = 1


class Pipeline(msgspec.Struct, frozen=True, kw_only=True):
    """M attention workers, N FFN workers, m micro-batches each, and how long each stage takes."""

    layers: tuple[LayerTimes, ...]
    micro_batches: Annotated[int, Meta(ge=1)] = 2
    attention_workers: Annotated[int, Meta(ge=1)] = 1
    ffn_workers: Annotated[int, Meta(ge=1)] = 1
    split: Split = "replica"
    tail_seconds: NonNegative = 0.0
    """After the last layer: output head, sampling, and what the engine adds to a step."""

    @property
    def num_layers(self) -> int:
        return sum(layer.count for layer in self.layers)

    @property
    def cohort_size(self) -> int:
        """Attention workers whose calls one FFN worker merges, at the worker that has the most of them."""
        if self.split != "replica":
            return self.attention_workers
        return math.ceil(self.attention_workers / self.ffn_workers)

    @property
    def replicas(self) -> int:
        """FFN workers that take turns with one attention worker's micro-batches: N / M where N is larger."""
        if self.split != "replica":
            return 1
        return max(1, self.ffn_workers // self.attention_workers)

    @property
    def is_even(self) -> bool:
        """Whether all layers are alike, and an attention worker's micro-batches are dealt out evenly to FFN workers."""
        return len(self.layers) == 1 and (
            self.replicas >= self.micro_batches or self.micro_batches % self.replicas == 0
        )

    @property
    def parts(self) -> int:
        """FFN workers that one micro-batch goes to at once."""
        return 1 if self.split == "replica" else self.ffn_workers


class StepReport(msgspec.Struct, frozen=True, kw_only=True):
    """What a step takes and where its time goes. Shares are of the step's elapsed time."""

    step_seconds: float
    attention_busy: float
    """Share of the step that the attention workers compute, their mean."""
    ffn_busy: float
    exposed_hop_seconds: float
    """What the step would be shorter by if bytes crossed in no time."""
    fill_seconds: float
    """Spent filling and draining: the step less its tail and less what its layers take in the steady state."""
    bound: Bound

    @property
    def attention_bubble(self) -> float:
        return 1.0 - self.attention_busy

    @property
    def ffn_bubble(self) -> float:
        return 1.0 - self.ffn_busy

    @property
    def exposed_share(self) -> float:
        return self.exposed_hop_seconds / self.step_seconds if self.step_seconds else 0.0


class _Loads(msgspec.Struct, frozen=True):
    """Seconds that one layer keeps each resource busy: in all, and what comes after the first micro-batch."""

    total: dict[Bound, float]
    chain: dict[Bound, float]


def _loads(pipeline: Pipeline, layer: LayerTimes) -> _Loads:
    m, cohort = pipeline.micro_batches, pipeline.cohort_size
    turns = math.ceil(m / pipeline.replicas)  # micro-batches of one attention worker that one FFN worker gets
    total: dict[Bound, float] = {"attention": m * layer.attention_seconds, "ffn": turns * layer.ffn_seconds}
    chain: dict[Bound, float] = {
        "attention": (m - 1) * layer.attention_seconds,
        "ffn": (turns - 1) * layer.ffn_seconds,
    }
    sides: tuple[tuple[Bound, Hop], ...] = (("out", layer.out), ("back", layer.back))
    for name, hop in sides:
        ports = (
            (m, hop.attention_port_seconds),
            (turns, cohort * hop.ffn_port_seconds),
            (m, pipeline.attention_workers * hop.shared_seconds),
        )
        total[name] = max(times * seconds for times, seconds in ports)
        chain[name] = max((times - 1) * seconds for times, seconds in ports)
    return _Loads(total, chain)


def _out(pipeline: Pipeline, hop: Hop, calls: int, *, all_parts: bool) -> float:
    """Until the last of `calls` that start together is through the ports: all its parts, or the first of them."""
    parts = pipeline.parts
    one = hop.attention_port_seconds / parts
    earlier = (parts - 1) * one if all_parts else 0.0
    spine = calls * hop.shared_seconds / (1 if all_parts else parts)
    return max(earlier + max(one, calls * hop.ffn_port_seconds), spine)


def _back(pipeline: Pipeline, hop: Hop, calls: int, *, all_parts: bool) -> float:
    """Until the last of `calls` that are done together is home: one FFN worker sends their results in order, and each
    attention worker takes in all parts of its own, or only the last that comes."""
    parts = 1 if all_parts else pipeline.parts
    taking_in = max(hop.attention_port_seconds / parts, hop.ffn_port_seconds)
    return max((calls - 1) * hop.ffn_port_seconds + taking_in, calls * hop.shared_seconds / parts)


def _ports(pipeline: Pipeline, out: Hop, back: Hop, calls_out: int, calls_back: int) -> float:
    """Time in ports out and back. Parts that left one after the other come back so, and do not queue a second time."""
    return max(
        _out(pipeline, out, calls_out, all_parts=True) + _back(pipeline, back, calls_back, all_parts=False),
        _out(pipeline, out, calls_out, all_parts=False) + _back(pipeline, back, calls_back, all_parts=True),
    )


def _ports_of_a_round(pipeline: Pipeline, layer: LayerTimes) -> float:
    """Time in ports of one micro-batch from the FFN's result to its next call, latency left out.

    Results leave the FFN worker's port one after the other, so the attention workers start apart, and their next calls
    do not queue at that port as they would if all came at once: of the two directions only one is paid in full.
    """
    size = pipeline.cohort_size
    return max(
        _ports(pipeline, layer.out, layer.back, 1, size),
        _ports(pipeline, layer.out, layer.back, size, 1),
    )


def _round(pipeline: Pipeline, layer: LayerTimes) -> float:
    """Seconds of one micro-batch through one layer when nothing else is on its way."""
    latency = layer.out.latency_seconds + layer.back.latency_seconds
    return layer.attention_seconds + layer.ffn_seconds + latency + _ports_of_a_round(pipeline, layer)


def layer_period(pipeline: Pipeline, layer: LayerTimes) -> tuple[float, Bound]:
    """Seconds that every further layer of this kind adds to a step, and what they are bound by.

    The critical cycle of the pipeline as a marked graph: a micro-batch's round trip, or all micro-batches through the
    busiest resource, whichever is longer.
    """
    loads = _loads(pipeline, layer).total
    busiest = max(loads, key=lambda name: loads[name])
    around = _round(pipeline, layer)
    return (around, "latency") if around > loads[busiest] else (loads[busiest], busiest)


def step_seconds(pipeline: Pipeline) -> float:
    """Seconds of a step. Closed form where all layers are alike and all FFN workers get as many micro-batches."""
    if not pipeline.is_even:
        return _step_layer_by_layer(pipeline)
    layer = pipeline.layers[0]
    through = layer.attention_seconds + layer.ffn_seconds + layer.out.latency_seconds + layer.back.latency_seconds
    through += _ports(pipeline, layer.out, layer.back, pipeline.cohort_size, pipeline.cohort_size)
    # All FFN workers' cohorts start at once, and only later find turns on what they share.
    others = pipeline.attention_workers - pipeline.cohort_size
    through += others * max(layer.out.shared_seconds, layer.back.shared_seconds)
    behind = max(_loads(pipeline, layer).chain.values())
    return through + behind + (layer.count - 1) * layer_period(pipeline, layer)[0] + pipeline.tail_seconds


def _step_layer_by_layer(pipeline: Pipeline) -> float:
    """Every micro-batch through every layer, each resource taking them in turn (the max-plus recurrence).

    One attention worker and its FFN worker stand for all: the others do the same at the same time.
    """
    m, size, replicas = pipeline.micro_batches, pipeline.cohort_size, pipeline.replicas
    ready = [0.0] * m
    attention = sending = returning = 0.0
    ffn = [0.0] * replicas
    for layer in pipeline.layers:
        home = _back(pipeline, layer.back, size, all_parts=True)
        away = _ports_of_a_round(pipeline, layer) - home
        loads = _loads(pipeline, layer).total
        for _ in range(layer.count):
            for j in range(m):
                attention = max(ready[j], attention) + layer.attention_seconds
                start = max(attention, sending)
                sending = start + loads["out"] / m
                server = j % replicas
                there = start + away + layer.out.latency_seconds
                ffn[server] = max(there, ffn[server]) + layer.ffn_seconds
                start = max(ffn[server], returning)
                returning = start + loads["back"] / m
                ready[j] = start + home + layer.back.latency_seconds
    return max(ready) + pipeline.tail_seconds


class StepCurve(msgspec.Struct, frozen=True, kw_only=True):
    """A step as a function of its attention side alone: all layers alike, everything else as it is.

    The closed form is a few straight lines and the largest of them, so that a step whose context has grown costs next
    to nothing to tell.
    """

    fixed_seconds: float
    """Of the first micro-batch's way through one layer, and the tail."""
    behind_seconds: float
    """What other resources do after their first micro-batch."""
    around_seconds: float
    """A micro-batch's round trip less its attention."""
    busiest_seconds: float
    """Per layer, of the busiest resource that is not attention."""
    micro_batches: int
    num_layers: int

    def step_seconds(self, attention_seconds: float) -> float:
        """The step, for attention seconds of one layer and micro-batch."""
        all_of_them = self.micro_batches * attention_seconds
        behind = max(self.behind_seconds, all_of_them - attention_seconds)
        period = max(self.around_seconds + attention_seconds, all_of_them, self.busiest_seconds)
        return self.fixed_seconds + attention_seconds + behind + (self.num_layers - 1) * period


def step_curve(pipeline: Pipeline) -> StepCurve | None:
    """None where there is no closed form (see `step_seconds`)."""
    if not pipeline.is_even:
        return None
    layer = msgspec.structs.replace(pipeline.layers[0], attention_seconds=0.0)
    idle = msgspec.structs.replace(pipeline, layers=(layer,))
    loads = _loads(idle, layer)
    behind = max(loads.chain.values())
    alone = step_seconds(msgspec.structs.replace(idle, layers=(msgspec.structs.replace(layer, count=1),)))
    return StepCurve(
        fixed_seconds=alone - behind,
        behind_seconds=behind,
        around_seconds=_round(idle, layer),
        busiest_seconds=max(loads.total.values()),
        micro_batches=pipeline.micro_batches,
        num_layers=layer.count,
    )


def without_hops(pipeline: Pipeline) -> Pipeline:
    """The same with bytes that cross in no time."""
    layers = [msgspec.structs.replace(layer, out=Hop(), back=Hop()) for layer in pipeline.layers]
    return msgspec.structs.replace(pipeline, layers=tuple(layers))


def report(pipeline: Pipeline) -> StepReport:
    """The closed form's answer for a step. 4 us a layer kind: cheap enough for a search."""
    elapsed = step_seconds(pipeline)
    turns = math.ceil(pipeline.micro_batches / pipeline.replicas)
    attention = sum(layer.count * layer.attention_seconds for layer in pipeline.layers) * pipeline.micro_batches
    ffn = sum(layer.count * layer.ffn_seconds for layer in pipeline.layers) * turns
    steady = sum(layer.count * layer_period(pipeline, layer)[0] for layer in pipeline.layers)
    most = max(pipeline.layers, key=lambda layer: layer.count * layer_period(pipeline, layer)[0])
    attention += pipeline.tail_seconds
    return StepReport(
        step_seconds=elapsed,
        attention_busy=attention / elapsed if elapsed else 0.0,
        ffn_busy=ffn / elapsed if elapsed else 0.0,
        exposed_hop_seconds=max(0.0, elapsed - step_seconds(without_hops(pipeline))),
        fill_seconds=max(0.0, elapsed - pipeline.tail_seconds - steady),
        bound=layer_period(pipeline, most)[1],
    )
