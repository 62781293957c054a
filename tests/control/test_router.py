"""Which workers a request goes to, and the reason that is given for it."""

from __future__ import annotations

import pytest

from tests.control.feeding import ROLES, a_request
from transload.control.messages import CacheChanged, Request, WorkerId, WorkerJoined
from transload.control.rates import LinkRate
from transload.control.router import Decision, LocalPrefill, Policy, Router, uncached_tokens
from transload.control.views import WorkerView


class Cluster:
    """Workers of 64 blocks of 4 tokens; prefill takes 1 ms a token and 10 ms, decode 10 ms a step."""

    def __init__(
        self, workers: str, policy: Policy = "estimate", local_prefill: LocalPrefill = "auto", max_batch: int = 8
    ) -> None:
        self.router = Router(policy, local_prefill)
        self.views: dict[str, WorkerView] = {}
        for name in workers.split():
            joined = WorkerJoined(WorkerId(name), 1, ROLES[name[0]], ROLES[name[0]], 64, 4, 1000, max_batch)
            self.views[name] = WorkerView(joined)
        self.links = {
            (source.worker, target.worker): LinkRate(1e9, 1e-4, "shm")
            for source in self.views.values()
            for target in self.views.values()
            if (source.role, target.role) == ("prefill", "decode")
        }
        self.num_requests = 0

    def choose(self, request: Request | None = None, *, avoid_handoff: bool = False) -> Decision | None:
        request = request or a_request(1, 100)
        return self.router.choose(
            request,
            request.num_prompt_tokens,
            128.0,
            list(self.views.values()),
            self.links,
            avoid_handoff=avoid_handoff,
        )

    def decision(self, request: Request | None = None, *, avoid_handoff: bool = False) -> Decision:
        decision = self.choose(request, avoid_handoff=avoid_handoff)
        assert decision is not None
        return decision

    def busy(self, worker: str, num_requests: int, prefill_tokens: int = 0) -> None:
        """Requests of one block each that are assigned there."""
        for _ in range(num_requests):
            self.num_requests += 1
            self.views[worker].commit(a_request(1000 + self.num_requests, 4), 4, prefill_tokens)

    def cache(self, worker: str, request: Request, num_blocks: int) -> None:
        self.views[worker].take_cache_change(CacheChanged(WorkerId(worker), 1, request.block_keys[:num_blocks], ()))


# -- remote or local prefill ------------------------------------------------------------------------------------------


def test_a_prompt_is_prefilled_remotely_where_that_is_faster() -> None:
    decision = Cluster("p0 d0").decision()
    assert (decision.decode, decision.prefill) == ("d0", "p0")
    assert decision.reason == "remote prefill, estimated 0.110 s; local 0.220 s, 1 stream slowed down"


def test_a_long_queue_at_the_prefill_worker_makes_the_decode_worker_prefill() -> None:
    cluster = Cluster("p0 d0")
    cluster.busy("p0", 2, prefill_tokens=100)
    decision = cluster.decision()
    assert (decision.decode, decision.prefill) == ("d0", None)
    assert decision.reason == "local prefill, estimated 0.220 s; remote 0.310 s"


def test_streams_that_would_be_slowed_down_count_against_a_local_prefill() -> None:
    cluster = Cluster("p0 d0")
    cluster.busy("p0", 2, prefill_tokens=100)
    cluster.busy("d0", 3)
    decision = cluster.decision()
    assert decision.prefill == "p0"
    assert decision.reason == "remote prefill, estimated 0.310 s; local 0.440 s, 3 streams slowed down"


def test_a_slow_link_makes_the_decode_worker_prefill() -> None:
    cluster = Cluster("p0 d0")
    cluster.links = {pair: LinkRate(1e5, 1e-3, "tcp") for pair in cluster.links}  # a second for 100 kB
    assert cluster.decision().prefill is None


def test_a_prompt_cached_at_the_decode_worker_is_prefilled_there() -> None:
    cluster, request = Cluster("p0 d0"), a_request(1, 100)
    cluster.cache("d0", request, 24)
    decision = cluster.decision(request)
    assert decision.prefill is None
    assert decision.reason == "local prefill, estimated 0.028 s; remote 0.110 s"


