"""Whole simulations: they add up, repeat to the byte, feel faults, and do not depend on how time is gone through."""

from __future__ import annotations

import msgspec
import pytest

import transload
from transload.deploy.load import build, loads
from transload.deploy.overrides import apply, parse_override
from transload.deploy.spec import Deployment
from transload.deploy.tree import parse
from transload.errors import DeploymentError
from transload.study.result import Result, decode_result, encode_result
from transload.study.simulate import Progress, simulate
from transload.study.traces import Window, find_trace, open_trace
from transload.study.workload import ClosedLoop, Fixed, Gamma, LogNormal, Poisson, Sessions, Synthetic, synthetic

FILE = """\
model: {path: llama-3.1-8b}
pools:
  - {name: prefill, role: prefill, workers: 2, chip: h100_sxm, limits: {step_tokens: 2048}}
  - {name: decode, role: decode, workers: 2, chip: h100_sxm, limits: {max_batch: 64}}
links:
  - {between: [prefill, decode], kind: eth400}
targets: {ttft: 500 ms, tpot: 20 ms}
router: {local_prefill: fallback}
"""


def deployment(*changes: str) -> Deployment:
    tree = parse(FILE, "pd.yaml")
    for change in changes:
        tree = apply(tree, parse_override(change))
    return build(tree)


def poisson(rate: float = 20.0, requests: int = 200, seed: int = 1) -> Synthetic:
    return Synthetic(
        arrivals=Poisson(rate),
        input=LogNormal(800, 1.0, high=4000),
        output=LogNormal(100, 1.0, high=1000),
        num_requests=requests,
        seed=seed,
    )


def without_clock(result: Result) -> bytes:
    """All that a result says but when and where it was made."""
    return encode_result(msgspec.structs.replace(result, started_at="", cpu_seconds=None, machine=None))


def test_a_simulation_adds_up() -> None:
    result = simulate(deployment(), synthetic(poisson()), with_records=True)
    summary, records = result.summary, result.requests
    assert records is not None
    assert summary.num_successful == summary.num_requests == len(records) == 200
    assert sum(len(record.token_seconds) for record in records) == summary.num_output_tokens
    for record in records:
        times = record.token_seconds
        assert record.due_seconds < times[0]
        assert times == sorted(times)
        assert times[-1] == record.end_seconds
        assert record.num_output_tokens == len(times) == record.num_output_asked
    prefill, decode = result.pools
    assert prefill.num_prefill_tokens == summary.num_input_tokens
    assert decode.num_decode_tokens == summary.num_output_tokens - 200  # the first of each comes from the prefill
    link = result.links[0]
    assert link.num_transfers == 200 - sum(record.num_output_asked == 1 for record in records)
    kv_bytes = 2 * 32 * 8 * 128 * 2
    assert link.num_bytes >= kv_bytes * sum(
        record.num_input_tokens for record in records if record.num_output_asked > 1
    )
    for pool in result.pools:
        width = pool.series[1].seconds
        total = sum(sample.busy_share for sample in pool.series) * width * pool.num_workers
        assert total == pytest.approx(pool.busy_share * summary.duration_seconds * pool.num_workers, rel=0.05)
    assert result.cost is not None
    assert result.cost.usd is not None
    assert result.cost.num_chips == 4
    assert decode_result(encode_result(result)) == result


def test_the_summary_of_a_stream_is_that_of_the_records() -> None:
    from transload.study.metrics import summarize

    result = simulate(deployment(), synthetic(poisson()), with_records=True)
    assert result.requests is not None
    exact = summarize(result.requests, result.summary.targets)
    mine = result.summary
    for name in ("ttft_seconds", "tpot_seconds", "end_to_end_seconds"):
        one, other = getattr(mine, name), getattr(exact, name)
        assert msgspec.structs.astuple(one) == pytest.approx(msgspec.structs.astuple(other), rel=1e-9), name
    assert mine.itl_seconds is not None
    assert exact.itl_seconds is not None
    assert mine.itl_seconds.count == exact.itl_seconds.count
    assert mine.itl_seconds.mean == pytest.approx(exact.itl_seconds.mean, rel=1e-4)
    assert mine.itl_seconds.p50 == pytest.approx(exact.itl_seconds.p50, rel=0.011)
    assert mine.itl_seconds.max == pytest.approx(exact.itl_seconds.max, rel=0.01)
    for name in ("num_good", "peak_in_flight", "num_requests", "num_output_tokens", "attainment"):
        assert getattr(mine, name) == getattr(exact, name), name


