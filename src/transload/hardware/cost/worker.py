"""One worker as a cost: seconds of a step, what they go to, what fits. The class that simulation and search call.

Pure arithmetic on a compiled plan. A decode step is exactly a straight line in its context tokens.
"""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from transload.hardware.chip import Chip
from transload.hardware.cost.capacity import Capacity, capacity_of
from transload.hardware.cost.efficiency import Efficiency, efficiency_of, overhead_of
from transload.hardware.cost.energy import energy_joules, usd
from transload.hardware.cost.evidence import assumptions_of, rests_on
from transload.hardware.cost.intervals import interval_of
from transload.hardware.cost.matrices import causal_pairs
from transload.hardware.cost.plan import Kind, Line, Plan, Scope, busiest_assignments, compile_plan
from transload.hardware.cost.shape import StepShape
from transload.hardware.model_card import ModelCard
from transload.hardware.model_facts import experts_touched
from transload.hardware.parallel import Parallel, check_split
from transload.hardware.precision import DTYPE_BYTES, Precision
from transload.hardware.quantity import Kind as NumberClass
from transload.hardware.quantity import Quantity, kinds_of

Bound = Literal["compute", "memory", "link", "overhead"]
CACHED = 1 << 16
LINKS: tuple[Kind, ...] = ("all_reduce", "all_to_all", "p2p")


