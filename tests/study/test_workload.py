from __future__ import annotations

from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from transload.errors import DeploymentError
from transload.study.workload import (
    Arrivals,
    ArrivalSpec,
    ClosedLoop,
    Constant,
    Fixed,
    Gamma,
    Lengths,
    LogNormal,
    Poisson,
    Ramp,
    Sessions,
    Synthetic,
    arrival_times,
    lengths,
    prefix_keys,
    synthetic,
)


def times(arrivals: Arrivals, count: int, seed: int = 1) -> list[float]:
    return list(islice(arrival_times(arrivals, np.random.default_rng(seed)), count))


def workload_of(**changes: object) -> list[ArrivalSpec]:
    fields: dict[str, object] = {"arrivals": Poisson(2.0), "input": Fixed(100), "output": Fixed(10), "num_requests": 50}
    return list(synthetic(Synthetic(**(fields | changes))))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arrivals", [Poisson(3.0), Gamma(3.0, 2.0), Constant(3.0), Ramp(1.0, 5.0, 60.0), ClosedLoop(4)]
)
def test_a_workload_is_decided_by_its_seed_alone(arrivals: Arrivals) -> None:
    spec = Synthetic(
        arrivals=arrivals,
        input=LogNormal(200.0, 0.8),
        output=LogNormal(50.0, 0.5),
        sessions=Sessions(3, 1.0, 64),
        num_requests=40,
        seed=7,
    )
    workload = synthetic(spec)
    assert list(workload) == list(workload) == list(synthetic(spec))
    assert len(list(workload)) == 40


def test_another_seed_gives_another_workload() -> None:
    assert workload_of(seed=1) != workload_of(seed=2)


def test_a_change_of_rate_leaves_the_lengths_as_they_were() -> None:
    slow = workload_of(input=LogNormal(200.0, 1.0), arrivals=Poisson(1.0))
    fast = workload_of(input=LogNormal(200.0, 1.0), arrivals=Gamma(50.0, 3.0))
    assert [a.num_input_tokens for a in slow] == [a.num_input_tokens for a in fast]


def test_poisson_gaps_have_the_mean_and_the_spread_of_an_exponential() -> None:
    gaps = np.diff([0.0, *times(Poisson(4.0), 20_000)])
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.03)
    assert gaps.std() / gaps.mean() == pytest.approx(1.0, rel=0.03)
    # An exponential exceeds its mean with probability 1/e; a uniform of equal mean would with 1/2.
    assert (gaps > 1 / 4).mean() == pytest.approx(np.exp(-1), abs=0.015)


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_wanted_rate_and_burstiness(cv: float) -> None:
    gaps = np.diff([0.0, *times(Gamma(4.0, cv), 40_000)])
    assert gaps.mean() == pytest.approx(1 / 4, rel=0.06)
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.06)


def test_constant_arrivals_are_exactly_spaced_and_do_not_drift() -> None:
    assert times(Constant(4.0), 5) == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert times(Constant(3.0), 300_001)[-1] == 100_000.0


@pytest.mark.parametrize(("start", "end"), [(1.0, 9.0), (9.0, 1.0), (5.0, 5.0), (0.0, 10.0)])
def test_a_ramp_has_the_expected_number_of_arrivals_in_each_half(start: float, end: float) -> None:
    seconds = 1000.0
    arrived = np.array(list(_until(times(Ramp(start, end, seconds), 12_000), seconds * 1.2)))
    middle = (start + end) / 2
    first_half = (start + middle) / 2 * seconds / 2
    second_half = (middle + end) / 2 * seconds / 2
    assert (arrived < seconds / 2).sum() == pytest.approx(first_half, rel=0.08)
    assert ((arrived >= seconds / 2) & (arrived < seconds)).sum() == pytest.approx(second_half, rel=0.08)
    after = ((arrived >= seconds) & (arrived < seconds * 1.2)).sum()
    assert after == pytest.approx(end * seconds * 0.2, rel=0.15)


def _until(values: list[float], end: float) -> list[float]:
    return [value for value in values if value < end]


def test_lognormal_lengths_have_the_mean_and_spread_asked_for_and_stay_in_range() -> None:
    drawn = np.array(list(islice(lengths(LogNormal(500.0, 0.6), np.random.default_rng(3)), 20_000)))
    assert drawn.mean() == pytest.approx(500, rel=0.03)
    assert drawn.std() / drawn.mean() == pytest.approx(0.6, rel=0.05)
    cut = list(islice(lengths(LogNormal(500.0, 3.0, 100, 900), np.random.default_rng(3)), 2000))
    assert min(cut) == 100
    assert max(cut) == 900


