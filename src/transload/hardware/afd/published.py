"""What others measured of attention/FFN splits, set beside what the pipeline and the catalog say of it.

Measured shares, batches and ratios go in as they were published (`published.yaml`); the speed-ups that were published
with them are read only to be printed beside ours. Nothing here is fitted to them.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Literal

import msgspec

from transload.hardware.afd.pipeline import Hop, LayerTimes, Pipeline, step_seconds
from transload.hardware.afd.stages import SplitWorker, Wire
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.cost.efficiency import Efficiency
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.parallel import Parallel
from transload.hardware.precision import Precision, with_weights

US, MS = 1e-6, 1e-3
NVLINK_LATENCY_SECONDS = 5e-6
"""Assumed, one way, from the last byte's leaving to the other side's kernel seeing it. Hidden at every point here."""


class Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of what stands in `published.yaml`."""


class Workload(Part, frozen=True, kw_only=True):
    model: str
    context_tokens: int
    attention: float
    """Share of an unsplit step in attention proper: grows with the batch."""
    dense: float
    """Share in dense matrices: they are read once a micro-batch, whatever is in it."""
    experts: float
    attention_workers: int
    ffn_workers: int
    batch: int
    speedup: float


class FastAfd(Part, frozen=True, kw_only=True):
    source: str
    batch_expansion: float
    """Requests a GPU holds when the experts have left it, over before."""
    micro_batches: int
    workloads: tuple[Workload, ...]


class SweepPoint(Part, frozen=True, kw_only=True):
    context_tokens: int
    batch: int
    trays: int
    per_chip: float
    tpot_ms: float


class Sweep(Part, frozen=True, kw_only=True):
    source: str
    model: str
    kv_tokens: int
    points: tuple[SweepPoint, ...]


class MeasuredSplit(Part, frozen=True, kw_only=True):
    attention_workers: int
    ffn_workers: int
    per_chip: float

    @property
    def share_of_attention(self) -> float:
        return self.attention_workers / (self.attention_workers + self.ffn_workers)


class AscendPoint(Part, frozen=True, kw_only=True):
    context_tokens: int
    batch_unsplit: int
    batch_split: int
    unsplit: float
    splits: tuple[MeasuredSplit, ...]


class Ascend(Part, frozen=True, kw_only=True):
    source: str
    model: str
    chip: str
    micro_batches: int
    unsplit_dies: int
    experts_per_die: int
    points: tuple[AscendPoint, ...]


class AttentionTimes(Part, frozen=True, kw_only=True):
    requests_per_gpu: int
    contexts: tuple[int, int]
    seconds_us: tuple[float, float]


class Step3(Part, frozen=True, kw_only=True):
    source: str
    num_layers: int
    tpot_ms: float
    micro_batches: int
    stage_us: float
    out_us: float
    back_us: float
    gpus: int
    batch: int
    peak_per_chip: float
    mean_per_chip: float
    attention_us: AttentionTimes
    context_tokens: int


class Published(Part, frozen=True, kw_only=True):
    fastafd: FastAfd
    fastafd_sweep: Sweep
    ascend: Ascend
    step3: Step3


@cache
def published() -> Published:
    """The file, read once."""
    return msgspec.yaml.decode((Path(__file__).parent / "published.yaml").read_bytes(), type=Published)


def pipeline_from_shares(workload: Workload, expansion: float, micro_batches: int, num_layers: int) -> Pipeline:
    """The split's pipeline in units of one unsplit step, with FFN and hops hidden: an FFN worker takes as long as the
    attention side of a micro-batch, the most that does not show."""
    seconds = (expansion * workload.attention / micro_batches + workload.dense) / num_layers
    layer = LayerTimes(attention_seconds=seconds, ffn_seconds=seconds, count=num_layers)
    return Pipeline(
        layers=(layer,),
        micro_batches=micro_batches,
        attention_workers=workload.attention_workers,
        ffn_workers=workload.ffn_workers,
    )


def speedup_from_shares(workload: Workload, expansion: float, micro_batches: int) -> float:
    """Tokens per second and chip over the unsplit system's: (B' / B) (T / T') M / (M + N)."""
    pipeline = pipeline_from_shares(workload, expansion, micro_batches, load_model(workload.model).num_layers)
    chips = workload.attention_workers + workload.ffn_workers
    return expansion / step_seconds(pipeline) * workload.attention_workers / chips


