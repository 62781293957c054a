"""From two workers of the cost model and a link to the stage times of their pipeline. Adds no efficiency of its own.

An FFN worker whose layers are spread over pipeline stages of chips computes one layer on one stage only; it works on
as many cohorts of attention workers at once as it has stages, each at layers of its own. It is counted as that many
FFN workers of one stage each.
"""

from __future__ import annotations

import math

import msgspec

from transload.errors import DeploymentError
from transload.hardware.afd.memory import SideMemory, attention_memory, ffn_memory
from transload.hardware.afd.pipeline import Hop, LayerTimes, Pipeline, Split, step_seconds
from transload.hardware.chip import Chip
from transload.hardware.cost.efficiency import Efficiency
from transload.hardware.cost.plan import Plan
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.link import LinkKind
from transload.hardware.model_card import ModelCard
from transload.hardware.parallel import Parallel
from transload.hardware.precision import Precision

OUT_BYTES_PER_ELEMENT = 1.0
BACK_BYTES_PER_ELEMENT = 2.0
"""Activations go out in 8 bits and come home in 16: 3 bytes a hidden element, layer and token (StepMesh,
Introduction.md; FastAFD counts the same)."""


class Wire(msgspec.Struct, frozen=True, kw_only=True):
    """How the two sides are connected. Bytes per second are of one chip's port, one direction."""

    latency_seconds: float
    attention_bytes_per_second: float
    ffn_bytes_per_second: float
    shared_bytes_per_second: float | None = None
    """What all transfers get together, in each direction; None: only the ports limit."""
    out_bytes_per_element: float = OUT_BYTES_PER_ELEMENT
    back_bytes_per_element: float = BACK_BYTES_PER_ELEMENT


def wire_of(
    link: LinkKind, *, bandwidth: float | None = None, latency: float | None = None, shared: float | None = None
) -> Wire:
    """A catalog link between the two sides, the same port on both. Raises `DeploymentError` for what is unknown."""
    rate = bandwidth if bandwidth is not None else link.need("bandwidth").value
    delay = latency if latency is not None else link.need("latency").value
    return Wire(
        latency_seconds=delay,
        attention_bytes_per_second=rate,
        ffn_bytes_per_second=rate,
        shared_bytes_per_second=shared,
    )


def shared_parallel(parallel: Parallel, split: Split, parts: int) -> Parallel:
    """The chips of so many FFN workers that have a part of each layer, as those of one; replicas share nothing."""
    if split == "replica":
        return parallel
    if split == "expert":
        ranks, experts = parallel.data_attention * parts, parallel.expert * parts
        return msgspec.structs.replace(parallel, data_attention=ranks, expert=experts)
    return msgspec.structs.replace(parallel, tensor=parallel.tensor * parts)


