"""What the runtime feeds shows up in the exposition, under the promised names."""

from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.control.feeding import D0, P0, a_request
from transload.control.controller import Controller, ControllerConfig
from transload.control.messages import ControllerEvent, KvVerified, Load, WorkerGone, WorkerId, WorkerJoined
from transload.control.rates import LinkRate
from transload.control.tracking import Tracked
from transload.server.feed import MetricsFeed
from transload.server.ffn_feed import FfnFeed
from transload.server.metrics import Metrics
from transload.transfer.ffn_times import HOP_BOUNDS

STATES = ("free", "referenced", "cached", "quarantined")


def samples(metrics: Metrics) -> dict[tuple[object, ...], float]:
    return {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(generate_latest(metrics.registry).decode())
        for sample in family.samples
    }


def test_what_the_runtime_observes_is_exposed() -> None:
    metrics = Metrics()
    metrics.set_queue_length(3)
    metrics.step_done(4)
    metrics.step_done(5)
    metrics.transfer_done("shm", 1000, 0.02, 0.004)
    metrics.transfer_done("shm", 500, 0.3, 0.0, outcome="failed")
    metrics.set_blocks("decode-0", {"free": 7, "referenced": 2, "cached": 1, "quarantined": 0})
    metrics.set_leaked_blocks("decode-0", 0)
    metrics.set_running("decode-0", 2)
    metrics.set_workers_up("prefill", 1)
    metrics.worker_restarted("prefill-0")
    metrics.request_preempted("decode-0")
    got = samples(metrics)
    worker = ("worker", "decode-0")
    assert got[("transload_queue_length",)] == 3
    assert got["transload_batch_size_bucket", ("le", "4.0")] == 1
    assert got["transload_batch_size_bucket", ("le", "8.0")] == 2
    assert got[("transload_batch_size_sum",)] == 9
    assert got["transload_transfer_bytes_total", ("transport", "shm")] == 1500
    assert got["transload_transfers_total", ("outcome", "failed"), ("transport", "shm")] == 1
    assert got[("transload_transfer_seconds_count",)] == 2
    assert got[("transload_exposed_transfer_seconds_sum",)] == 0.004
    assert got["transload_blocks", ("state", "free"), worker] == 7
    assert got["transload_leaked_blocks", worker] == 0
    assert got["transload_running_requests", worker] == 2
    assert got["transload_workers_up", ("pool", "prefill")] == 1
    assert got["transload_worker_restarts_total", ("worker", "prefill-0")] == 1
    assert got["transload_preemptions_total", worker] == 1


def test_feed_forward_calls_are_counted_from_the_totals_of_workers() -> None:
    metrics = Metrics()
    feed = FfnFeed(metrics)
    a0, f0 = WorkerId("decode-0"), WorkerId("ffn-0")
    hops = [0] * (len(HOP_BOUNDS) + 1)
    hops[0], hops[2] = 3, 4
    totals = {"calls": 10.0, "rows": 40.0, "exposed_seconds": 0.5, "hop_seconds": 0.01, "computed_here": 1.0}
    feed(a0, totals, hops)
    hops[0] += 2
    feed(a0, {**totals, "calls": 16.0, "hop_seconds": 0.02}, hops)
    feed(f0, {"rows": 40.0, "busy_seconds": 1.0, "up_seconds": 10.0}, ())
    feed(f0, {"rows": 50.0, "busy_seconds": 1.25, "up_seconds": 11.0}, ())
    got = samples(metrics)
    of_a0, of_f0 = ("worker", "decode-0"), ("worker", "ffn-0")
    assert got["transload_ffn_calls_total", of_a0] == 16
    assert got["transload_ffn_rows_total", of_a0] == 40
    assert got["transload_ffn_fallbacks_total", of_a0] == 1
    assert got["transload_ffn_exposed_seconds_total", of_a0] == 0.5
    assert got["transload_ffn_hop_seconds_bucket", ("le", str(HOP_BOUNDS[0]))] == 5
    assert got["transload_ffn_hop_seconds_bucket", ("le", str(HOP_BOUNDS[2]))] == 9
    assert got[("transload_ffn_hop_seconds_count",)] == 9
    assert got[("transload_ffn_hop_seconds_sum",)] == 0.02
    assert got["transload_ffn_busy_share", of_f0] == 0.25
    assert got["transload_ffn_busy_seconds_total", of_f0] == 1.25
    feed(a0, {**totals, "calls": 2.0, "hop_seconds": 0.001}, [1, *[0] * len(HOP_BOUNDS)])  # a new process
    feed(f0, {"rows": 5.0, "busy_seconds": 0.5, "up_seconds": 1.0}, ())
    got = samples(metrics)
    assert got["transload_ffn_calls_total", of_a0] == 18
    assert got[("transload_ffn_hop_seconds_count",)] == 10
    assert got["transload_ffn_computed_rows_total", of_f0] == 55