class FromCatalog(msgspec.Struct, frozen=True, kw_only=True):
    """The same workload from chips and model alone."""

    attention: float
    dense: float
    experts: float
    expansion: float
    split_tpot_seconds: float
    speedup: float


def _gb200_split(model: str) -> SplitWorker:
    """One GPU an attention worker, one tray of four the FFN worker, NVLink between."""
    card, chip = load_model(model), load_chip("gb200")
    port = chip.need("scale_up.bandwidth").value
    return SplitWorker(
        card,
        chip,
        chip,
        Wire(latency_seconds=NVLINK_LATENCY_SECONDS, attention_bytes_per_second=port, ffn_bytes_per_second=port),
        ffn_parallel=Parallel(data_attention=4, expert=4),
        precision=with_weights(card.precision, "fp8"),
        engine="vllm",
    )


def fastafd_from_catalog(workload: Workload, micro_batches: int) -> FromCatalog:
    """Shares, batch and speed-up as the cost model has them; batches are what the memory holds."""
    split = _gb200_split(workload.model)
    card, chip = split.card, split.ffn_chip
    unsplit = WorkerCost(chip, card, Parallel(data_attention=4, expert=4), split.precision, "vllm")
    before = unsplit.capacity.kv_tokens // 4 // workload.context_tokens
    after = split.most_requests(workload.context_tokens)
    shape = StepShape(num_decode=4 * before, decode_context_tokens=4 * before * workload.context_tokens)
    seconds = unsplit.step_seconds(shape)
    parts = dict.fromkeys(("attention", "experts"), 0.0)
    for time in unsplit.breakdown(shape):
        if time.kind in ("attention_decode", "mla_decode"):
            parts["attention"] += time.seconds / seconds
        elif time.kind in ("grouped_gemm", "all_to_all"):
            parts["experts"] += time.seconds / seconds
    pipeline = split.pipeline(
        after,
        after * workload.context_tokens,
        attention_workers=4 * workload.attention_workers,
        ffn_workers=workload.ffn_workers,
        micro_batches=micro_batches,
    )
    step = step_seconds(pipeline)
    chips = workload.attention_workers + workload.ffn_workers
    return FromCatalog(
        attention=parts["attention"],
        dense=1.0 - parts["attention"] - parts["experts"],
        experts=parts["experts"],
        expansion=after / before,
        split_tpot_seconds=step,
        speedup=after / before * seconds / step * workload.attention_workers / chips,
    )


def sweep_from_catalog(sweep: Sweep) -> list[tuple[SweepPoint, float]]:
    """Every measured ratio with the step that the cost model predicts at the measured batch, seconds."""
    split = _gb200_split(sweep.model)
    return [
        (
            point,
            step_seconds(
                split.pipeline(point.batch, point.batch * point.context_tokens, attention_workers=4 * point.trays)
            ),
        )
        for point in sweep.points
    ]


class AscendAssumptions(msgspec.Struct, frozen=True, kw_only=True):
    """What the publication does not say. The defaults are the catalog's and the cost model's."""

    latency_seconds: float = 10e-6
    call_seconds: float = 0.0
    """That an attention die spends on sending a call and taking its result, beyond the cost model's layer."""
    ffn_memory_share: float | None = None
    """Share of the memory bandwidth at which an FFN die reads its experts, at a row count far from where arithmetic
    would limit; None: the cost model's curve, which was fitted on GPUs."""
    experts_per_die: int | None = None
    """That an FFN die reads in a layer; None: as published."""


class AscendSplit(msgspec.Struct, frozen=True, kw_only=True):
    """One ratio at one context length."""

    gain: float
    """Over unsplit, tokens per second and die, less 1."""
    step_seconds: float
    measured_step_seconds: float
    """Batch over the published rate of an attention die."""
    break_even_step_seconds: float
    """The longest step with which this ratio is as good as unsplit."""


class AscendResult(msgspec.Struct, frozen=True, kw_only=True):
    """One context length."""

    context_tokens: int
    unsplit_step_seconds: float
    row_seconds: float
    """What one more request adds to an unsplit step at equal context in all: from its two published rates."""
    context_seconds: float
    """Of an unsplit step, for the context it looks at: what the cost model's weights, experts and exchange leave."""
    splits: tuple[AscendSplit, ...]
    break_even_ratio: float
    """Attention dies to FFN dies from which a split pays, at the step of the last ratio."""

    @property
    def gains(self) -> tuple[float, ...]:
        return tuple(split.gain for split in self.splits)


