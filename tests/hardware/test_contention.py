"""Cores are shared out evenly, and what cores share slows each as it was measured."""

from __future__ import annotations

import pytest

from tests.study.calibrate.test_fit import section
from transload.hardware.cost.contention import Work, paces
from transload.hardware.measured import BesideEach, Interference

PREFILL, DECODE, FRONT_END = Work("prefill"), Work("decode"), Work("front_end")
BESIDE = Interference(
    prefill=BesideEach(prefill=1.5, decode=1.25, front_end=1.1),
    decode=BesideEach(prefill=2.0, decode=1.6, front_end=1.2),
)


def test_who_is_alone_is_not_slowed() -> None:
    for work in (PREFILL, DECODE, FRONT_END):
        assert paces([work], section(beside=BESIDE, num_cores=1)) == [1.0]


@pytest.mark.parametrize(
    ("works", "slower"),
    [
        ([PREFILL, DECODE], [1.25, 2.0]),
        ([PREFILL, PREFILL], [1.5, 1.5]),
        ([DECODE, DECODE], [1.6, 1.6]),
        ([DECODE, FRONT_END], [1.2, 1.0]),
    ],
)
def test_two_on_two_cores_slow_each_other_as_measured(works: list[Work], slower: list[float]) -> None:
    assert paces(works, section(beside=BESIDE, num_cores=2)) == pytest.approx([1 / factor for factor in slower])


def test_what_others_do_adds_up_while_there_are_cores_for_all() -> None:
    found = paces([DECODE, PREFILL, FRONT_END], section(beside=BESIDE, num_cores=8))
    assert found[0] == pytest.approx(1 / (1 + 1.0 + 0.2))


def test_cores_that_are_too_few_are_shared_evenly() -> None:
    calm = section(num_cores=2)
    assert paces([DECODE, PREFILL, FRONT_END], calm) == pytest.approx([2 / 3] * 3)
    assert paces([Work("decode", 2), FRONT_END], calm) == pytest.approx([2 / 3] * 2)


def test_on_one_core_nobody_is_beside_anybody() -> None:
    assert paces([DECODE, PREFILL], section(beside=BESIDE, num_cores=1)) == pytest.approx([0.5, 0.5])