def test_two_simulations_are_equal_to_the_byte_and_another_seed_is_not() -> None:
    results = [without_clock(simulate(deployment(), synthetic(poisson(seed=seed)))) for seed in (1, 1, 2)]
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("fault", [None, "kill decode-0 at 3s", "link prefill:decode at 1% from 1s to 5s"])
def test_going_step_by_step_gives_the_same_result(fault: str | None) -> None:
    faults = [] if fault is None else [fault]
    results = [
        simulate(deployment(), synthetic(poisson(requests=80)), faults=faults, with_records=True, jumps=jumps)
        for jumps in (True, False)
    ]
    assert results[0].requests == results[1].requests
    assert results[0].summary.ttft_seconds == results[1].summary.ttft_seconds
    assert results[0].waterfalls == results[1].waterfalls
    for jumped, stepped in zip(results[0].pools, results[1].pools, strict=True):
        assert jumped.num_steps == stepped.num_steps
        assert jumped.busy_share == pytest.approx(stepped.busy_share, rel=1e-9)


@pytest.mark.parametrize(
    "spec",
    [
        Synthetic(arrivals=Gamma(20.0, 3.0), input=Fixed(500), output=Fixed(50), num_requests=60),
        Synthetic(arrivals=ClosedLoop(7), input=Fixed(500), output=Fixed(50), num_requests=60),
        Synthetic(
            arrivals=Poisson(2.0), input=Fixed(300), output=Fixed(40), sessions=Sessions(4, 0.5, 200), num_requests=60
        ),
    ],
)
def test_every_kind_of_load_is_played_to_its_end(spec: Synthetic) -> None:
    result = simulate(deployment(), synthetic(spec))
    assert result.summary.num_successful == 60
    if isinstance(spec.arrivals, ClosedLoop):
        assert result.summary.peak_in_flight == 7
    if spec.sessions is not None:
        assert (result.summary.num_cached_tokens or 0) > 0.3 * result.summary.num_input_tokens


def test_shipped_traces_are_found_by_name_and_share_what_they_shared() -> None:
    trace = open_trace(find_trace("mooncake-synthetic"), window=Window(max_requests=400, shrink=32, speedup=4))
    result = transload.simulate(deployment(), trace)  # type: ignore[operator]
    assert result.summary.num_successful == 400
    assert (result.summary.num_cached_tokens or 0) > 0.03 * result.summary.num_input_tokens
    with pytest.raises(DeploymentError, match='did you mean "conversation"'):
        find_trace("conversatoin")


def test_a_worker_that_dies_costs_time_and_no_token() -> None:
    whole = simulate(deployment(), synthetic(poisson()), with_records=True)
    killed = simulate(deployment(), synthetic(poisson()), with_records=True, faults=["kill decode-1 at 2 s"])
    assert killed.num_recovered > 0
    assert killed.requests is not None
    assert whole.requests is not None
    assert [r.num_output_tokens for r in sorted(killed.requests, key=lambda r: r.index)] == [
        r.num_output_tokens for r in sorted(whole.requests, key=lambda r: r.index)
    ]
    assert killed.summary.end_to_end_seconds is not None
    assert whole.summary.end_to_end_seconds is not None
    assert killed.summary.end_to_end_seconds.max > whole.summary.end_to_end_seconds.max


def test_a_slow_link_is_felt_while_it_is_slow() -> None:
    load = synthetic(poisson())
    fast = simulate(deployment(), load)
    slow = simulate(deployment(), load, faults=["link prefill:decode at 0.2% from 2s to 6s"])
    assert slow.links[0].wire_seconds > 3 * fast.links[0].wire_seconds
    assert slow.links[0].exposed_seconds > 5 * fast.links[0].exposed_seconds
    assert slow.links[0].num_bytes == fast.links[0].num_bytes


