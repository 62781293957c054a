"""The machine's speed is found from how long steps took, like beside like, and from nothing else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec
import pytest

from tests.study.validate.test_virtual import chip_file
from transload.deploy.resolve import resolve
from transload.hardware.measured import BesideEach, Interference, Slowdown
from transload.study.timeline import Step
from transload.study.validate.steps import WINDOW_SECONDS, Key, Speeds, StepSum, find_speeds, sum_steps
from transload.study.validate.virtual import play_virtual, play_with_steps
from transload.study.workload import LogNormal, Poisson, Synthetic, Workload, synthetic

PREFILL: Key = ("w", "prefill")
DECODE: Key = ("w", "decode")


def alone(steps: StepSum) -> float:
    return steps.num_steps * (0.003 * steps.num_prefill_tokens + 0.01 + 0.002 * steps.num_decode)


def taking(times: float, shapes: Iterable[tuple[int, int, int, int]]) -> list[StepSum]:
    """Steps of (window, prompt tokens, decodes, number), so many times as long as alone."""
    found = [StepSum("w", *shape, 0.0) for shape in shapes]
    return [msgspec.structs.replace(each, seconds=times * alone(each)) for each in found]


class Simulation:
    """Plays the same shapes with the speeds it is told, each a tenth longer for what others do."""

    def __init__(self, shapes: Sequence[tuple[int, int, int, int]]) -> None:
        self.shapes = shapes
        self.num_played = 0

    def __call__(self, speeds: Speeds) -> tuple[int, list[StepSum]]:
        self.num_played += 1
        steps = [
            msgspec.structs.replace(each, seconds=each.seconds * speeds[each.key].at(each.window * WINDOW_SECONDS))
            for each in taking(1.1, self.shapes)
        ]
        return self.num_played, steps


def test_the_speed_is_that_of_the_steps_without_what_the_simulation_adds_itself() -> None:
    prompts, decodes = [(0, 128, 0, 20), (0, 64, 2, 20)], [(0, 0, 1, 100), (0, 0, 4, 50)]
    play = Simulation([*prompts, *decodes])
    speeds, played = find_speeds([*taking(1.65, prompts), *taking(1.32, decodes)], alone, play)
    assert speeds[PREFILL].times == pytest.approx(1.5)
    assert speeds[DECODE].times == pytest.approx(1.2)
    assert speeds[DECODE].by_window == pytest.approx((1.2,))
    assert played == play.num_played == 2  # the second try has steps as long as those that were seen


def test_other_shapes_than_the_real_run_had_do_not_look_like_another_speed() -> None:
    """Large batches take longer, which is no slowness of the machine."""
    speeds, _ = find_speeds(taking(1.1, [(0, 0, 32, 100)]), alone, Simulation([(0, 0, 1, 200)]))
    assert speeds[DECODE].times == pytest.approx(1.0)


def test_a_machine_that_is_slow_for_a_while_is_slow_then() -> None:
    shapes = [(window, 0, 1, 200) for window in range(3)]
    slow = [*taking(1.1, shapes[:1]), *taking(2.2, shapes[1:2]), *taking(1.1, shapes[2:])]
    speeds, _ = find_speeds(slow, alone, Simulation(shapes))
    assert speeds[DECODE].by_window == pytest.approx((1.0, 2.0, 1.0))
    assert speeds[DECODE].times == pytest.approx(4 / 3)
    assert speeds[DECODE].at(WINDOW_SECONDS * 1.5) == speeds[DECODE].by_window[1]
    assert speeds[DECODE].at(WINDOW_SECONDS * 99) == speeds[DECODE].times


def test_few_steps_do_not_make_a_speed_of_their_own() -> None:
    shapes = [(0, 0, 1, 200), (1, 0, 1, 10)]
    speeds, _ = find_speeds([*taking(1.1, shapes[:1]), *taking(11.0, shapes[1:])], alone, Simulation(shapes))
    assert speeds[DECODE].by_window[1] == pytest.approx(speeds[DECODE].times) == pytest.approx((200 + 100) / 210)


def test_steps_that_are_not_simulated_at_all_are_as_long_as_they_took() -> None:
    """A prompt that stayed where the simulation hands all over."""
    speeds, _ = find_speeds(
        [*taking(1.1, [(0, 0, 1, 200)]), *taking(1.7, [(0, 64, 0, 9)])], alone, Simulation([(0, 0, 1, 200)])
    )
    assert speeds[PREFILL].times == pytest.approx(1.7)
    assert speeds[DECODE].times == pytest.approx(1.0)


def test_steps_are_summed_from_the_beginning_of_the_load_with_the_gap_behind_each() -> None:
    def step(start: float, seconds: float, tokens: int = 0) -> Step:
        return Step(
            worker="w",
            start_seconds=start,
            end_seconds=start + seconds,
            num_prefill_tokens=tokens,
            num_decode=2,
            num_requests=2,
        )

    steps = [step(3.0, 0.5), step(5.0, 0.5), step(6.0, 0.25), step(7.0, 0.5, 16), step(15.5, 0.5)]
    found = sum_steps(steps, began_seconds=4.0, gap_seconds=0.125)
    assert found == (
        StepSum("w", 0, 0, 2, 2, 1.0),
        StepSum("w", 0, 16, 2, 1, 0.625),
        StepSum("w", 1, 0, 2, 1, 0.625),
    )


def load(rate: float) -> Workload:
    return synthetic(
        Synthetic(
            arrivals=Poisson(rate), input=LogNormal(128.0, 0.5), output=LogNormal(24.0, 0.5), num_requests=60, seed=7
        )
    )


@pytest.mark.parametrize(("topology", "rate"), [("1agg", 4.0), ("1p1d", 7.0)])
def test_a_run_of_another_speed_is_found_again_from_its_steps(topology: str, rate: float, tmp_path: Path) -> None:
    beside = Interference(prefill=BesideEach(decode=1.2), decode=BesideEach(prefill=1.15))
    chip, deployment = chip_file(tmp_path, beside=beside), resolve(None, topology, [])
    real = play_virtual(deployment, chip, load(rate), drift=Slowdown(prefill=1.25, decode=1.6))
    found, speeds = play_with_steps(deployment, chip, load(rate), real.steps)
    times = {kind: speed.times for (_, kind), speed in speeds.items()}
    assert times["prefill"] == pytest.approx(1.25, rel=0.05)
    assert times["decode"] == pytest.approx(1.6, rel=0.05)
    as_calibrated = play_virtual(deployment, chip, load(rate))
    for field in ("ttft_seconds", "tpot_seconds"):
        wanted, given, foretold = (getattr(run.summary, field).p50 for run in (real, found, as_calibrated))
        assert given == pytest.approx(wanted, rel=0.1)
        assert foretold < 0.85 * wanted