def test_a_prompt_cached_at_the_prefill_worker_is_prefilled_there_though_others_wait() -> None:
    cluster, request = Cluster("p0 d0"), a_request(1, 100)
    cluster.busy("p0", 1, prefill_tokens=150)
    assert cluster.decision(request).prefill is None
    cluster.cache("p0", request, 24)
    decision = cluster.decision(request)
    assert decision.prefill == "p0"
    assert decision.reason == "remote prefill, estimated 0.164 s; local 0.220 s, 1 stream slowed down"


def test_fallback_prefills_locally_only_without_prefill_workers() -> None:
    cluster = Cluster("p0 d0", local_prefill="fallback")
    cluster.busy("p0", 5, prefill_tokens=1000)
    assert cluster.decision() == Decision(WorkerId("d0"), WorkerId("p0"), "remote prefill, estimated 5.110 s")
    del cluster.views["p0"]
    reason = "no prefill worker is left: the decode worker prefills"
    assert cluster.decision() == Decision(WorkerId("d0"), None, reason)


def test_always_prefills_locally() -> None:
    decision = Cluster("p0 d0", local_prefill="always").decision()
    assert decision == Decision(WorkerId("d0"), None, "local prefill is set to always")


def test_a_request_whose_transfers_failed_is_prefilled_locally() -> None:
    decision = Cluster("p0 d0", local_prefill="fallback").decision(avoid_handoff=True)
    assert decision.prefill is None
    assert decision.reason == "transfers of this request have failed: the decode worker prefills"


def test_a_decode_worker_without_a_link_prefills_itself() -> None:
    cluster = Cluster("p0 d0", local_prefill="fallback")
    cluster.links.clear()
    assert cluster.decision().prefill is None


def test_an_aggregated_worker_does_both() -> None:
    assert Cluster("a0").decision() == Decision(WorkerId("a0"), None, "aggregated")


def test_without_decode_workers_a_prefill_worker_does_both() -> None:
    decision = Cluster("p0").decision()
    assert decision == Decision(WorkerId("p0"), None, "no decode worker can: runs on a prefill worker")


# -- which worker -----------------------------------------------------------------------------------------------------


def test_round_robin_takes_one_after_the_other() -> None:
    cluster = Cluster("p0 p1 d0 d1 d2", policy="round_robin", local_prefill="fallback")
    decisions = [cluster.decision() for _ in range(6)]
    assert [decision.decode for decision in decisions] == ["d0", "d1", "d2", "d0", "d1", "d2"]
    assert [decision.prefill for decision in decisions] == ["p0", "p1", "p0", "p1", "p0", "p1"]


def test_who_waits_takes_no_turn() -> None:
    cluster = Cluster("p0 d0 d1", policy="round_robin", local_prefill="fallback", max_batch=1)
    cluster.busy("p0", 1)
    for _ in range(3):
        assert cluster.choose() is None
    cluster.views["p0"].release(a_request(1001, 4).id)
    assert cluster.decision().decode == "d0"


def test_least_loaded_takes_the_one_with_the_fewest_requests_and_the_shortest_queue() -> None:
    cluster = Cluster("p0 p1 d0 d1", policy="least_loaded", local_prefill="fallback")
    cluster.busy("d0", 2)
    cluster.busy("d1", 1)
    cluster.busy("p0", 1, prefill_tokens=100)
    cluster.busy("p1", 2, prefill_tokens=40)
    decision = cluster.decision()
    assert (decision.decode, decision.prefill) == ("d1", "p1")


def test_estimate_prefers_the_decode_worker_that_is_faster() -> None:
    cluster = Cluster("p0 d0 d1", local_prefill="fallback")
    for _ in range(20):
        cluster.views["d0"].decode_rate.observe(1, 0.05)
        cluster.views["d1"].decode_rate.observe(1, 0.01)
    cluster.busy("d1", 2)
    assert cluster.decision().decode == "d1"


