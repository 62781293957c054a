"""What is measured of steps comes back out of the fit, and of the chip file."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip
from transload.hardware.cost.measured import MeasuredStepCost, along
from transload.hardware.cost.shape import StepShape
from transload.hardware.measured import (
    DecodePoint,
    FrontEnd,
    MeasuredLink,
    MeasuredSteps,
    PrefillPoint,
    Slowdown,
)
from transload.study.calibrate.chip_file import write_chip_file
from transload.study.calibrate.fit import fit, orders, step_error
from transload.study.calibrate.probes import StepOrder


def machine_seconds(order: StepOrder) -> float:
    """A machine that is not of the fitted form: a bend in its batch curve, and a floor."""
    prompt = sum(0.004 + 0.0006 * tokens + 1e-7 * tokens * (start + tokens / 2) for start, tokens in order.prefill)
    batch = len(order.decode)
    decode = 0.010 + 0.0008 * batch + 1e-6 * sum(order.decode) if batch else 0.0
    return prompt + (0.7 if order.prefill else 1.0) * decode


def measured_points(*, quick: bool = False) -> dict[StepOrder, float]:
    wanted = orders(max_batch=64, step_tokens=512, cache_tokens=32_768, block_size=16, repeats=9, quick=quick)
    return {order: machine_seconds(order) for order in wanted}


def section(**changes: object) -> MeasuredSteps:
    found = fit(measured_points())
    plain = MeasuredSteps(
        model="smollm2-135m-instruct",
        dtype="float32",
        machine="a machine",
        date="2026-11-26",
        by="a test",
        num_cores=2,
        kv_tokens=32_768,
        kv_bytes_per_token=46_080,
        prefill=found.prefill,
        prefill_context_seconds=found.prefill_context_seconds,
        decode=found.decode,
        mixed_share=found.mixed_share,
    )
    return msgspec.structs.replace(plain, **changes)


def test_the_fit_answers_what_was_measured() -> None:
    points = measured_points()
    assert step_error(fit(points), points) < 0.01


@pytest.mark.parametrize(
    "order",
    [
        StepOrder(decode=(300,) * 3),
        StepOrder(decode=(50,) * 24),
        StepOrder(prefill=((0, 200),)),
        StepOrder(prefill=((300, 100),)),
        StepOrder(prefill=((0, 100),), decode=(200,) * 5),
    ],
)
def test_the_fit_answers_what_was_not_measured(order: StepOrder) -> None:
    cost = MeasuredStepCost(section())
    shape = StepShape(order.prefill, len(order.decode), sum(order.decode))
    assert cost.step_seconds(shape) == pytest.approx(machine_seconds(order), rel=0.05)


def test_a_decode_step_is_a_line_in_its_context() -> None:
    cost = MeasuredStepCost(section(serving=Slowdown(decode=1.2), step_gap_seconds=0.001))
    fixed, each = cost.decode_coefficients(7)
    for context in (0, 100, 5000):
        assert cost.step_seconds(StepShape((), 7, context)) == pytest.approx(fixed + each * context)


def test_serving_slows_steps_and_leaves_gaps() -> None:
    bare, serving = (
        MeasuredStepCost(section(serving=Slowdown(prefill=factor, decode=factor), step_gap_seconds=gap))
        for factor, gap in ((1.0, 0.0), (1.5, 0.002))
    )
    for shape in (StepShape((), 4, 400), StepShape(((0, 64),)), StepShape(((0, 64),), 4, 400)):
        assert serving.step_seconds(shape) == pytest.approx(1.5 * bare.step_seconds(shape) + 0.002)


def test_beyond_the_last_point_the_last_line_goes_on() -> None:
    points = [(1.0, 3.0), (2.0, 5.0), (4.0, 7.0)]
    assert [along(points, x) for x in (0.5, 1.0, 1.5, 3.0, 8.0)] == [3.0, 3.0, 4.0, 6.0, 11.0]


def test_no_order_needs_more_than_the_cache_holds() -> None:
    for order in orders(max_batch=64, step_tokens=2048, cache_tokens=4096, block_size=16, repeats=9, quick=False):
        assert order.num_cached_tokens <= 4096


def test_a_chip_file_holds_what_was_measured(tmp_path: Path) -> None:
    measured = section(
        front_end=FrontEnd(request_seconds=0.004, token_cpu_seconds=0.0003),
        links={"shm": MeasuredLink(latency_seconds=1e-5, bytes_per_second=6e9)},
    )
    path = tmp_path / "machine.yaml"
    write_chip_file(measured, path, is_gpu=False)
    chip = load_chip(str(path))
    assert chip.measured is not None
    assert chip.measured.links["shm"].bytes_per_second == 6e9
    shape = StepShape(((0, 100),), 5, 700)
    assert MeasuredStepCost(chip.measured).step_seconds(shape) == pytest.approx(
        MeasuredStepCost(measured).step_seconds(shape), rel=1e-3
    )


def test_points_out_of_order_are_refused_with_the_line(tmp_path: Path) -> None:
    path = tmp_path / "machine.yaml"
    write_chip_file(section(), path, is_gpu=False)
    text = path.read_text().replace("  - requests: 2\n", "  - requests: 200\n")
    path.write_text(text)
    with pytest.raises(DeploymentError, match=r"machine\.yaml:\d+: measured.*points must ascend"):
        load_chip(str(path))


def test_one_point_is_a_constant() -> None:
    lone = section(
        prefill=(PrefillPoint(tokens=10, seconds=0.1),),
        decode=(DecodePoint(requests=1, fixed_seconds=0.02, context_token_seconds=0.0),),
    )
    assert MeasuredStepCost(lone).step_seconds(StepShape(((0, 500),))) == 0.1


def test_prompts_that_share_a_step_do_not_attend_to_each_other() -> None:
    """What grows with the square of a prompt's length grows with each by itself; what a step costs comes once."""
    points = ((16, 0.06), (128, 0.39), (512, 1.755))
    cost = MeasuredStepCost(section(prefill=tuple(PrefillPoint(tokens=n, seconds=seconds) for n, seconds in points)))
    assert cost.step_seconds(StepShape(((0, 512),))) == pytest.approx(1.755)
    assert cost.step_seconds(StepShape(((0, 128),) * 4)) == pytest.approx(4 * 0.39)
    assert cost.step_seconds(StepShape(((0, 1),) * 16)) == pytest.approx(0.06)