def test_transfers_that_meet_at_one_port_take_longer() -> None:
    """Four prefill workers to one decode worker over a thin port, against ports of their own."""
    load = synthetic(Synthetic(arrivals=ClosedLoop(4), input=Fixed(2000), output=Fixed(2), num_requests=40))
    thin = deployment("pools.prefill.workers=4", "pools.decode.workers=1", "links.0.bandwidth=0.3 GB/s")
    wide = deployment("pools.prefill.workers=4", "pools.decode.workers=4", "links.0.bandwidth=0.3 GB/s")
    assert simulate(thin, load).links[0].wire_seconds > 1.5 * simulate(wide, load).links[0].wire_seconds


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        ("kill decode-7 at 3s", "no worker decode-7; did you mean"),
        ("kill decode-0 at noon", "'noon'"),
        ("link prefill:ffn at 10% from 1s to 2s", "no link prefill:ffn in this deployment; there are: prefill:decode"),
        ("link prefill:decode at 10% from 3s to 2s", "before it begins"),
        ("link prefill:decode at 0% from 1s to 2s", "above 0 %"),
        ("explode", 'wanted "kill WORKER at TIME"'),
    ],
)
def test_faults_that_mean_nothing_are_refused(words: str, problem: str) -> None:
    with pytest.raises(DeploymentError, match=problem):
        simulate(deployment(), synthetic(poisson(requests=1)), faults=[words])


def test_what_cannot_be_simulated_is_refused_by_name() -> None:
    load = synthetic(poisson(requests=1))
    with pytest.raises(DeploymentError, match=r'pool "prefill" has no chip to simulate.*pools.prefill.chip'):
        simulate(loads(FILE.replace("chip: h100_sxm, ", "", 1)), load)
    with pytest.raises(DeploymentError, match=r"llama-3\.1-405b does not fit 1 x h100_sxm"):
        simulate(deployment("model.path=llama-3.1-405b"), load)
    with pytest.raises(DeploymentError, match="nothing in this deployment is called so"):
        simulate(deployment(), load, assume=["b200_sxm.power.tdp=1 kW"])
    with pytest.raises(DeploymentError, match="lower it or leave it out"):
        simulate(deployment("pools.decode.memory=500 GiB"), load)


def test_a_request_longer_than_the_context_is_refused_and_told_of() -> None:
    load = synthetic(Synthetic(arrivals=ClosedLoop(1), input=Fixed(900_000), output=Fixed(5), num_requests=3))
    result = simulate(deployment(), load)
    assert (result.summary.num_failed, result.num_rejected) == (3, 3)
    assert "longer than the model's context" in result.notes[-1]


def test_a_run_that_is_stopped_keeps_what_it_has() -> None:
    seen: list[Progress] = []

    def stop(progress: Progress) -> bool:
        seen.append(progress)
        return progress.num_ended < 30

    result = simulate(deployment(), synthetic(poisson(requests=100_000)), progress=stop)
    assert result.was_interrupted
    assert 30 <= result.summary.num_successful < 1000
    assert result.summary.num_interrupted > 0


def test_memory_does_not_grow_with_the_tokens_of_a_trace() -> None:
    result = simulate(deployment(), synthetic(poisson(requests=50)))
    assert result.requests is None
    assert result.steps is None
    assert max(len(pool.series) for pool in result.pools) <= 201


def test_little_memory_makes_requests_give_way_and_the_result_says_how_often() -> None:
    spec = Synthetic(arrivals=ClosedLoop(24), input=Fixed(400), output=Fixed(600), num_requests=48)
    roomy, tight = (simulate(deployment(*changes), synthetic(spec)) for changes in ((), ("pools.decode.memory=1 GiB",)))
    assert [pool.num_preemptions for pool in roomy.pools] == [0, 0]
    assert tight.summary.num_successful == 48
    assert tight.pools[1].num_preemptions > 0
    assert tight.pools[1].peak_kv_share > 0.9