def test_histogram_buckets_are_cumulative_and_values_beyond_them_are_counted() -> None:
    metrics = Metrics()
    metrics.itl.observe(0.001)
    metrics.itl.observe(0.0011, times=3)
    metrics.itl.observe(99.0)
    got = samples(metrics)
    assert got["transload_itl_seconds_bucket", ("le", "0.001")] == 1
    assert got["transload_itl_seconds_bucket", ("le", "0.002")] == 4
    assert got["transload_itl_seconds_bucket", ("le", "5.0")] == 4
    assert got["transload_itl_seconds_bucket", ("le", "+Inf")] == 5
    assert got[("transload_itl_seconds_count",)] == 5


def test_two_servers_in_one_process_count_apart() -> None:
    first, second = Metrics(), Metrics()
    first.set_queue_length(5)
    assert samples(second)[("transload_queue_length",)] == 0


def test_a_transfer_is_counted_by_its_transport_though_its_request_has_ended() -> None:
    metrics, controller = Metrics(), Controller(ControllerConfig())
    request = a_request(1, 6, max_tokens=1)
    tracked = Tracked(request, 0.0)
    tracked.prefill, tracked.decode = P0, D0
    controller.ended[request.id] = tracked
    controller.links[P0, D0] = LinkRate(transport="shm")
    verified = KvVerified(worker=D0, request=request.id, epoch=0, num_bytes=100, wire_seconds=0.1, num_frames=1)
    MetricsFeed(metrics, controller)(verified, 1.0)
    assert samples(metrics)["transload_transfer_bytes_total", ("transport", "shm")] == 100


def test_what_a_dead_worker_held_is_no_longer_shown_but_what_it_counted_stays() -> None:
    metrics, controller = Metrics(), Controller(ControllerConfig())
    feed = MetricsFeed(metrics, controller)

    def tell(event: ControllerEvent) -> None:
        feed(event, 1.0)
        controller.handle(event, 1.0)

    for incarnation in (1, 2):
        tell(WorkerJoined(D0, incarnation, "decode", "decode", 11, 16, 1024, 8))
        blocks = {state: samples(metrics)["transload_blocks", ("state", state), ("worker", D0)] for state in STATES}
        assert blocks == {"free": 11, "referenced": 0, "cached": 0, "quarantined": 0}
        tell(Load(D0, 2, 0, 0, 7, 3, 1, 0, 11, 0, 0.0, 0, 0, 0))
    metrics.request_preempted(D0)
    tell(WorkerGone(D0, 1, "told late: another process has its name by now"))
    got = samples(metrics)
    assert got["transload_blocks", ("state", "referenced"), ("worker", D0)] == 3
    assert got["transload_workers_up", ("pool", "decode")] == 1
    tell(WorkerGone(D0, 2, "killed"))
    got = samples(metrics)
    assert not {name for name in got if name[0] in ("transload_blocks", "transload_running_requests")}
    assert got["transload_workers_up", ("pool", "decode")] == 0
    assert got["transload_preemptions_total", ("worker", D0)] == 1