def test_a_duration_ends_the_arrivals() -> None:
    arrived = workload_of(arrivals=Constant(2.0), num_requests=None, duration_seconds=3.0)
    assert [a.at_seconds for a in arrived] == [0.0, 0.5, 1.0, 1.5, 2.0, 2.5]


def test_each_turn_of_a_session_begins_with_all_that_was_said_before() -> None:
    arrived = workload_of(sessions=Sessions(turns=3, think_seconds=2.0, num_shared_tokens=40), num_requests=9)
    for session in range(3):
        turns = [a for a in arrived if a.session == session]
        assert [a.turn for a in turns] == [0, 1, 2]
        assert turns[0].num_input_tokens == 140
        assert turns[0].think_seconds is None
        for earlier, later in pairwise(turns):
            assert later.num_input_tokens == earlier.num_input_tokens + earlier.num_output_tokens + 100
            assert later.think_seconds is not None
            assert later.block_hashes[: len(earlier.block_hashes)] == earlier.block_hashes
        assert all(len(a.block_hashes) == -(-a.num_input_tokens // 16) for a in turns)


def test_sessions_share_the_system_prompt_and_nothing_else() -> None:
    first, second = (a for a in workload_of(sessions=Sessions(1, 0.0, num_shared_tokens=40), num_requests=2))
    shared = set(first.block_hashes) & set(second.block_hashes)
    assert shared == set(first.block_hashes[:2])  # two full blocks of 16 lie within the 40 tokens


def test_prefix_keys_agree_exactly_as_far_as_the_prompts_do() -> None:
    first = ArrivalSpec(0.0, 1500, 1, (1, 2, 3))
    second = ArrivalSpec(0.0, 1500, 1, (1, 2, 9))
    third = ArrivalSpec(0.0, 1030, 1, (1, 2, 3))
    keys = [prefix_keys(a, 512, 16) for a in (first, second, third)]
    assert [len(k) for k in keys] == [93, 93, 64]
    assert keys[0][:64] == keys[1][:64]
    assert not set(keys[0][64:]) & set(keys[1][64:])
    assert keys[2] == keys[0][:64]
    assert prefix_keys(ArrivalSpec(0.0, 1500, 1), 512, 16) == ()


@given(
    hash_block=st.integers(1, 40),
    block=st.integers(1, 40),
    common=st.integers(0, 6),
    num_tokens=st.integers(1, 240),
)
def test_keys_of_blocks_beyond_the_common_part_differ_whatever_the_sizes(
    hash_block: int, block: int, common: int, num_tokens: int
) -> None:
    count = -(-num_tokens // hash_block)
    left = ArrivalSpec(0.0, num_tokens, 1, tuple(range(count)))
    right = ArrivalSpec(0.0, num_tokens, 1, tuple(n if n < common else 1000 + n for n in range(count)))
    pairs = list(zip(prefix_keys(left, hash_block, block), prefix_keys(right, hash_block, block), strict=True))
    assert len(pairs) == num_tokens // block
    for number, (one, other) in enumerate(pairs, 1):
        assert (one == other) == (number * block <= common * hash_block or common >= count)


def test_keys_of_another_namespace_never_agree() -> None:
    arrival = ArrivalSpec(0.0, 64, 1, (1, 2, 3, 4))
    assert not set(prefix_keys(arrival, 16, 16, b"a")) & set(prefix_keys(arrival, 16, 16, b"b"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"arrivals": Poisson(0.0)}, "rate is 0"),
        ({"arrivals": Poisson(float("nan"))}, "rate is nan"),
        ({"arrivals": Gamma(1.0, -1.0)}, "cv is -1"),
        ({"arrivals": Ramp(1.0, 0.0, 5.0)}, "end_rate is 0"),
        ({"arrivals": ClosedLoop(0)}, "concurrency is 0"),
        ({"input": Fixed(0)}, "input tokens is 0"),
        ({"output": LogNormal(5.0, 1.0, 10, 5)}, "output high"),
        ({"sessions": Sessions(0)}, "turns is 0"),
        ({"num_requests": 0}, "requests is 0"),
        ({"num_requests": None}, "has no end"),
    ],
)
def test_numbers_that_describe_no_workload_are_refused_by_name(changes: dict[str, object], words: str) -> None:
    with pytest.raises(DeploymentError, match=words):
        workload_of(**changes)


def test_lengths_of_a_fixed_kind_never_vary() -> None:
    kind: Lengths = Fixed(7)
    assert list(islice(lengths(kind, np.random.default_rng(0)), 3)) == [7, 7, 7]
