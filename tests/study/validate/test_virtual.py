"""The virtual side of a validation: this machine's deployments over a chip file, with what workers do to each other."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.study.calibrate.test_fit import section
from transload.deploy.resolve import resolve
from transload.errors import DeploymentError
from transload.hardware.measured import BesideEach, FrontEnd, Interference, MeasuredLink, MeasuredSteps
from transload.study.calibrate.chip_file import write_chip_file
from transload.study.metrics import ttft_seconds
from transload.study.validate.compare import Comparison, Seen, compare, errors_of, stage_distributions
from transload.study.validate.virtual import VirtualRun, capacity, play_virtual
from transload.study.workload import ClosedLoop, Fixed, Poisson, Synthetic, synthetic

LINK = {"shm": MeasuredLink(latency_seconds=1e-5, bytes_per_second=6e9)}


def chip_file(folder: Path, **changes: object) -> str:
    path = folder / "machine.yaml"
    write_chip_file(section(links=LINK, **changes), path, is_gpu=False)
    return str(path)


def played(
    folder: Path, topology: str, *, rate: float | None = None, num_requests: int = 20, **changes: object
) -> VirtualRun:
    workload = synthetic(
        Synthetic(
            arrivals=ClosedLoop(1) if rate is None else Poisson(rate),
            input=Fixed(128),
            output=Fixed(24),
            num_requests=num_requests,
            seed=5,
        )
    )
    return play_virtual(resolve(None, topology, []), chip_file(folder, **changes), workload)


def prefill_seconds(measured: MeasuredSteps, tokens: int) -> float:
    return next(point.seconds for point in measured.prefill if point.tokens == tokens)


@pytest.mark.parametrize("topology", ["1agg", "1p1d"])
def test_one_request_at_a_time_takes_its_steps_and_its_messages(topology: str, tmp_path: Path) -> None:
    run = played(tmp_path, topology, message_seconds=0.002, front_end=FrontEnd(request_seconds=0.010))
    alone = prefill_seconds(section(), 128)
    messages = 4 if topology == "1p1d" else 2  # there and back for each assignment
    for record in run.records:
        assert ttft_seconds(record) == pytest.approx(alone + 0.010 + messages * 0.002, rel=0.02)
    assert run.summary.num_successful == 20
    assert run.summary.tpot_seconds is not None


def test_workers_that_are_busy_at_once_slow_each_other(tmp_path: Path) -> None:
    beside = Interference(prefill=BesideEach(decode=1.5), decode=BesideEach(prefill=1.5))
    calm, rough = (
        played(tmp_path, "1p1d", rate=6.0, num_requests=60, beside=factor) for factor in (Interference(), beside)
    )
    assert calm.summary.tpot_seconds is not None
    assert rough.summary.tpot_seconds is not None
    assert 1.1 < rough.summary.tpot_seconds.p50 / calm.summary.tpot_seconds.p50 < 1.6


def test_a_single_worker_is_slowed_by_nobody(tmp_path: Path) -> None:
    each = BesideEach(prefill=3.0, decode=3.0)
    beside = Interference(prefill=each, decode=each)
    calm, rough = (played(tmp_path, "1agg", rate=4.0, beside=factor) for factor in (Interference(), beside))
    assert calm.summary == rough.summary


def test_the_front_end_takes_its_share_where_no_core_is_free(tmp_path: Path) -> None:
    front_end = FrontEnd(token_cpu_seconds=0.004)
    busy, free = (played(tmp_path, "1agg", rate=4.0, num_cores=cores, front_end=front_end) for cores in (1, 16))
    assert busy.summary.tpot_seconds is not None
    assert free.summary.tpot_seconds is not None
    assert busy.summary.tpot_seconds.p50 - free.summary.tpot_seconds.p50 > 0.003


def test_the_capacity_is_what_a_crowd_gets(tmp_path: Path) -> None:
    chip = chip_file(tmp_path)
    deployment = resolve(None, "1agg", [])
    most = capacity(deployment, chip, 128, 24)
    crowd = played(tmp_path, "1agg", rate=most * 3, num_requests=80)
    assert 0.6 * most < crowd.summary.requests_per_second < 1.2 * most


def test_stages_of_a_request_sum_to_its_time(tmp_path: Path) -> None:
    run = played(tmp_path, "1p1d")
    total = sum(record.end_seconds - record.due_seconds for record in run.records) / len(run.records)
    assert sum(stage.mean for stage in run.stages.values()) == pytest.approx(total, rel=0.01)
    assert set(run.stages) == {
        "queue",
        "reserve",
        "prefill queue",
        "prefill",
        "transfer",
        "decode queue",
        "decode",
    }


def test_a_chip_that_was_not_measured_is_refused(tmp_path: Path) -> None:
    workload = synthetic(Synthetic(arrivals=ClosedLoop(1), input=Fixed(8), output=Fixed(2), num_requests=1))
    with pytest.raises(DeploymentError, match="has no `measured` section"):
        play_virtual(resolve(None, "1agg", []), "h100_sxm", workload)


def seen(run: VirtualRun, **longer: float) -> Seen:
    """`longer`: times that a percentile of TTFT takes."""
    ttft = run.summary.ttft_seconds
    assert ttft is not None
    ttft = msgspec.structs.replace(ttft, **{name: getattr(ttft, name) * times for name, times in longer.items()})
    return Seen(summary=msgspec.structs.replace(run.summary, ttft_seconds=ttft), stages=run.stages)


def test_errors_are_relative_to_what_was_measured_and_each_simulation_has_its_own(tmp_path: Path) -> None:
    run = played(tmp_path, "1agg")
    found = {
        figure.name: figure
        for figure in compare("a", "light", seen(run), seen(run), seen(run, p50=1.25, p90=1.25)).figures
    }
    for name in ("TTFT p50", "TTFT p90"):
        assert found[name].error == 0.0
        assert found[name].error_as_calibrated == pytest.approx(0.25)
    assert found["TPOT p50"].error == found["TPOT p50"].error_as_calibrated == 0.0


def test_the_typical_repeat_decides_whether_a_bound_holds(tmp_path: Path) -> None:
    run = played(tmp_path, "1agg")

    def errors(*off: float) -> tuple[list[float], bool, bool]:
        repeats = [compare("a", "light", seen(run), seen(run, p50=times), seen(run)) for times in off]
        (found,) = errors_of(repeats).values()
        ttft = next(each for each in found if each.name == "TTFT p50")
        return list(ttft.given_steps), ttft.holds, ttft.holds_as_calibrated

    each, *holds = errors(1.5, 1.0, 1.05)
    assert each == pytest.approx([0.5, 0.0, 0.05])
    assert holds == [True, True]
    assert errors(0.7, 0.8, 1.05)[1:] == (False, True)
    other: Comparison = compare("b", "light", seen(run), seen(run), seen(run))
    assert list(errors_of([other, compare("a", "light", seen(run), seen(run), seen(run))])) == [
        ("b", "light"),
        ("a", "light"),
    ]


def test_stages_that_are_felt_have_bounds_of_their_own(tmp_path: Path) -> None:
    run = played(tmp_path, "1p1d")
    slower = run.stages | {"decode": msgspec.structs.replace(run.stages["decode"], p90=run.stages["decode"].p90 * 1.3)}
    off = Seen(summary=run.summary, stages=slower)
    comparison = compare("a", "light", seen(run), off, seen(run))
    (errors,) = errors_of([comparison]).values()
    found = {each.name: each for each in errors}
    assert found["decode p50"].holds
    assert not found["decode p90"].holds
    assert found["decode p90"].holds_as_calibrated
    assert found["prefill p50"].within == 0.1
    assert "transfer p50" not in {figure.name for figure in comparison.stages}  # nobody feels it


def test_a_stage_that_a_request_has_not_gone_through_took_it_no_time() -> None:
    found = stage_distributions([{"prefill": 1.0, "transfer": 0.2}, {"prefill": 3.0}])
    assert found["prefill"].mean == 2.0
    assert (found["transfer"].mean, found["transfer"].p50) == (0.1, 0.1)
