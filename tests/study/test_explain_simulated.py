"""What is said of a deployment on chips that are not here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from transload.cli import main
from transload.deploy.load import loads
from transload.errors import DeploymentError
from transload.study.explain_simulated import SimulatedExplanation, explain_simulated

WAFER = "{path: llama-3.1-70b, precision: {weights: bf16}}"
DENSE = '"cerebras_wse3.dense_flops.fp16=15 PFLOP/s"'


def explained(text: str) -> SimulatedExplanation:
    return explain_simulated(loads(text), "a test")


def test_a_pool_is_told_with_memory_speed_power_and_price() -> None:
    explanation = explained(
        "model: {path: llama-3.1-70b, precision: {weights: fp8, kv: fp8}}\n"
        "pools: [{name: both, role: aggregated, chip: b200_sxm, workers: 2, parallel: {tensor: 2}}]"
    )
    [pool] = explanation.pools
    assert explanation.fits
    assert (pool.num_workers, pool.chips_each, pool.weights_tier) == (2, 2, "hbm")
    assert explanation.kv_bytes_per_token == 80 * 2 * 8 * 128
    assert pool.weight_bytes == pytest.approx(70.55e9 / 2, rel=0.05)
    assert pool.kv_tokens is not None
    assert pool.kv_tokens > 1_000_000
    assert pool.prefill_seconds is not None
    assert pool.decode_seconds is not None
    assert pool.usd_per_hour == pytest.approx(4 * 2.34)
    assert pool.watts == pytest.approx(4 * 2170)


def test_a_model_that_does_not_fit_its_wafers_is_told_how_many_it_takes() -> None:
    explanation = explained(
        f"model: {WAFER}\npools: [{{name: both, role: aggregated, chip: cerebras_wse3}}]\nassume: [{DENSE}]"
    )
    assert not explanation.fits
    [problem] = explanation.problems
    assert problem.startswith("pool both: llama-3.1-70b does not fit 1 x cerebras_wse3")
    assert "it needs 4 chips or more" in problem


def test_a_number_that_nobody_published_is_told_by_name_with_how_to_assume_it() -> None:
    [problem] = explained(f"model: {WAFER}\npools: [{{name: both, role: aggregated, chip: cerebras_wse3}}]").problems
    assert "cerebras_wse3: dense_flops" in problem
    assert '--assume "cerebras_wse3.dense_flops' in problem


def test_a_link_without_a_published_latency_is_a_problem_until_one_is_given() -> None:
    text = (
        "model: {path: qwen3-8b}\n"
        "pools:\n"
        "  - {name: prefill, role: prefill, chip: h100_sxm}\n"
        "  - {name: decode, role: decode, chip: h100_sxm}\n"
        "links: [{between: [prefill, decode], kind: efa_v4_b200%s}]\n"
    )
    [problem] = explained(text % "").problems
    assert problem.startswith("link prefill - decode: efa_v4_b200: latency is unknown")
    assert explained(text % ", latency: 20 us").fits
    assert explained(text % "" + 'assume: ["efa_v4_b200.latency=20 us"]').fits


def test_feed_forwards_elsewhere_count_in_a_token_and_leave_the_attention_side_room() -> None:
    pools = (
        "pools:\n"
        "  - {name: both, role: aggregated, chip: rubin_r200, ffn: {pool: lpus}}\n"
        "  - {name: lpus, role: ffn, chip: groq3_lp30, parallel: {tensor: 64, pipeline: 2}}\n"
        "links: [{between: [both, lpus], kind: lpx_nvl_bridge, bandwidth: 400 GB/s, latency: %s}]\n"
    )
    model = "model: {path: llama-3.1-70b, precision: {weights: fp8}}\n"
    near, far = explained(model + pools % "2 us"), explained(model + pools % "12 us")
    attention, lpus = near.pools
    assert (attention.prefill_seconds, lpus.kv_tokens, lpus.decode_seconds) == (None, None, None)
    assert attention.weight_bytes < 20e9
    assert lpus.weight_bytes == pytest.approx(56.4e9 / 128, rel=0.05)
    assert far.pools[0].decode_seconds is not None
    assert attention.decode_seconds is not None
    assert far.pools[0].decode_seconds - attention.decode_seconds == pytest.approx(80 * 2 * 10e-6)


def test_ffn_workers_that_share_the_experts_hold_a_part_each() -> None:
    """Eight GPUs hold the feed-forwards that one of them could not."""
    found = explained(
        "model: {path: qwen3-235b-a22b, precision: {weights: fp8}}\n"
        "pools:\n"
        "  - {name: both, role: aggregated, chip: gb200, ffn: {pool: experts, split: expert}}\n"
        "  - {name: experts, role: ffn, workers: 8, chip: gb200}\n"
        "links: [{between: [both, experts], kind: nvlink5, latency: 5 us}]\n"
    )
    assert found.fits
    assert found.pools[1].weight_bytes < 40e9


def test_an_assumption_about_something_that_is_not_there_is_refused() -> None:
    with pytest.raises(DeploymentError, match="nothing in this deployment is called h200_sxn"):
        explained(
            "model: {path: qwen3-8b}\npools: [{name: both, role: aggregated, chip: h200_sxm}]\n"
            'assume: ["h200_sxn.power.idle=100 W"]'
        )


def test_a_pool_of_this_machine_among_chips_of_the_catalog_is_a_problem() -> None:
    [problem] = explained(
        "model: {path: qwen3-8b}\n"
        "pools:\n"
        "  - {name: prefill, role: prefill, chip: h100_sxm}\n"
        "  - {name: decode, role: decode}\n"
        "links: [{between: [prefill, decode], kind: nvlink4}]\n"
    ).problems
    assert problem == "pool decode: it names no chip; give it `chip`, as the others have"


def test_the_command_prints_it_and_its_exit_code_says_whether_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "wafer.yaml"
    file.write_text(
        f"model: {WAFER}\npools: [{{name: both, role: aggregated, chip: cerebras_wse3}}]\nassume: [{DENSE}]"
    )
    assert main(["explain", str(file)]) == 1
    assert "cannot run" in capsys.readouterr().out
    assert main(["explain", str(file), "--set", "pools.both.parallel.pipeline=5", "--json"]) == 0
    shown = msgspec.json.decode(capsys.readouterr().out, type=SimulatedExplanation)
    assert shown.pools[0].chips_each == 5
