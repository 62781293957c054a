"""What the server counts, and how Prometheus reads it.

One event loop writes plain numbers (a token costs well under a microsecond); the text format is made when asked for.
Holds no clock: callers bring durations. Front end and runtime feed the same object.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from transload.transfer.ffn_times import HOP_BOUNDS

TOKEN_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5, 5.0)
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
TOKEN_COUNTS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)

Labels = tuple[str, ...]


class Counter:
    """A number that only grows, one per combination of labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self.labels = name, text, tuple(labels)
        self.values: dict[Labels, float] = {} if labels else {(): 0.0}

    def add(self, amount: float = 1.0, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def collect(self) -> Metric:
        family = CounterMetricFamily(self.name, self.text, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class Gauge:
    """A number that goes up and down, one per combination of labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = ()) -> None:
        self.name, self.text, self.labels = name, text, tuple(labels)
        self.values: dict[Labels, float] = {} if labels else {(): 0.0}

    def set(self, value: float, *labels: str) -> None:
        self.values[labels] = value

    def add(self, amount: float, *labels: str) -> None:
        self.values[labels] = self.values.get(labels, 0.0) + amount

    def forget(self, first: str) -> None:
        """Drop the values whose first label is this one."""
        self.values = {labels: value for labels, value in self.values.items() if labels[0] != first}

    def collect(self) -> Metric:
        family = GaugeMetricFamily(self.name, self.text, labels=self.labels)
        for labels, value in self.values.items():
            family.add_metric(labels, value)
        return family


class Histogram:
    """A distribution over fixed buckets."""

    __slots__ = ("_bounds", "_counts", "_sum", "name", "text")

    def __init__(self, name: str, text: str, bounds: Sequence[float]) -> None:
        self.name, self.text = name, text
        self._bounds = tuple(bounds)
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += times
        self._sum += value * times

    def add_counts(self, counts: Sequence[int], total: float) -> None:
        """Values that somebody else has counted with these bounds; none if there are no counts. `total`: their sum."""
        for place, count in enumerate(counts):
            self._counts[place] += count
        self._sum += total

    def collect(self) -> Metric:
        cumulative = 0
        buckets: list[tuple[str, float]] = []
        for bound, count in zip((*map(float, self._bounds), float("inf")), self._counts, strict=True):
            cumulative += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), cumulative))
        family = HistogramMetricFamily(self.name, self.text)
        family.add_metric((), buckets=buckets, sum_value=self._sum)
        return family


class Metrics(Collector):
    """Everything `/metrics` shows, in a registry of its own: two servers in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        # The front end's: as callers feel them.
        self.requests = Counter("transload_requests", "API calls by route and how they ended.", ("route", "outcome"))
        self.rejected = Counter("transload_rejected", "API calls refused, by error code.", ("code",))
        self.calls_open = Gauge("transload_calls_open", "API calls being answered now.")
        self.ttft = Histogram("transload_ttft_seconds", "Arrival to first token.", REQUEST_SECONDS)
        self.tpot = Histogram(
            "transload_tpot_seconds", "Mean time per output token after the first, one value a request.", TOKEN_SECONDS
        )
        self.itl = Histogram("transload_itl_seconds", "Time between two tokens of a request.", TOKEN_SECONDS)
        self.end_to_end = Histogram("transload_end_to_end_seconds", "Arrival to the last byte.", REQUEST_SECONDS)
        self.prompt_tokens = Counter("transload_prompt_tokens", "Prompt tokens of admitted requests.")
        self.output_tokens = Counter("transload_output_tokens", "Tokens made.")
        self.prompt_length = Histogram("transload_prompt_length_tokens", "Prompt tokens a request.", TOKEN_COUNTS)
        self.output_length = Histogram("transload_output_length_tokens", "Output tokens a request.", TOKEN_COUNTS)
        self.prefix_hit_tokens = Counter(
            "transload_prefix_cache_hit_tokens", "Prompt tokens found in a prefix cache instead of computed."
        )
        # The runtime's.
        self.queue_length = Gauge("transload_queue_length", "Requests that wait for a worker.")
        self.batch_size = Histogram("transload_batch_size", "Requests in a step.", BATCH_SIZES)
        self.running = Gauge("transload_running_requests", "Requests a worker is running.", ("worker",))
        self.transfer_bytes = Counter("transload_transfer_bytes", "KV bytes handed over.", ("transport",))
        self.transfers = Counter("transload_transfers", "KV transfers by how they ended.", ("transport", "outcome"))
        self.transfer_seconds = Histogram(
            "transload_transfer_seconds", "First KV frame to last, one value a transfer.", REQUEST_SECONDS
        )
        self.exposed_transfer_seconds = Histogram(
            "transload_exposed_transfer_seconds",
            "The part of a transfer that prefill did not hide: end of prefill to verified.",
            REQUEST_SECONDS,
        )
        self.blocks = Gauge("transload_blocks", "KV blocks by worker and state.", ("worker", "state"))
        self.leaked_blocks = Gauge("transload_leaked_blocks", "KV blocks held by no request at rest.", ("worker",))
        self.workers_up = Gauge("transload_workers_up", "Workers that are connected and loaded.", ("pool",))
        self.restarts = Counter("transload_worker_restarts", "Times a worker was started again.", ("worker",))
        self.preemptions = Counter("transload_preemptions", "Requests put back to make room.", ("worker",))
        self._add_feed_forwards()
        self._all = [m for m in vars(self).values() if isinstance(m, Counter | Gauge | Histogram)]
        self.registry.register(self)

    def _add_feed_forwards(self) -> None:
        """Of calls between attention and FFN workers, each by the worker that says so."""
        of = ("worker",)
        self.ffn_calls = Counter("transload_ffn_calls", "Feed-forwards that an attention worker wanted.", of)
        self.ffn_rows = Counter("transload_ffn_rows", "Rows that an attention worker has sent.", of)
        self.ffn_retries = Counter("transload_ffn_retries", "Requests that were sent to another as well.", of)
        self.ffn_fallbacks = Counter("transload_ffn_fallbacks", "Feed-forwards computed by the attention worker.", of)
        self.ffn_exposed = Counter(
            "transload_ffn_exposed_seconds", "Waited for feed-forwards with nothing else to compute.", of
        )
        self.ffn_steps = Counter("transload_ffn_step_seconds", "Steps with feed-forwards elsewhere.", of)
        self.ffn_hops = Histogram(
            "transload_ffn_hop_seconds", "There and back, of calls waited for, less the FFN worker's time.", HOP_BOUNDS
        )
        self.ffn_computed_rows = Counter("transload_ffn_computed_rows", "Rows that an FFN worker has computed.", of)
        self.ffn_busy = Counter("transload_ffn_busy_seconds", "An FFN worker has computed.", of)
        self.ffn_busy_share = Gauge("transload_ffn_busy_share", "Of the last second, computing.", of)

    def collect(self) -> Iterator[Metric]:
        for metric in self._all:
            yield metric.collect()

    def call_ended(self, route: str, outcome: str, seconds: float) -> None:
        """An API call is over. `outcome`: stop, length, cancelled, error or rejected."""
        self.requests.add(1.0, route, outcome)
        self.end_to_end.observe(seconds)

    def call_rejected(self, route: str, code: str | None) -> None:
        """An API call was refused before a token was made."""
        self.requests.add(1.0, route, "rejected")
        self.rejected.add(1.0, code or "invalid_request")

    def request_ended(self, num_prompt_tokens: int, num_outputs: int, num_cached_tokens: int) -> None:
        """One choice is over."""
        self.prompt_tokens.add(num_prompt_tokens)
        self.prompt_length.observe(num_prompt_tokens)
        self.prefix_hit_tokens.add(num_cached_tokens)
        self.output_tokens.add(num_outputs)
        self.output_length.observe(num_outputs)

    def step_done(self, num_requests: int) -> None:
        """A worker finished a step with this many requests in it."""
        self.batch_size.observe(num_requests)

    def transfer_done(
        self, transport: str, num_bytes: int, seconds: float, exposed_seconds: float, outcome: str = "verified"
    ) -> None:
        """A KV transfer is over. `exposed_seconds`: what prefill did not hide."""
        self.transfers.add(1.0, transport, outcome)
        self.transfer_bytes.add(num_bytes, transport)
        self.transfer_seconds.observe(seconds)
        self.exposed_transfer_seconds.observe(exposed_seconds)

    def set_blocks(self, worker: str, by_state: Mapping[str, int]) -> None:
        """KV blocks of a worker: free, referenced, cached, quarantined."""
        for state, num_blocks in by_state.items():
            self.blocks.set(num_blocks, worker, state)

    def set_leaked_blocks(self, worker: str, num_blocks: int) -> None:
        """Blocks that are referenced although the worker has no request. Must be 0."""
        self.leaked_blocks.set(num_blocks, worker)

    def set_running(self, worker: str, num_requests: int) -> None:
        self.running.set(num_requests, worker)

    def forget_worker(self, worker: str) -> None:
        """It is dead: it has no blocks and runs nothing. What it has counted so far stays."""
        for gauge in (self.blocks, self.leaked_blocks, self.running):
            gauge.forget(worker)

    def set_queue_length(self, num_requests: int) -> None:
        self.queue_length.set(num_requests)

    def set_workers_up(self, pool: str, num_workers: int) -> None:
        self.workers_up.set(num_workers, pool)

    def worker_restarted(self, worker: str) -> None:
        self.restarts.add(1.0, worker)

    def request_preempted(self, worker: str) -> None:
        self.preemptions.add(1.0, worker)
