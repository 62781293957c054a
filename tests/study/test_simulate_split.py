"""Simulations of deployments whose feed-forwards another pool computes: what crosses, who waits, what does not fit."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from transload.deploy.load import build
from transload.deploy.overrides import apply, parse_override
from transload.deploy.spec import Deployment
from transload.deploy.tree import parse
from transload.errors import DeploymentError
from transload.hardware.afd.split_cost import SplitCost
from transload.hardware.cost.shape import StepShape
from transload.hardware.cost.worker import WorkerCost
from transload.study.result import LinkResult, Result, decode_result, encode_result
from transload.study.simulate import simulate
from transload.study.simulated import plan_cluster
from transload.study.simulated_table import show_simulated
from transload.study.workload import Fixed, Poisson, Synthetic, synthetic

FILE = """\
model: {path: llama-3.1-8b, precision: {weights: fp8}}
pools:
  - {name: prefill, role: prefill, workers: 1, chip: h100_sxm, limits: {step_tokens: 2048}}
  - {name: decode, role: decode, workers: 2, chip: h100_sxm, limits: {max_batch: 64}, ffn: {pool: experts}}
  - {name: experts, role: ffn, workers: 1, chip: h100_sxm}
links:
  - {between: [prefill, decode], kind: eth400}
  - {between: [decode, experts], kind: nvlink4, latency: 5 us}
