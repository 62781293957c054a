"""What others measured against what the pipeline says from their inputs, and against the catalog alone."""

from __future__ import annotations

import statistics

import msgspec
import pytest

from transload.hardware.afd.published import (
    AscendAssumptions,
    Workload,
    ascend_break_even,
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
    other = ascend_results(msgspec.structs.replace(ascend, points=points))
    assert [result.gains for result in other] == [result.gains for result in ascend_results(ascend)]


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
    for latency in (2e-6, 20e-6, 120e-6):
        for reading in (0.65, 0.9):
            for result in ascend_results(ascend, AscendAssumptions(latency_seconds=latency, ffn_memory_share=reading)):
                assert result.gains[0] < result.gains[1]


def test_on_ascend_three_of_the_four_signs_follow_from_what_was_published() -> None:
    """Batches, experts a die and unsplit rates are the publication's, the rest the catalog's."""
    at_16k, at_32k = ascend_results(published().ascend)
    assert at_16k.gains[0] < 0 < at_16k.gains[1]
    assert at_32k.gains[1] > 0
    assert 2.5 < at_16k.break_even_ratio < 4.2
    assert at_32k.gains[1] == pytest.approx(183.3 / 168.2 - 1, abs=0.03)


def test_the_fourth_sign_follows_from_hops_of_some_hundred_microseconds_more() -> None:
    """From where to where they must lie moves with the cost model; that there is such a range does not."""
    ascend = published().ascend
    lose = [ascend_break_even(ascend, point, 0, "latency_seconds", 1e-2) for point in (0, 1)]
    win = [ascend_break_even(ascend, point, 1, "latency_seconds", 1e-2) for point in (0, 1)]
    assert lose[0] == 0.0
    low, high = lose[1], min(value or 0.0 for value in win)
    assert low is not None
    assert 50e-6 < low < high < 300e-6
    for result in ascend_results(ascend, AscendAssumptions(latency_seconds=(low + high) / 2)):
        assert result.gains[0] < 0 < result.gains[1]


def test_with_all_experts_of_a_die_read_both_ratios_would_lose_at_32k() -> None:
    _, at_32k = ascend_results(published().ascend, AscendAssumptions(experts_per_die=16))
    assert at_32k.gains[1] < -0.1


def test_no_pipeline_makes_both_measured_steps() -> None:
    """The same batch a die and fewer rows an FFN die, and yet the measured step is longer."""
    for result in ascend_results(published().ascend):
        fewer, more = result.splits
        assert fewer.measured_step_seconds > 1.08 * more.measured_step_seconds
        assert fewer.step_seconds <= more.step_seconds


def test_the_stage_budget_of_step_3_holds_within_its_fill() -> None:
    step3 = published().step3
    result = step3_result(step3)
    assert result.budget_step_seconds == pytest.approx(step3.tpot_ms * 1e-3, rel=0.02)
    assert result.longest_hops_seconds == pytest.approx(273e-6, abs=2e-6)
    assert result.per_chip == pytest.approx(step3.mean_per_chip, rel=0.1)