class OperationTime(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of operation of a step, all layers, on the busiest chip."""

    kind: Kind
    seconds: float
    flops: float
    bytes: float
    """Of memory; of messages for collectives."""
    bound: Bound


class WorkerCost:
    """A worker: a chip, times a split, times a model in a precision, under an engine."""

    def __init__(
        self,
        chip: Chip,
        card: ModelCard,
        parallel: Parallel | None = None,
        precision: Precision | None = None,
        engine: str = "generic",
        *,
        scope: Scope = "all",
        efficiency: Efficiency | None = None,
    ) -> None:
        """Raises `DeploymentError` for a split that does not divide or a number of the chip that is unknown.

        `efficiency` replaces the committed parameters of the chip's class: for fitting, and for a measured chip.
        """
        self.chip, self.card, self.engine, self.scope = chip, card, engine, scope
        self.parallel = parallel or Parallel()
        self.precision = precision or card.precision
        self.efficiency = efficiency or efficiency_of(chip)
        check_split(card, self.parallel)
        overhead = overhead_of(self.efficiency, engine)
        self.plan: Plan = compile_plan(chip, card, self.parallel, self.precision, self.efficiency, overhead, scope)
        self._rank_lines = tuple(line[2:7] for line in self.plan.lines if line.rows == "rank")
        self._stage_lines = tuple(line[2:7] for line in self.plan.lines if line.rows == "stage")
        self._head_lines = tuple(line[2:7] for line in self.plan.lines if line.rows == "sequences")
        self._experts: dict[float, float] = {}
        self._decode: dict[int, tuple[float, float]] = {}
        self._capacity: Capacity | None = None

    # -- seconds ----------------------------------------------------------------------------------------------------

    def decode_coefficients(self, num_decode: int) -> tuple[float, float]:
        """(fixed, per_context_token): a pure decode step of this many requests with C tokens of context in all takes
        fixed + per_context_token * C seconds."""
        found = self._decode.get(num_decode)
        if found is None:
            if len(self._decode) >= CACHED:
                self._decode.clear()
            found = self._decode[num_decode] = self._decode_line(num_decode)
        return found

    def step_seconds(self, shape: StepShape) -> float:
        """Seconds of one step, from its start to the tokens' being there. 0 for a step with nothing in it."""
        if not shape.prefill:
            if not shape.num_decode:
                return 0.0
            fixed, each = self.decode_coefficients(shape.num_decode)
            return fixed + each * shape.decode_context_tokens
        return self._mixed(shape)

    def request_seconds(self, prompt_tokens: int, in_flight: int = 1) -> float:
        """What a request takes besides its steps (HTTP, template, tokenising, its turn among the streams in flight):
        adds to TTFT, occupies no chip."""
        overhead = self.plan.overhead
        seconds = overhead.request_seconds + prompt_tokens * overhead.prompt_token_seconds
        return seconds + in_flight * overhead.stream_seconds

    def _share(self, num_decode: int) -> tuple[float, float]:
        """(requests of a micro-batch of the pipeline, of them on the busiest attention rank)."""
        micro = math.ceil(num_decode / self.parallel.pipeline)
        return micro, math.ceil(micro / self.parallel.data_attention)

    def _decode_line(self, num_decode: int) -> tuple[float, float]:
        if num_decode == 0:
            return 0.0, 0.0
        micro, rank = self._share(num_decode)
        fixed = self._linear(rank, micro, rank)
        fixed -= self._hidden(rank, fixed)
        fixed += self._overhead(rank, prefill=False)
        each = 0.0
        attention = self.plan.attention
        if attention is not None:
            fixed += attention.decode_floor + rank * attention.decode_seconds_per_request
            each = attention.decode_seconds_per_token * rank / num_decode
        return fixed, each

    def _overhead(self, sequences: float, *, prefill: bool) -> float:
        overhead = self.plan.overhead
        seconds = overhead.step_seconds + self.plan.layer_overhead + sequences * overhead.sequence_seconds
        if prefill:
            seconds += overhead.prefill_step_seconds
        return seconds

    def _linear(self, rank_tokens: float, stage_tokens: float, sequences: float) -> float:
        """Matrices, experts, elementwise and collectives."""
        seconds = 0.0
        for lines, rows in (
            (self._rank_lines, rank_tokens),
            (self._stage_lines, stage_tokens),
            (self._head_lines, sequences),
        ):
            for compute, compute_each, memory, memory_each, floor in lines:
                first, second = compute + compute_each * rows, memory + memory_each * rows
                seconds += (first if first > second else second) + floor
        if self.plan.experts is not None:
            seconds += self._expert_seconds(stage_tokens)
        return seconds

    def _hidden(self, rows: float, seconds: float) -> float:
        """Of these seconds of matrices and messages, what the exchange of this many rows hides behind the rest."""
        sent = rows * self.plan.exchanged
        return self.plan.overlap * min(sent, seconds - sent) if sent else 0.0

    def _expert_seconds(self, num_tokens: float) -> float:
        found = self._experts.get(num_tokens)
        if found is None:
            if len(self._experts) >= CACHED:
                self._experts.clear()
            compute, memory, floor, _, _ = self._expert_work(num_tokens)
            found = self._experts[num_tokens] = max(compute, memory) + floor
        return found

    def _expert_work(self, num_tokens: float) -> tuple[float, float, float, float, float]:
        """(compute seconds, memory seconds, seconds besides, flops, bytes) of all layers on the busiest chip."""
        experts = self.plan.experts
        assert experts is not None
        work = experts.work
        assigned = busiest_assignments(experts, num_tokens)
        # the busiest chip touches as many of its experts as if all chips were as busy
        as_busy = assigned * work.ranks / work.per_token
        if experts.skew:
            touched = experts_touched(work.num_experts, work.per_token, as_busy, experts.skew)
        else:
            touched = work.num_experts * (1.0 - (1.0 - work.per_token / work.num_experts) ** as_busy)
        touched *= work.local_experts / work.num_experts
        flops = 2.0 * work.weights_each * assigned
        moved = touched * work.weights_each * DTYPE_BYTES[work.dtype] + assigned * 2 * (
            2 * work.hidden + 3 * work.inner
        )
        compute = 2.0 * work.weights_each * (assigned + experts.half * touched) * experts.seconds_per_flop
        layers = work.num_layers
        return (
            layers * compute,
            layers * moved * experts.seconds_per_byte,
            layers * (experts.floor + assigned * experts.shuffle),
            layers * flops,
            layers * moved,
        )

    def _mixed(self, shape: StepShape) -> float:
        pipeline, ranks = self.parallel.pipeline, self.parallel.data_attention
        total = largest = 0
        for _, num_tokens in shape.prefill:
            total += num_tokens
            if num_tokens > largest:
                largest = num_tokens
        num_decode = shape.num_decode
        micro, rank = self._share(num_decode)
        prefill_rank = max(largest, total / ranks) / pipeline
        chunks = math.ceil(len(shape.prefill) / ranks)
        seconds = self._linear(rank + prefill_rank, micro + total / pipeline, rank + chunks)
        seconds -= self._hidden(rank + prefill_rank, seconds)
        seconds += self._overhead(rank + chunks, prefill=bool(prefill_rank))
        attention = self.plan.attention
        if attention is None:
            return seconds
        seconds += attention.prefill_floor + self._prefill_attention(shape) / pipeline
        if num_decode:
            seconds += attention.decode_floor + rank * attention.decode_seconds_per_request
            seconds += attention.decode_seconds_per_token * rank / num_decode * shape.decode_context_tokens
        return seconds

    def _prefill_attention(self, shape: StepShape) -> float:
        """Seconds of the busiest attention rank, floors apart: a chunk is one rank's own."""
        total = largest = 0.0
        for start, num_tokens in shape.prefill:
            seconds = self.chunk_seconds(start, num_tokens)
            total += seconds
            if seconds > largest:
                largest = seconds
        return max(largest, total / self.parallel.data_attention)

    def chunk_seconds(self, start: int, num_tokens: int) -> float:
        """Attention proper of one prefill chunk, all layers."""
        attention = self.plan.attention
        if attention is None:
            return 0.0
        work, half = attention.work, attention.prefill_half
        end = start + num_tokens
        pairs = (start + 1 + end) * num_tokens / 2
        counting = pairs * attention.prefill_seconds_per_pair * (1 + half / end)
        reading = end * attention.read_seconds_per_token
        seconds = work.num_full_layers * (counting if counting > reading else reading)
        if work.num_sliding_layers:
            seen = min(end, work.window)
            pairs = causal_pairs(start, num_tokens, work.window)
            counting = pairs * attention.prefill_seconds_per_pair * (1 + half / seen)
            reading = min(end, num_tokens + work.window) * attention.read_seconds_per_token
            seconds += work.num_sliding_layers * max(counting, reading)
        return seconds + start * attention.prefill_seconds_per_expanded

    # -- what they go to --------------------------------------------------------------------------------------------

    def breakdown(self, shape: StepShape) -> tuple[OperationTime, ...]:
        """The step by kind of operation; the seconds add up to `step_seconds`."""
        if not shape.prefill and not shape.num_decode:
            return ()
        pipeline, ranks = self.parallel.pipeline, self.parallel.data_attention
        micro, rank = self._share(shape.num_decode)
        total = shape.num_prefill_tokens
        largest = max((num_tokens for _, num_tokens in shape.prefill), default=0)
        prefill_rank = max(largest, total / ranks) / pipeline
        chunks = math.ceil(len(shape.prefill) / ranks)
        rows = {"rank": rank + prefill_rank, "stage": micro + total / pipeline, "sequences": float(rank + chunks)}
        times = [_timed(line, rows[line.rows]) for line in self.plan.lines]
        if self.plan.experts is not None:
            compute, memory, floor, flops, moved = self._expert_work(rows["stage"])
            times.append(_operation("grouped_gemm", compute, memory, floor, flops, moved))
        times = self._without_hidden(times, rows["rank"])
        times += self._attention_times(shape, rank)
        overhead = self._overhead(rank + chunks, prefill=bool(prefill_rank))
        times.append(OperationTime(kind="overhead", seconds=overhead, flops=0.0, bytes=0.0, bound="overhead"))
        return _merged(times)

    def _without_hidden(self, times: list[OperationTime], rows: float) -> list[OperationTime]:
        hidden = self._hidden(rows, math.fsum(time.seconds for time in times))
        return [
            msgspec.structs.replace(time, seconds=time.seconds - hidden) if time.kind == "all_to_all" else time
            for time in times
        ]

    def _attention_times(self, shape: StepShape, rank: float) -> list[OperationTime]:
        attention = self.plan.attention
        if attention is None:
            return []
        work, times = attention.work, []
        if shape.prefill:
            pairs = sum(
                work.num_full_layers * causal_pairs(start, num_tokens, None)
                + work.num_sliding_layers * causal_pairs(start, num_tokens, work.window)
                for start, num_tokens in shape.prefill
            )
            share = 1 / (self.parallel.pipeline * self.parallel.data_attention)
            expanded = sum(start for start, _ in shape.prefill) * work.expansion_flops * self.plan.num_layers
            seconds = self._prefill_attention(shape) / self.parallel.pipeline + attention.prefill_floor
            moved = sum(start + num for start, num in shape.prefill) * work.kv_bytes_per_token * self.plan.num_layers
            times.append(
                OperationTime(
                    kind="mla_prefill" if work.latent else "attention_prefill",
                    seconds=seconds,
                    flops=share * (pairs * work.prefill_flops_per_pair + expanded),
                    bytes=share * moved,
                    bound="compute",
                )
            )
        if shape.num_decode:
            context = shape.decode_context_tokens * rank / shape.num_decode
            seconds = attention.decode_floor + rank * attention.decode_seconds_per_request
            seconds += attention.decode_seconds_per_token * context
            times.append(
                OperationTime(
                    kind="mla_decode" if work.latent else "attention_decode",
                    seconds=seconds,
                    flops=attention.decode_flops_per_token * context,
                    bytes=attention.decode_bytes_per_token * context,
                    bound=attention.decode_bound if attention.decode_floor < seconds / 2 else "overhead",
                )
            )
        return times

    # -- what fits, and how sure it is --------------------------------------------------------------------------------

    @property
    def capacity(self) -> Capacity:
        """Memory of the fullest chip. Raises `DeploymentError`, with the chips it takes, if weights do not fit."""
        if self._capacity is None:
            self._capacity = capacity_of(self.chip, self.card, self.parallel, self.precision, self.efficiency)
        return self._capacity

    @property
    def kv_tokens(self) -> int:
        """Tokens of KV cache that fit in the worker beside its weights."""
        return self.capacity.kv_tokens

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high): the duration of a simulated step times these bounds what 80 % of measured ones were."""
        return interval_of(self.chip, self.card, self.efficiency)

    @property
    def ttft_interval(self) -> tuple[float, float]:
        """The same of the time to the first token, where clients and front ends come in."""
        return interval_of(self.chip, self.card, self.efficiency, "ttft")

    @property
    def rests_on(self) -> tuple[Quantity, ...]:
        """The numbers of the catalog behind a step's seconds."""
        return rests_on(self.chip, self.parallel, self.precision)

    @property
    def classes(self) -> dict[NumberClass, int]:
        """How many of them are of each class, most solid first."""
        return kinds_of(self.rests_on)

    @property
    def assumptions(self) -> tuple[str, ...]:
        """What has to be said beside every result: the user's numbers, and what was taken for granted."""
        return assumptions_of(self.chip, self.card, self.parallel, self.efficiency, self.engine)

    def energy_joules(self, seconds: float, busy_share: float) -> float:
        """Of all its chips. Raises `DeploymentError` if the chip's power is unknown."""
        return energy_joules(self.chip, self.parallel.num_chips, seconds, busy_share)

    def usd(self, seconds: float) -> float:
        """Price of all its chips for this time. Raises `DeploymentError` if the chip's price by the hour is unknown."""
        return usd(self.chip, self.parallel.num_chips, seconds)


