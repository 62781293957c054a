"""What the runtime feeds shows up in the exposition, under the promised names."""

from __future__ import annotations

from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from tests.control.feeding import D0, P0, a_request
from transload.control.controller import Controller, ControllerConfig
from transload.control.messages import KvVerified
from transload.control.rates import LinkRate
from transload.control.tracking import Tracked
from transload.server.feed import MetricsFeed
from transload.server.metrics import Metrics


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