class SplitWorker:
    """An attention worker and an FFN worker of one model, and the wire between: seconds of a step at any ratio."""

    def __init__(
        self,
        card: ModelCard,
        attention_chip: Chip,
        ffn_chip: Chip,
        wire: Wire,
        *,
        attention_parallel: Parallel | None = None,
        ffn_parallel: Parallel | None = None,
        precision: Precision | None = None,
        engine: str = "generic",
        split: Split = "replica",
        parts: int = 1,
        ffn_efficiency: Efficiency | None = None,
    ) -> None:
        """Raises `DeploymentError` if a side does not fit its chips or cannot be split so, or a number is unknown.

        `parts`: FFN workers that share the weights out among them, where the split is not by replica.
        `ffn_efficiency` replaces the committed parameters of the FFN chip's class.
        """
        self.card, self.wire, self.split = card, wire, split
        self.ffn_chip, self.engine, self.ffn_efficiency = ffn_chip, engine, ffn_efficiency
        self.precision = precision or card.precision
        self.attention_parallel = attention_parallel or Parallel()
        self.ffn_parallel = ffn_parallel or Parallel()
        if self.attention_parallel.pipeline > 1:
            raise DeploymentError(f"{card.id}: an attention worker of an FFN split has no pipeline stages; use tensor")
        stage = msgspec.structs.replace(self.ffn_parallel, pipeline=1)
        self.attention = WorkerCost(
            attention_chip, card, self.attention_parallel, self.precision, engine, scope="attention"
        )
        self.ffn = WorkerCost(ffn_chip, card, stage, self.precision, engine, scope="ffn", efficiency=ffn_efficiency)
        self._parts: dict[int, WorkerCost] = {1: self.ffn}
        self.attention_memory: SideMemory = attention_memory(
            attention_chip, card, self.attention_parallel, self.precision
        )
        held = shared_parallel(self.ffn_parallel, split, parts)
        self.ffn_memory: SideMemory = ffn_memory(ffn_chip, card, held, self.precision)
        self._tails: dict[int, float] = {}
        self._ffn_layers: dict[tuple[int, int, bool], float] = {}

    def most_requests(self, context_tokens: int) -> int:
        """Requests of this context whose KV fits one attention worker."""
        return self.attention_memory.kv_tokens // context_tokens

    def tail_seconds(self, num_requests: int) -> float:
        """After the last layer, and once a step: output head, sampling, the engine."""
        found = self._tails.get(num_requests)
        if found is None:
            shape = StepShape(num_decode=num_requests, decode_context_tokens=num_requests)
            head = sum(part.seconds for part in self.attention.breakdown(shape) if part.kind == "head")
            overhead = self.attention.plan.overhead
            rank = math.ceil(num_requests / self.attention_parallel.data_attention)
            found = head + overhead.step_seconds + rank * overhead.sequence_seconds
            self._tails[num_requests] = found
        return found

    def attention_layer_seconds(self, num_requests: int, context_tokens: float) -> float:
        """Attention side of one layer, their mean, for a micro-batch with this much context in all."""
        fixed, each = self.attention.decode_coefficients(num_requests)
        return max(0.0, fixed + each * context_tokens - self.tail_seconds(num_requests)) / self.card.num_layers

    def ffn_layer_seconds(self, num_rows: int, parts: int = 1, *, direct: bool = False) -> float:
        """FFN of one layer, their mean, for the merged rows of a call, at one of the `parts` workers that share it.

        direct: rows come to the chips that have their experts, and results are added up at home, so that nothing
        crosses inside.
        """
        found = self._ffn_layers.get((num_rows, parts, direct))
        if found is None:
            worker = self._part(parts)
            fixed, _ = worker.decode_coefficients(num_rows)
            found = fixed - worker.plan.overhead.step_seconds
            if direct:
                shape = StepShape(num_decode=num_rows, decode_context_tokens=num_rows)
                within = [time for time in worker.breakdown(shape) if time.kind in ("all_reduce", "all_to_all")]
                found -= sum(time.seconds for time in within)
            found = self._ffn_layers[num_rows, parts, direct] = found / self.card.num_layers
        return found

    def _part(self, parts: int) -> WorkerCost:
        """The workers that share every call, as one: raises `DeploymentError` if the model cannot be dealt out so."""
        found = self._parts.get(parts)
        if found is None:
            split: Split = "expert" if self.split == "expert" else "column"
            stage = shared_parallel(msgspec.structs.replace(self.ffn_parallel, pipeline=1), split, parts)
            found = WorkerCost(
                self.ffn_chip,
                self.card,
                stage,
                self.precision,
                self.engine,
                scope="ffn",
                efficiency=self.ffn_efficiency,
            )
            self._parts[parts] = found
        return found

    def ffn_plan(self, parts: int) -> Plan:
        """What the cost model has of the FFN workers that share every call."""
        return self._part(parts).plan

    def copies(self, parts: int, *, direct: bool) -> float:
        """How often a row crosses, on average: once to each worker, or to each chip, that has work with it."""
        experts = self.card.experts
        if not direct:
            return float(parts)
        chips = parts * self.ffn_parallel.expert
        if experts is None or chips == 1:
            return float(parts)
        return chips * (1.0 - (1.0 - 1.0 / chips) ** experts.per_token)

    def _ways(self, parts: int) -> tuple[bool, ...]:
        """Whether rows may go straight to the chips of their experts: where these are whole on one chip each. Over
        several workers without an exchange among them there is no other way."""
        alone = self.ffn_parallel.num_chips == 1 or (
            self.ffn_parallel.tensor == 1 and self.ffn_parallel.expert == self.ffn_parallel.chips_per_stage
        )
        if parts > 1 and self.ffn_parallel.num_chips == 1:
            return (True,)
        return (False, True) if alone and self.ffn_parallel.expert * parts > 1 and self.split != "column" else (False,)

    def pipeline(
        self,
        num_requests: int,
        context_tokens: float,
        *,
        attention_workers: int = 1,
        ffn_workers: int = 1,
        micro_batches: int = 2,
    ) -> Pipeline:
        """The pipeline of a step in which each attention worker has `num_requests`, of `context_tokens` in all.

        An FFN worker whose chips have whole experts gets a row once and passes it on inside, or gets it at each chip
        that has an expert of it, whichever makes the shorter step.
        """
        made = self.pipelines(
            num_requests,
            context_tokens,
            attention_workers=attention_workers,
            ffn_workers=ffn_workers,
            micro_batches=micro_batches,
        )
        return made[0] if len(made) == 1 else min(made, key=step_seconds)

    def pipelines(
        self, num_requests: int, context_tokens: float, *, attention_workers: int, ffn_workers: int, micro_batches: int
    ) -> list[Pipeline]:
        """One for each way that rows may cross."""
        used = min(micro_batches, num_requests)
        servers = ffn_workers * self.ffn_parallel.pipeline if self.split == "replica" else ffn_workers
        shape = Pipeline(
            layers=(LayerTimes(attention_seconds=0.0, ffn_seconds=0.0),),
            micro_batches=used,
            attention_workers=attention_workers,
            ffn_workers=servers,
            split=self.split,
            tail_seconds=self.tail_seconds(num_requests),
        )
        rows = math.ceil(num_requests / used)
        attention = self.attention_layer_seconds(rows, context_tokens / num_requests * rows)
        return [self._made(shape, rows, attention, direct=direct) for direct in self._ways(shape.parts)]

    def _made(self, shape: Pipeline, rows: int, attention_seconds: float, *, direct: bool) -> Pipeline:
        copies = self.copies(shape.parts, direct=direct)
        layer = LayerTimes(
            attention_seconds=attention_seconds,
            ffn_seconds=self.ffn_layer_seconds(rows * shape.cohort_size, shape.parts, direct=direct),
            out=self._hop(rows * self.wire.out_bytes_per_element, copies, shape.parts),
            back=self._hop(rows * self.wire.back_bytes_per_element, copies, shape.parts),
            count=self.card.num_layers,
        )
        return msgspec.structs.replace(shape, layers=(layer,))

    def _hop(self, bytes_per_hidden_element: float, copies: float, parts: int) -> Hop:
        """A micro-batch over the wire."""
        one_copy = self.card.hidden_size * bytes_per_hidden_element
        attention_rate = self.wire.attention_bytes_per_second * self.attention_parallel.num_chips
        ffn_rate = self.wire.ffn_bytes_per_second * self.ffn_parallel.chips_per_stage
        shared = self.wire.shared_bytes_per_second
        return Hop(
            latency_seconds=self.wire.latency_seconds,
            attention_port_seconds=copies * one_copy / attention_rate,
            ffn_port_seconds=copies / parts * one_copy / ffn_rate,
            shared_seconds=0.0 if shared is None else copies * one_copy / shared,
        )

    @property
    def bytes_per_token_layer(self) -> float:
        """What crosses per token and layer, both directions together."""
        wire = self.wire
        return self.card.hidden_size * (wire.out_bytes_per_element + wire.back_bytes_per_element)