def _operation(kind: Kind, compute: float, memory: float, floor: float, flops: float, moved: float) -> OperationTime:
    bound: Bound
    if kind in LINKS:
        bound = "link"
    elif floor > max(compute, memory):
        bound = "overhead"
    else:
        bound = "compute" if compute > memory else "memory"
    return OperationTime(kind=kind, seconds=max(compute, memory) + floor, flops=flops, bytes=moved, bound=bound)


def _timed(line: Line, rows: float) -> OperationTime:
    return _operation(
        line.kind,
        line.compute + line.compute_each * rows,
        line.memory + line.memory_each * rows,
        line.floor,
        line.flops_each * rows,
        line.bytes_fixed + line.bytes_each * rows,
    )


def _merged(times: list[OperationTime]) -> tuple[OperationTime, ...]:
    """One entry a kind, bound by what bounds most of its seconds."""
    merged: list[OperationTime] = []
    for kind in dict.fromkeys(time.kind for time in times):
        alike = [time for time in times if time.kind == kind]
        longest: dict[Bound, float] = {}
        for time in alike:
            longest[time.bound] = longest.get(time.bound, 0.0) + time.seconds
        merged.append(
            OperationTime(
                kind=kind,
                seconds=math.fsum(time.seconds for time in alike),
                flops=math.fsum(time.flops for time in alike),
                bytes=math.fsum(time.bytes for time in alike),
                bound=max(longest, key=lambda bound: longest[bound]),
            )
        )
    return tuple(merged)
