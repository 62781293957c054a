"""What others measured against what the pipeline says from their inputs, and against the catalog alone."""

from __future__ import annotations

import statistics

import msgspec
import pytest

from transload.hardware.afd.published import (
    AscendAssumptions,
    Workload,
    ascend_results,
    fastafd_from_catalog,
    published,
    speedup_from_shares,
    step3_result,
    sweep_from_catalog,
)

FASTAFD = published().fastafd
WORKLOADS = FASTAFD.workloads


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: f"{workload.model}-{workload.context_tokens}")
def test_fastafd_follows_from_its_measured_shares_within_five_percent(workload: Workload) -> None:
    said = speedup_from_shares(workload, FASTAFD.batch_expansion, FASTAFD.micro_batches)
    assert said == pytest.approx(workload.speedup, rel=0.05)


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda workload: f"{workload.model}-{workload.context_tokens}")
def test_fastafd_from_the_catalog_alone_pays(workload: Workload) -> None:
    """How much depends on kernels that the cost model was not fitted on, so only the sign is held."""
    said = fastafd_from_catalog(workload, FASTAFD.micro_batches)
    assert said.expansion == pytest.approx(FASTAFD.batch_expansion, rel=0.1)
    assert 0.97 < said.speedup < 1.7


def test_the_claimed_speedup_changes_nothing() -> None:
    changed = msgspec.structs.replace(WORKLOADS[0], speedup=9.9)
    assert speedup_from_shares(changed, 1.5, 2) == speedup_from_shares(WORKLOADS[0], 1.5, 2)
    assert fastafd_from_catalog(changed, 2) == fastafd_from_catalog(WORKLOADS[0], 2)
    ascend = published().ascend
    points = tuple(
        msgspec.structs.replace(
            point, splits=tuple(msgspec.structs.replace(split, per_chip=1.0) for split in point.splits)
        )
        for point in ascend.points
    )
    assert ascend_results(msgspec.structs.replace(ascend, points=points)) == ascend_results(ascend)


def test_a_step_grows_with_the_ratio_where_it_was_measured_to() -> None:
    sweep = published().fastafd_sweep
    said = {(point.context_tokens, point.trays): seconds for point, seconds in sweep_from_catalog(sweep)}
    assert all(
        said[context, few] <= said[context, many] * 1.0001
        for context, few in said
        for other, many in said
        if other == context and few < many
    )
    off = [abs(seconds / (point.tpot_ms * 1e-3) - 1) for point, seconds in sweep_from_catalog(sweep)]
    assert statistics.median(off) < 1.0


def test_more_attention_dies_to_sixteen_ffn_dies_are_better_on_ascend_whatever_is_assumed() -> None:
    ascend = published().ascend
    for latency in (2e-6, 20e-6):
        for share in (0.8, 0.95):
            for reading in (0.65, 0.9):
                assumed = AscendAssumptions(latency_seconds=latency, memory_share=share, ffn_memory_share=reading)
                for result in ascend_results(ascend, assumed):
                    assert result.gains[0] < result.gains[1]
                    assert not result.gains[0] > 0 > result.gains[1]


def test_at_16k_the_break_even_ratio_lies_at_the_two_published_ones() -> None:
    """48A16F loses and 64A16F wins with the cost model's own curve, and where a die reads its experts at 65 % of the
    bandwidth; whatever that share, the ratio from which a split pays is near 3:1 and 4:1."""
    for assumed in (AscendAssumptions(), AscendAssumptions(ffn_memory_share=0.65)):
        (result, _) = ascend_results(published().ascend, assumed)
        assert result.gains[0] < 0 < result.gains[1]
    for share in (0.65, 0.75, 0.85, 0.95):
        (at_16k, _) = ascend_results(published().ascend, AscendAssumptions(ffn_memory_share=share))
        assert 2.5 < at_16k.break_even_ratio < 4.2


def test_at_32k_the_sign_hangs_on_how_fast_experts_are_read() -> None:
    slow, fast = (
        ascend_results(published().ascend, AscendAssumptions(ffn_memory_share=share))[1].gains for share in (0.65, 0.95)
    )
    assert slow[1] < -0.1
    assert fast[1] > slow[1] + 0.15
    assert fast[0] < 0.05


def test_the_stage_budget_of_step_3_holds_within_its_fill() -> None:
    step3 = published().step3
    result = step3_result(step3)
    assert result.budget_step_seconds == pytest.approx(step3.tpot_ms * 1e-3, rel=0.02)
    assert result.longest_hops_seconds == pytest.approx(273e-6, abs=2e-6)
    assert result.per_chip == pytest.approx(step3.mean_per_chip, rel=0.1)
