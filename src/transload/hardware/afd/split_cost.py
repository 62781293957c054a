"""A worker whose feed-forwards are computed elsewhere, as a cost: the same questions that `WorkerCost` answers.

A step is the pipeline's, as if every attention worker that shares the FFN workers were at the same step with the same
batch: their calls are merged, and their bytes share the FFN workers' ports. Where some of them are idle that is a
little too long. Energy and price are the attention worker's and its share of the FFN workers'.
"""

from __future__ import annotations

import math

import msgspec

from transload.hardware.afd.pipeline import Pipeline, StepCurve, StepReport, report, step_curve, step_seconds
from transload.hardware.afd.stages import SplitWorker
from transload.hardware.cost.energy import energy_joules, usd
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import OperationTime
from transload.hardware.quantity import Kind as NumberClass
from transload.hardware.quantity import Quantity, kinds_of

CACHED = 1 << 14


class SplitCost:
    """One attention worker of M that share N FFN workers."""

    def __init__(
        self,
        worker: SplitWorker,
        *,
        attention_workers: int = 1,
        ffn_workers: int = 1,
        micro_batches: int = 2,
        shares_price: bool = True,
    ) -> None:
        """`shares_price` False: energy and price are its own chips' alone, for whoever counts the FFN workers apart."""
        self.worker = worker
        self.shares_price = shares_price
        self.attention_workers, self.ffn_workers = attention_workers, ffn_workers
        self.micro_batches = micro_batches
        self._curves: dict[int, tuple[int, tuple[StepCurve, ...]]] = {}

    # -- seconds ----------------------------------------------------------------------------------------------------

    def step_seconds(self, shape: StepShape) -> float:
        """Seconds of one step. 0 for a step with nothing in it."""
        if shape.prefill:
            return step_seconds(self._mixed(shape))
        if not shape.num_decode:
            return 0.0
        rows, curves = self._curves_of(shape.num_decode)
        context = shape.decode_context_tokens / shape.num_decode * rows
        attention = self.worker.attention_layer_seconds(rows, context)
        if not curves:
            return step_seconds(self.pipeline(shape.num_decode, shape.decode_context_tokens))
        return min(curve.step_seconds(attention) for curve in curves)

    def decode_coefficients(self, num_decode: int) -> tuple[float, float]:
        """There are none: a step is flat in its context while it waits for the FFN side, and rises once it waits for
        attention. Whoever goes through many steps at once must ask for each."""
        raise AssertionError(f"a split step of {num_decode} requests is no straight line in its context")

    def pipeline(self, num_requests: int, context_tokens: float) -> Pipeline:
        """Of a pure decode step."""
        return self.worker.pipeline(
            num_requests,
            context_tokens,
            attention_workers=self.attention_workers,
            ffn_workers=self.ffn_workers,
            micro_batches=self.micro_batches,
        )

    def report(self, shape: StepShape) -> StepReport:
        """Bubbles and exposed hops of a step with something in it."""
        return report(self.pipeline_of(shape))

    def pipeline_of(self, shape: StepShape) -> Pipeline:
        """Of any step with something in it."""
        if shape.prefill:
            return self._mixed(shape)
        return self.pipeline(shape.num_decode, shape.decode_context_tokens)

    def _curves_of(self, num_requests: int) -> tuple[int, tuple[StepCurve, ...]]:
        """Requests of a micro-batch, and the step's curve for each way that rows may cross."""
        found = self._curves.get(num_requests)
        if found is None:
            if len(self._curves) >= CACHED:
                self._curves.clear()
            used = min(self.micro_batches, num_requests)
            ways = self.worker.pipelines(
                num_requests,
                num_requests,
                attention_workers=self.attention_workers,
                ffn_workers=self.ffn_workers,
                micro_batches=self.micro_batches,
            )
            curves = tuple(curve for way in ways if (curve := step_curve(way)) is not None)
            found = self._curves[num_requests] = (math.ceil(num_requests / used), curves)
        return found

    def _mixed(self, shape: StepShape) -> Pipeline:
        """A step with prompts in it: its own rows alone, for the others are rarely at one too."""
        parts = len(shape.prefill) + shape.num_decode
        used = min(self.micro_batches, parts)
        rows = math.ceil(shape.num_tokens / used)
        attention = self.worker.attention
        sequences = len(shape.prefill) + shape.num_decode
        tail = self.worker.tail_seconds(sequences)
        seconds = max(0.0, attention.step_seconds(shape) - tail) / self.worker.card.num_layers / used
        template = self.worker.pipeline(
            rows * used,
            rows * used,
            attention_workers=1,
            ffn_workers=max(1, self.ffn_workers // self.attention_workers),
            micro_batches=used,
        )
        layer = msgspec.structs.replace(template.layers[0], attention_seconds=seconds)
        return msgspec.structs.replace(template, layers=(layer,), tail_seconds=tail)

    # -- what they go to --------------------------------------------------------------------------------------------

    def breakdown(self, shape: StepShape) -> tuple[OperationTime, ...]:
        """The attention side's operations in all its micro-batches, and as overhead what the step waits besides."""
        if not shape.num_tokens:
            return ()
        total = self.step_seconds(shape)
        own = self.worker.attention.breakdown(shape)
        spent = sum(part.seconds for part in own)
        waiting = OperationTime(
            kind="overhead", seconds=max(0.0, total - spent), flops=0.0, bytes=self.crossing_bytes(shape), bound="link"
        )
        return (*own, waiting)

    def crossing_bytes(self, shape: StepShape) -> float:
        """Out and home together, in one step of this worker."""
        return shape.num_tokens * self.worker.card.num_layers * self.worker.bytes_per_token_layer

    @property
    def kv_tokens(self) -> int:
        """How many tokens of KV fit beside the attention side's weights."""
        return self.worker.attention_memory.kv_tokens

    # -- how sure it is, what it takes --------------------------------------------------------------------------------

    @property
    def interval(self) -> tuple[float, float]:
        """Of the two sides the wider."""
        sides = (self.worker.attention.interval, self.worker.ffn.interval)
        return min(low for low, _ in sides), max(high for _, high in sides)

    @property
    def ttft_interval(self) -> tuple[float, float]:
        """Of two sides the wider."""
        sides = (self.worker.attention.ttft_interval, self.worker.ffn.ttft_interval)
        return min(low for low, _ in sides), max(high for _, high in sides)

    def request_seconds(self, prompt_tokens: int, in_flight: int = 1) -> float:
        """What the front end adds: the attention side's, where requests are."""
        return self.worker.attention.request_seconds(prompt_tokens, in_flight)

    @property
    def rests_on(self) -> tuple[Quantity, ...]:
        numbers = (*self.worker.attention.rests_on, *self.worker.ffn.rests_on)
        return tuple({id(quantity): quantity for quantity in numbers}.values())

    @property
    def classes(self) -> dict[NumberClass, int]:
        return kinds_of(self.rests_on)

    @property
    def assumptions(self) -> tuple[str, ...]:
        crossing = f"{self.worker.bytes_per_token_layer:,.0f} B in each layer, 8 bits a hidden element out and 16 home"
        said = (
            "attention/FFN split: all attention workers that share FFN workers are taken to be at the same step with "
            "the same batch",
            f"attention/FFN split: a token crosses with {crossing}",
        )
        return tuple(dict.fromkeys((*self.worker.attention.assumptions, *self.worker.ffn.assumptions, *said)))

    @property
    def ffn_chips(self) -> float:
        """This worker's share of the FFN workers' chips."""
        return self.ffn_workers * self.worker.ffn_parallel.num_chips / self.attention_workers

    def energy_joules(self, seconds: float, busy_share: float) -> float:
        """Of its own chips and its share of the FFN workers'. Raises `DeploymentError` for power that is unknown."""
        own = self.worker.attention.energy_joules(seconds, busy_share)
        if not self.shares_price:
            return own
        return own + energy_joules(self.worker.ffn_chip, 1, seconds, busy_share) * self.ffn_chips

    def usd(self, seconds: float) -> float:
        """Of its own chips and its share of the FFN workers'. Raises `DeploymentError` for a price that is unknown."""
        own = self.worker.attention.usd(seconds)
        return own + usd(self.worker.ffn_chip, 1, seconds) * self.ffn_chips if self.shares_price else own