def test_estimate_prefers_the_workers_that_have_the_prefix() -> None:
    cluster, request = Cluster("p0 p1 d0 d1", local_prefill="fallback"), a_request(1, 100)
    cluster.cache("p1", request, 20)
    cluster.cache("d1", request, 20)
    decision = cluster.decision(request)
    assert (decision.decode, decision.prefill) == ("d1", "p1")
    other = cluster.decision(a_request(2, 100))
    assert (other.decode, other.prefill) == ("d0", "p0")


def test_a_cached_prefix_does_not_outweigh_a_long_queue() -> None:
    cluster, request = Cluster("p0 p1 d0", local_prefill="fallback"), a_request(1, 100)
    cluster.cache("p1", request, 20)
    cluster.busy("p1", 1, prefill_tokens=500)
    assert cluster.decision(request).prefill == "p0"


# -- room -------------------------------------------------------------------------------------------------------------


def test_a_worker_without_room_is_passed_over_and_with_none_left_the_request_waits() -> None:
    cluster = Cluster("d0 d1", max_batch=2)
    cluster.busy("d0", 2)
    assert cluster.decision().decode == "d1"
    cluster.busy("d1", 2)
    assert cluster.choose() is None


def test_a_request_waits_for_room_at_a_prefill_worker() -> None:
    cluster = Cluster("p0 d0", max_batch=1)
    cluster.busy("p0", 1)
    assert cluster.choose() is None


def test_room_is_what_the_request_is_expected_to_need() -> None:
    cluster = Cluster("a0")
    cluster.views["a0"].commit(a_request(9, 4), 4 * 40, 0)  # leaves 24 blocks: 96 tokens
    assert cluster.choose(a_request(1, 80, max_tokens=16)) is not None
    assert cluster.choose(a_request(1, 80, max_tokens=17)) is None
    assert cluster.choose(a_request(1, 20, max_tokens=76)) is not None


def test_outputs_made_already_are_not_expected_again() -> None:
    cluster = Cluster("a0")
    cluster.views["a0"].commit(a_request(9, 4), 4 * 40, 0)
    request = a_request(1, 80, max_tokens=16)
    views = list(cluster.views.values())
    assert cluster.router.choose(request, 94, 128.0, views, {}) is not None


def test_a_worker_that_is_too_small_is_never_chosen() -> None:
    cluster = Cluster("d0 d1")
    cluster.views["d0"].num_blocks = 16
    cluster.busy("d1", 5)
    assert cluster.decision(a_request(1, 40, max_tokens=25)).decode == "d0"
    assert cluster.decision(a_request(1, 40, max_tokens=26)).decode == "d1"


def test_a_prefill_worker_that_is_too_small_for_the_prompt_is_not_asked() -> None:
    cluster = Cluster("p0 d0", local_prefill="fallback")
    cluster.views["p0"].num_blocks = 16
    assert cluster.decision(a_request(1, 64)).prefill == "p0"
    assert cluster.decision(a_request(1, 65)).prefill is None


@pytest.mark.parametrize(("max_tokens", "possible"), [(157, True), (158, False)])
def test_what_fits_no_worker_is_said_to_fit_none(max_tokens: int, possible: bool) -> None:
    cluster, request = Cluster("p0 d0"), a_request(1, 100, max_tokens)
    problem = cluster.router.why_never(request, list(cluster.views.values()))
    assert problem == (None if possible else "needs 257 tokens of KV cache; no worker holds more than 256")
    assert cluster.router.why_never(request, []) is None


@pytest.mark.parametrize(("transport", "holder"), [("direct", "d0"), ("shm", "p0")])
def test_a_prefill_rests_on_the_cache_that_its_steps_read(transport: str, holder: str) -> None:
    """In place that is the decode worker's; where cells are copied it is the prefill worker's own."""
    cluster = Cluster("p0 d0")
    cluster.links[WorkerId("p0"), WorkerId("d0")] = LinkRate(1e12, 1e-4, transport)
    link, request = cluster.links[WorkerId("p0"), WorkerId("d0")], a_request(1, 100)
    cluster.cache(holder, request, 20)
    views = cluster.views
    assert uncached_tokens(request, 100, views["p0"], views["d0"], link) == 20
    cluster.cache({"d0": "p0", "p0": "d0"}[holder], request, 25)
    assert uncached_tokens(request, 100, views["p0"], views["d0"], link) == 20