router: {local_prefill: fallback}
"""
LAYERS, HIDDEN = 32, 4096


def deployment(*changes: str, file: str = FILE) -> Deployment:
    tree = parse(file, "split.yaml")
    for change in changes:
        tree = apply(tree, parse_override(change))
    return build(tree)


def run(*changes: str, rate: float = 20.0, requests: int = 60) -> Result:
    workload = Synthetic(arrivals=Poisson(rate), input=Fixed(500), output=Fixed(40), num_requests=requests, seed=3)
    return simulate(deployment(*changes), synthetic(workload))


def hop(result: Result) -> LinkResult:
    return next(link for link in result.links if link.crosses == "activations")


@pytest.fixture(scope="module")
def result() -> Result:
    return run()


def test_every_decoded_token_crosses_in_every_layer_and_comes_back(result: Result) -> None:
    assert result.summary.num_successful == 60
    decoded = next(pool for pool in result.pools if pool.name == "decode").num_decode_tokens
    assert hop(result).num_bytes == decoded * LAYERS * 3 * HIDDEN
    assert hop(result).kind == "nvlink4"
    assert (hop(result).source, hop(result).target) == ("decode", "experts")


def test_the_ffn_pool_is_counted_in_chips_money_and_time(result: Result) -> None:
    ffn = next(pool for pool in result.pools if pool.role == "ffn")
    assert ffn.kv_tokens == ffn.num_decode_tokens == 0
    assert 0.0 < ffn.busy_share < 1.0
    assert result.cost is not None
    assert result.cost.num_chips == 4
    assert result.cost.usd == pytest.approx(sum(pool.usd or 0.0 for pool in result.pools))


def test_the_same_simulation_twice_is_the_same(result: Result) -> None:
    again = run()
    assert (again.summary, again.pools, again.links) == (result.summary, result.pools, result.links)


def test_a_slower_link_makes_tokens_slower_and_shows_as_exposed(result: Result) -> None:
    slow = run("links.1.latency=200us")
    assert result.summary.tpot_seconds is not None
    assert slow.summary.tpot_seconds is not None
    assert slow.summary.tpot_seconds.p50 > result.summary.tpot_seconds.p50 + LAYERS * 300e-6
    assert hop(slow).exposed_seconds > 10 * hop(result).exposed_seconds


def test_more_micro_batches_hide_a_slow_link_better() -> None:
    cluster = [
        plan_cluster(deployment("links.1.latency=100us", f"pools.decode.ffn.micro_batches={count}")) for count in (1, 4)
    ]
    shape = StepShape(num_decode=64, decode_context_tokens=64 * 1000)
    serial, filled = (each.pool("decode").cost.step_seconds(shape) for each in cluster)
    assert filled < serial


def test_attention_workers_that_share_an_ffn_worker_slow_each_other_down() -> None:
    shape = StepShape(num_decode=64, decode_context_tokens=64 * 100)
    times = [
        plan_cluster(deployment(f"pools.decode.workers={count}")).pool("decode").cost.step_seconds(shape)
        for count in (1, 64)
    ]
    assert times[1] > 1.2 * times[0]


def test_the_attention_side_has_more_room_for_kv_than_a_whole_model() -> None:
    cluster = plan_cluster(deployment())
    pool = cluster.pool("decode")
    assert isinstance(pool.cost, SplitCost)
    whole = WorkerCost(pool.chip, cluster.card, pool.spec.parallel, cluster.precision)
    assert pool.cost.kv_tokens > whole.kv_tokens


def test_an_ffn_pool_that_does_not_hold_its_side_is_refused_with_the_chips_it_needs() -> None:
    with pytest.raises(DeploymentError, match=r'pools "decode" and "experts": .*FFN side .* it needs \d+ chips'):
        plan_cluster(deployment("pools.experts.chip=groq3_lp30"))


def test_a_link_that_is_missing_or_unknown_is_refused() -> None:
    without = FILE.replace("  - {between: [decode, experts], kind: nvlink4, latency: 5 us}\n", "")
    with pytest.raises(DeploymentError, match="activations cross between them in every layer, and no link says how"):
        plan_cluster(deployment(file=without))
    with pytest.raises(DeploymentError, match="lpx_nvl_bridge: bandwidth is unknown"):
        plan_cluster(deployment("links.1.kind=lpx_nvl_bridge"))


def test_bandwidth_in_the_file_is_a_workers_port() -> None:
    cluster = plan_cluster(deployment("links.1.bandwidth=10 GB/s", "pools.decode.parallel.tensor=2"))
    assert cluster.hops["decode"].bytes_per_second == 10e9
    assert cluster.hops["decode"].wire.attention_bytes_per_second == 5e9


WHILE_ASKED = "kill experts-0 at 1003 ms"
"""With two FFN workers a call of a decode step is with this one then."""


def disturbed(*changes: str, fault: str = "kill experts-0 at 1 s") -> Result:
    workload = Synthetic(arrivals=Poisson(20.0), input=Fixed(500), output=Fixed(200), num_requests=40, seed=3)
    return simulate(deployment(*changes), synthetic(workload), faults=[fault])


def test_a_replica_takes_over_when_an_ffn_worker_is_killed() -> None:
    result = disturbed("pools.experts.workers=2", fault=WHILE_ASKED)
    assert result.summary.num_successful == 40
    assert result.num_recovered == 0
    (loss,) = result.ffn_losses
    assert (loss.worker, loss.at_seconds) == ("experts-0", 1.003)
    assert loss.back_seconds > 1.2
    assert loss.num_steps >= 1
    assert loss.num_retries > 0
    assert (loss.num_computed_here, loss.num_failed_steps) == (0, 0)
    assert 0.0 < loss.longest_delay_seconds < 0.01


def test_the_last_ffn_worker_gone_is_made_good_where_there_is_room_for_its_weights() -> None:
    result = disturbed("pools.decode.memory=20 GiB")
    assert result.summary.num_successful == 40
    (loss,) = result.ffn_losses
    assert loss.num_computed_here > 0
    assert loss.num_failed_steps == 0
    assert loss.longest_delay_seconds > 1.0  # the weights are loaded first


def test_where_there_is_none_requests_start_over_and_the_reason_says_what_is_lacking() -> None:
    result = disturbed()
    (loss,) = result.ffn_losses
    assert loss.num_failed_steps > 0
    assert result.summary.num_successful < 40
    assert any("lacks" in note and "pools.decode.memory" in note for note in result.notes)
    assert result.summary.num_successful + result.summary.num_failed == 40


def test_with_fallback_error_calls_wait_for_the_worker_or_for_their_deadline() -> None:
    waited = disturbed("pools.decode.ffn.fallback=error")
    (loss,) = waited.ffn_losses
    assert waited.summary.num_successful == 40
    assert loss.longest_delay_seconds == pytest.approx(loss.back_seconds - 1.0, abs=0.2)
    failed = disturbed("pools.decode.ffn.fallback=error", "pools.decode.ffn.deadline=200 ms")
    assert failed.ffn_losses[0].num_failed_steps > 0
    assert any("no FFN worker has answered for 0.2 s" in note for note in failed.notes)


def test_before_and_after_a_loss_steps_are_those_of_a_run_without_it() -> None:
    """A worker that dies when nothing runs is not felt; the closed form and the played steps meet."""
    quiet = disturbed("pools.experts.workers=2", fault="kill experts-1 at 1000 s")
    whole = simulate(
        deployment("pools.experts.workers=2"),
        synthetic(Synthetic(arrivals=Poisson(20.0), input=Fixed(500), output=Fixed(200), num_requests=40, seed=3)),
    )
    assert quiet.summary == whole.summary
    assert whole.ffn_losses == ()


def test_an_ffn_worker_can_be_named_by_its_name_only_and_not_be_paused() -> None:
    with pytest.raises(DeploymentError, match="no worker experts-3; did you mean"):
        disturbed(fault="kill experts-3 at 1 s")
    with pytest.raises(DeploymentError, match="can be killed, not paused"):
        disturbed(fault="pause experts-0 at 1 s for 1 s")


def test_a_result_says_how_both_sides_and_the_wire_spent_a_step(result: Result) -> None:
    (split,) = result.splits
    assert (split.attention, split.ffn, split.attention_workers, split.ffn_workers) == ("decode", "experts", 2, 1)
    assert 0.0 < split.attention_busy < 1.0
    assert 0.0 < split.ffn_busy < 1.0
    assert split.attention_bubble == 1.0 - split.attention_busy
    assert split.bytes_per_token == LAYERS * 3 * HIDDEN
    assert split.crossing_bytes >= split.bytes_per_token
    assert 0.0 <= split.exposed_hop_seconds < split.step_seconds
    slow = run("links.1.latency=200us").splits[0]
    assert slow.exposed_share > split.exposed_share
    assert slow.waits_for == "latency"
    assert decode_result(encode_result(result)) == result


def test_the_table_shows_both_sides_and_what_was_felt_of_a_loss() -> None:
    console = Console(width=160, record=True, file=io.StringIO())
    show_simulated(disturbed("pools.experts.workers=2", fault=WHILE_ASKED), console)
    text = console.export_text()
    assert "decode with experts" in text
    assert "A busy" in text
    assert "hops exposed" in text
    assert "experts-0, back at" in text
    assert "calls asked of others" in text
