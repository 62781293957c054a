"""Compiles a chip, a model and a split into lines: seconds as the larger of two straight lines in the number of rows.

Everything slow happens here, once; `worker.py` only adds up lines.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import msgspec

from transload.hardware.chip import Chip
from transload.hardware.cost import links
from transload.hardware.cost.efficiency import Curve, Efficiency, Overhead, compute_format, curve_for, grouped_curve
from transload.hardware.cost.known import number, peak
from transload.hardware.cost.matrices import (
    AttentionWork,
    ExpertMatrices,
    Matrix,
    Rows,
    activations,
    attention_work,
    dense_matrices,
    expert_matrices,
)
from transload.hardware.model_card import ModelCard
from transload.hardware.parallel import Parallel
from transload.hardware.precision import DTYPE_BYTES, Precision

Kind = Literal[
    "gemm", "grouped_gemm", "attention_prefill", "attention_decode", "mla_prefill", "mla_decode", "elementwise",
    "head", "all_reduce", "all_to_all", "p2p", "overhead",
]  # fmt: skip
Scope = Literal["all", "attention", "ffn"]
"""What a worker computes: a whole model, or one side of a split into attention and feed-forwards."""
SHORT_WINDOW = 1024
"""A window up to this long is charged whole for every decoding request: all but the shortest contexts fill it. A
longer one is charged as if there were none. Either way a decode step stays a straight line in its context tokens."""


SHUFFLES = 4
"""Times that a row passes memory between the residual stream and an expert: read and written before, and after."""
ENTERED = 3
"""Times that a row passes the memory of a chip whose experts it may go to, whether any of them gets it or not: read to
be stored in their format, and its result written and read again."""


class Line(NamedTuple):
    """max(compute + compute_each * m, memory + memory_each * m) + floor seconds, for all layers together."""

    kind: Kind
    rows: Rows
    compute: float
    compute_each: float
    memory: float
    memory_each: float
    floor: float
    flops_each: float
    bytes_fixed: float
    bytes_each: float


class Experts(msgspec.Struct, frozen=True, kw_only=True):
    """Routed experts, all layers: their time is no straight line, as more tokens touch more experts."""

    work: ExpertMatrices
    seconds_per_flop: float
    half: float
    seconds_per_byte: float
    floor: float
    shuffle: float
    """Seconds a row that goes to one expert is moved: gathered before, scattered and added up after."""
    skew: float
    imbalance: float


class Attention(msgspec.Struct, frozen=True, kw_only=True):
    """Attention proper, all layers, in seconds per unit of work."""

    work: AttentionWork
    prefill_seconds_per_pair: float
    prefill_half: float
    prefill_floor: float
    prefill_seconds_per_expanded: float
    decode_seconds_per_token: float
    """Per token of context of the rank, in the layers that see all of it."""
    decode_seconds_per_request: float
    """For the layers that see a short window only."""
    decode_floor: float
    decode_bytes_per_token: float
    decode_flops_per_token: float
    decode_bound: Literal["compute", "memory"]
    read_seconds_per_token: float
    """Prefill reads the cached tokens once a chunk."""


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """A worker, compiled."""

    lines: tuple[Line, ...]
    experts: Experts | None
    attention: Attention | None
    overhead: Overhead
    layer_overhead: float
    num_layers: int
    exchanged: float = 0.0
    """Seconds that a row of a rank is on its way to and from experts, where that may hide behind computing."""
    overlap: float = 0.0
    """Share of it that hides, at most."""


class _Compiler:
    def __init__(
        self, chip: Chip, card: ModelCard, parallel: Parallel, precision: Precision, efficiency: Efficiency
    ) -> None:
        self.chip, self.card, self.parallel = chip, card, parallel
        self.precision, self.efficiency = precision, efficiency
        self.bandwidth = number(chip, f"memory.{chip.tier_for('weights').key}.bandwidth")
        self.kv_bandwidth = number(chip, f"memory.{chip.tier_for('kv').key}.bandwidth")
        # experts dealt out beyond one scale-up domain are served by libraries made for that
        beyond = links.reach_of(chip, parallel.chips_per_stage).domains > 1
        self.wide = beyond and parallel.data_attention > 1 and parallel.expert > 1

    def matrix(self, matrix: Matrix) -> Line:
        number_format = compute_format(self.chip, matrix.dtype)
        curve = curve_for(self.efficiency.gemm, number_format)
        rate = peak(self.chip, number_format) * curve.compute
        activation_bytes = min(2.0, max(1.0, DTYPE_BYTES[matrix.dtype]))
        bytes_each = matrix.inputs * activation_bytes + 2 * matrix.outputs
        return self._line(
            "head" if matrix.part == "head" else "gemm", matrix.rows, matrix.num_layers, curve,
            flops_each=matrix.flops_per_row, peak=rate, bytes_fixed=matrix.weight_bytes, bytes_each=bytes_each,
        )  # fmt: skip

    def _line(
        self, kind: Kind, rows: Rows, layers: int, curve: Curve, *, flops_each: float, peak: float,
        bytes_fixed: float, bytes_each: float,
    ) -> Line:  # fmt: skip
        per_byte = layers / (self.bandwidth * curve.memory)
        return Line(
            kind=kind,
            rows=rows,
            compute=layers * flops_each * curve.half / peak,
            compute_each=layers * flops_each / peak,
            memory=bytes_fixed * per_byte,
            memory_each=bytes_each * per_byte,
            floor=layers * curve.floor_seconds,
            flops_each=layers * flops_each,
            bytes_fixed=layers * bytes_fixed,
            bytes_each=layers * bytes_each,
        )

    def message(self, kind: Kind, rows: Rows, count: int, message: links.Message, bytes_each: float) -> Line:
        return Line(
            kind=kind, rows=rows, compute=0.0, compute_each=0.0, memory=0.0,
            memory_each=count * bytes_each * message.seconds_per_byte, floor=count * message.fixed_seconds,
            flops_each=0.0, bytes_fixed=0.0, bytes_each=count * bytes_each,
        )  # fmt: skip

    def elementwise(self, share: float) -> Line:
        work = activations(self.card, self.parallel)
        curve = self.efficiency.elementwise
        per_byte = 1 / (self.bandwidth * curve.memory)
        return Line(
            kind="elementwise", rows="rank", compute=0.0, compute_each=0.0, memory=0.0,
            memory_each=share * work.bytes_per_token * per_byte,
            floor=share * 2 * self.card.num_layers * curve.floor_seconds, flops_each=0.0, bytes_fixed=0.0,
            bytes_each=share * work.bytes_per_token,
        )  # fmt: skip

    def collectives(self, scope: Scope) -> list[Line]:
        card, parallel = self.card, self.parallel
        row = activations(card, parallel).hidden_bytes
        lines: list[Line] = []
        attention = card.num_layers if scope != "ffn" else 0
        dense = card.num_dense_layers if scope != "attention" else 0
        sparse = card.num_expert_layers if scope != "attention" else 0
        reduce = links.all_reduce(self.chip, self.efficiency, parallel.tensor)
        if parallel.tensor > 1 and attention + dense:
            lines.append(self.message("all_reduce", "rank", attention + dense, reduce, row))
        if sparse and parallel.data_attention > 1:
            lines.append(self.exchange(sparse))
        elif sparse and parallel.tensor > 1:
            lines.append(self.message("all_reduce", "stage", sparse, reduce, row))
        if parallel.pipeline > 1:
            hop = links.hop(self.chip, self.efficiency, parallel.num_chips)
            lines.append(self.message("p2p", "rank", parallel.pipeline - 1, hop, row / parallel.tensor))
        return lines

    def visited(self) -> float:
        """Share of the ranks of experts that a row goes to. Without expert parallelism each chip has a piece of every
        expert, and where attention is not by data every chip has all rows anyway."""
        experts, ranks = self.card.experts, self.parallel.expert
        if experts is None or ranks == 1 or self.parallel.data_attention == 1:
            return 1.0
        return float(1 - (1 - 1 / ranks) ** experts.per_token)

    def entering(self) -> Line:
        """Rows on their way into the routed experts of a chip and out of them, whichever experts they go to."""
        passed = self.card.num_expert_layers * ENTERED * 2 * self.card.hidden_size * self.visited()
        return Line(
            kind="elementwise", rows="stage", compute=0.0, compute_each=0.0, memory=0.0,
            memory_each=passed / (self.bandwidth * self.efficiency.elementwise.memory), floor=0.0, flops_each=0.0,
            bytes_fixed=0.0, bytes_each=passed,
        )  # fmt: skip

    def exchange(self, layers: int) -> Line:
        """Dispatch and combine: a token goes to each rank once that has one of its experts (fp8), and comes back from
        there (16 bits). The chips of one attention rank send a part of its tokens each."""
        experts = self.card.experts
        assert experts is not None
        chips, ranks = self.parallel.chips_per_stage, self.parallel.expert
        domains = links.reach_of(self.chip, chips).domains
        visited = self.visited() * (ranks if ranks > 1 else chips)
        crossed = domains * (1 - (1 - 1 / domains) ** experts.per_token)
        message = links.all_to_all(self.chip, self.efficiency, chips, visited, crossed)
        return self.message(
            "all_to_all", "rank", layers, message, self.card.hidden_size * (1 + 2) / self.parallel.tensor
        )

    def experts(self) -> Experts | None:
        work = expert_matrices(self.card, self.parallel, self.precision)
        if work is None:
            return None
        number_format = compute_format(self.chip, work.dtype)
        curve = grouped_curve(self.efficiency, work.dtype, number_format, wide=self.wide)
        routing = self.efficiency.routing
        return Experts(
            work=work,
            seconds_per_flop=(1 + curve.width / work.inner) / (peak(self.chip, number_format) * curve.compute),
            half=curve.half,
            seconds_per_byte=1 / (self.bandwidth * curve.memory),
            floor=curve.floor_seconds,
            shuffle=SHUFFLES * 2 * work.hidden / (self.bandwidth * self.efficiency.elementwise.memory),
            skew=routing.skew,
            imbalance=routing.imbalance,
        )

    def attention(self) -> Attention:
        work = attention_work(self.card, self.parallel, self.precision)
        efficiency = self.efficiency
        prefill = efficiency.mla_prefill if work.latent else efficiency.attention_prefill
        decode = efficiency.mla_decode if work.latent else efficiency.attention_decode
        number_format = compute_format(self.chip, "bfloat16")
        rate = peak(self.chip, number_format)
        gemm = curve_for(efficiency.gemm, number_format)
        per_byte = 1 / (self.kv_bandwidth * decode.memory)
        reading = work.kv_bytes_per_token * per_byte
        counting = work.decode_flops_per_pair / (rate * decode.compute)
        each = max(reading, counting)
        short = work.window <= SHORT_WINDOW
        seeing = work.num_full_layers + (0 if short else work.num_sliding_layers)
        windowed = work.num_sliding_layers * work.window if short else 0
        return Attention(
            work=work,
            prefill_seconds_per_pair=work.prefill_flops_per_pair / (rate * prefill.compute),
            prefill_half=prefill.half,
            prefill_floor=self.card.num_layers * prefill.floor_seconds,
            prefill_seconds_per_expanded=self.card.num_layers * work.expansion_flops / (rate * gemm.compute),
            decode_seconds_per_token=seeing * each,
            decode_seconds_per_request=windowed * each,
            decode_floor=self.card.num_layers * decode.floor_seconds,
            decode_bytes_per_token=seeing * work.kv_bytes_per_token,
            decode_flops_per_token=seeing * work.decode_flops_per_pair,
            decode_bound="memory" if reading >= counting else "compute",
            read_seconds_per_token=reading,
        )


def compile_plan(
    chip: Chip,
    card: ModelCard,
    parallel: Parallel,
    precision: Precision,
    efficiency: Efficiency,
    overhead: Overhead,
    scope: Scope,
) -> Plan:
    """All that does not depend on the step. Raises `DeploymentError` for a number of the chip that is unknown."""
    compiler = _Compiler(chip, card, parallel, precision, efficiency)
    parts = {"all": ("attention", "ffn", "head"), "attention": ("attention", "head"), "ffn": ("ffn",)}[scope]
    lines = [compiler.matrix(matrix) for matrix in dense_matrices(card, parallel, precision) if matrix.part in parts]
    lines.append(compiler.elementwise(1.0 if scope == "all" else 0.5))
    if scope != "attention" and card.num_expert_layers:
        lines.append(compiler.entering())
    lines += compiler.collectives(scope)
    layers = overhead.layer_seconds * card.num_layers
    wide = links.reach_of(chip, parallel.chips_per_stage).domains > 1
    return Plan(
        lines=tuple(lines),
        experts=compiler.experts() if scope != "attention" else None,
        attention=compiler.attention() if scope != "ffn" else None,
        overhead=overhead if scope != "ffn" else msgspec.structs.replace(overhead, sequence_seconds=0.0),
        layer_overhead=layers if scope == "all" else layers / 2,
        num_layers=card.num_layers,
        exchanged=sum(line.memory_each for line in lines if line.kind == "all_to_all") if wide else 0.0,
        overlap=efficiency.routing.overlap,
    )


def busiest_assignments(experts: Experts, num_tokens: float) -> float:
    """Assignments of tokens to the experts of the busiest rank. Random routing leaves a spread of about
    sqrt(2 * mean * ln(ranks)) over the mean, the largest of `ranks` nearly normal numbers; a rank has no more than
    every token times the experts it can give it."""
    work = experts.work
    mean = num_tokens * work.per_token / work.ranks
    if work.ranks == 1:
        return mean
    spread = math.sqrt(2 * mean * math.log(work.ranks))
    most = num_tokens * min(work.per_token, work.local_experts)
    return min(most, mean * experts.imbalance + spread)