def ascend_results(ascend: Ascend, assumed: AscendAssumptions | None = None) -> list[AscendResult]:
    """The published splits from the published unsplit rates, the published batches, and the catalog.

    An unsplit step is batch / rate. Its two context lengths have the same context in all (twice the context, half the
    requests), so their difference is what a request costs; attention's part of it is what is left when the growth of
    experts and exchange is taken off, and attention to the context what is left of a step when weights are as well.
    Weights, FFN calls, hops and bubbles are the cost model's.
    """
    return _AscendModel(ascend, assumed or AscendAssumptions()).results()


def ascend_break_even(
    ascend: Ascend, point: int, split: int, name: Literal["latency_seconds", "call_seconds"], most: float
) -> float | None:
    """The value of an assumption from which a ratio at a context no longer pays; 0 if it does not even at 0, None if it
    still does at `most`."""

    def gain(value: float) -> float:
        assumed = msgspec.structs.replace(AscendAssumptions(), **{name: value})
        return ascend_results(ascend, assumed)[point].splits[split].gain

    low, high = 0.0, most
    if gain(low) <= 0.0:
        return 0.0
    if gain(high) > 0.0:
        return None
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (middle, high) if gain(middle) > 0.0 else (low, middle)
    return high


class _AscendModel:
    """The deployments on the catalog's chip."""

    def __init__(self, ascend: Ascend, assumed: AscendAssumptions) -> None:
        self.ascend, self.assumed = ascend, assumed
        self.card, self.chip = load_model(ascend.model), load_chip(ascend.chip)
        self.precision: Precision = with_weights(self.card.precision, "int8")
        experts = self.card.experts
        assert experts is not None
        self.experts = experts
        self.dies = ascend.unsplit_dies
        whole = WorkerCost(self.chip, self.card, Parallel(data_attention=self.dies, expert=self.dies), self.precision)
        self.efficiency = whole.efficiency
        self.unsplit = self._worker(self.dies)
        # Rows go to some of an FFN die's experts only: it works as one of the more dies that would have just these.
        read = assumed.experts_per_die or ascend.experts_per_die
        self.standing_for = experts.num_experts // read
        self.ffn = self._worker(self.standing_for)

    def results(self) -> list[AscendResult]:
        points = self.ascend.points
        steps = [point.batch_unsplit / point.unsplit for point in points]
        row = (steps[0] - steps[-1]) / (points[0].batch_unsplit - points[-1].batch_unsplit)
        growth = self._unsplit_ffn(points[0].batch_unsplit) - self._unsplit_ffn(points[-1].batch_unsplit)
        attention_row = max(0.0, row - growth / (points[0].batch_unsplit - points[-1].batch_unsplit))
        results = []
        for point, step in zip(points, steps, strict=True):
            before, after = point.batch_unsplit, point.batch_split
            rest = self._unsplit_ffn(before) + self._attention_weights() + self.unsplit.tail_seconds(before)
            context = max(0.0, step - rest - attention_row * before)
            each = attention_row + context / before  # what a request costs at this context
            splits = tuple(self._split(point, split, each) for split in point.splits)
            per_attention_die = after / splits[-1].step_seconds / point.unsplit
            results.append(
                AscendResult(
                    context_tokens=point.context_tokens,
                    unsplit_step_seconds=step,
                    row_seconds=row,
                    context_seconds=context,
                    splits=splits,
                    break_even_ratio=1 / (per_attention_die - 1) if per_attention_die > 1 else float("inf"),
                )
            )
        return results

    def _attention_weights(self) -> float:
        """Of one pass over all layers with next to nothing in it."""
        return self.unsplit.attention_layer_seconds(1, 1) * self.card.num_layers

    def _unsplit_ffn(self, batch: int) -> float:
        """Feed-forwards and their exchange in an unsplit step."""
        rows = self._balanced_rows(batch * self.dies, self.dies)
        return self.unsplit.ffn_layer_seconds(rows) * self.card.num_layers

    def _split(self, point: AscendPoint, split: MeasuredSplit, each: float) -> AscendSplit:
        batch, share = point.batch_split, split.share_of_attention
        seconds = self._step(batch, split, each)
        return AscendSplit(
            gain=batch / seconds * share / point.unsplit - 1,
            step_seconds=seconds,
            measured_step_seconds=batch * share / split.per_chip,
            break_even_step_seconds=batch * share / point.unsplit,
        )

    def _step(self, batch: int, split: MeasuredSplit, each: float) -> float:
        """A step of an attention die. `each`: seconds a request adds to attention, over all layers."""
        physical = self._worker(split.ffn_workers)
        pipeline = physical.pipeline(
            batch, batch, attention_workers=split.attention_workers, micro_batches=self.ascend.micro_batches
        )
        rows = -(-batch // self.ascend.micro_batches)
        callers = split.attention_workers * self.standing_for // split.ffn_workers
        merged = self._balanced_rows(rows * callers, self.standing_for)
        layer = msgspec.structs.replace(
            pipeline.layers[0],
            attention_seconds=physical.attention_layer_seconds(1, 1)
            + rows * each / self.card.num_layers
            + self.assumed.call_seconds,
            ffn_seconds=self.ffn.ffn_layer_seconds(merged, direct=True),
        )
        return step_seconds(msgspec.structs.replace(pipeline, layers=(layer,)))

    def _balanced_rows(self, num_rows: int, dies: int) -> int:
        """Experts were balanced by force; the cost model gives the busiest of `dies` what chance gives it on top of the
        mean. The number of rows whose busiest die gets the mean of `num_rows`."""
        mean = num_rows * self.experts.per_token / dies
        spread = math.sqrt(2 * math.log(dies))
        imbalance = self.efficiency.routing.imbalance
        root = (-spread + math.sqrt(spread**2 + 4 * imbalance * mean)) / (2 * imbalance)
        return max(1, round(num_rows * root**2 / mean))

    def _efficiency(self) -> Efficiency:
        """The cost model's, or one that reads experts at the share that was assumed and waits for nothing else."""
        share = self.assumed.ffn_memory_share
        if share is None:
            return self.efficiency
        curves = {
            name: msgspec.structs.replace(curve, memory=share, compute=1.0, half=0.0)
            for name, curve in self.efficiency.grouped_gemm.items()
        }
        return msgspec.structs.replace(self.efficiency, grouped_gemm=curves)

    def _worker(self, ffn_dies: int) -> SplitWorker:
        port = self.chip.need("scale_up.bandwidth").value
        wire = Wire(
            latency_seconds=self.assumed.latency_seconds,
            attention_bytes_per_second=port,
            ffn_bytes_per_second=port,
        )
        return SplitWorker(
            self.card,
            self.chip,
            self.chip,
            wire,
            ffn_parallel=Parallel(data_attention=ffn_dies, expert=ffn_dies),
            precision=self.precision,
            ffn_efficiency=self._efficiency(),
        )


class Step3Result(msgspec.Struct, frozen=True, kw_only=True):
    """Step-3's stage budget, checked."""

    budget_step_seconds: float
    """A step whose stages and hops are exactly as long as the design allows."""
    longest_hops_seconds: float
    """Out and home together that still do not show."""
    attention_seconds: float
    """Of a layer and micro-batch at the design point, from the published attention times."""
    step_seconds: float
    per_chip: float


def step3_result(step3: Step3) -> Step3Result:
    """Three stages of 272 us with three micro-batches: what fits in a step, and the rate with the attention times that
    were measured (a straight line in requests times context; 2048 rows of a micro-batch over 16 attention GPUs)."""

    def pipeline(attention: float, hops: float) -> Pipeline:
        stage = step3.stage_us * US
        hop = Hop(latency_seconds=hops / 2)
        layer = LayerTimes(attention_seconds=attention, ffn_seconds=stage, out=hop, back=hop, count=step3.num_layers)
        return Pipeline(layers=(layer,), micro_batches=step3.micro_batches)

    times = step3.attention_us
    slope = (times.seconds_us[1] - times.seconds_us[0]) * US / (times.contexts[1] - times.contexts[0])
    fixed = times.seconds_us[0] * US - slope * times.contexts[0]
    rows_per_gpu = step3.batch / step3.micro_batches / (step3.gpus / 2)
    attention = fixed + slope * step3.context_tokens * rows_per_gpu / times.requests_per_gpu
    step = step_seconds(pipeline(attention, (step3.out_us + step3.back_us) * US))
    return Step3Result(
        budget_step_seconds=step_seconds(pipeline(step3.stage_us * US, (step3.out_us + step3.back_us) * US)),
        longest_hops_seconds=(step3.micro_batches - 2) * step3.stage_us * US,
        attention_seconds=attention,
        step_seconds=step,
        per_chip=step3.batch / step / step3.gpus,
    )
