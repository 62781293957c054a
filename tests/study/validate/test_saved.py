"""A validation's file holds what its simulated half is made of, so that it can be made again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from tests.study.validate.test_virtual import chip_file
from transload.cli import main
from transload.deploy.resolve import resolve
from transload.errors import DeploymentError
from transload.hardware.measured import Slowdown, Speed
from transload.study.provenance import machine_facts, versions
from transload.study.validate.beside import MeasuredRun, simulate_beside
from transload.study.validate.compare import Seen
from transload.study.validate.saved import Validation, load_of, read_validation, simulate_again, write_validation
from transload.study.validate.virtual import measured_of, play_virtual
from transload.study.workload import Fixed, Poisson, Synthetic, synthetic

SPEED = Speed(product_seconds=0.0003)


@pytest.fixture
def chip(tmp_path: Path) -> str:
    return chip_file(tmp_path, speed=SPEED)


@pytest.fixture
def saved(tmp_path: Path, chip: str) -> Path:
    """What was measured is what was simulated: no error at all, and steps as calibrated."""
    deployment = resolve(None, "1p1d", [])
    workload = synthetic(Synthetic(arrivals=Poisson(2.0), input=Fixed(64), output=Fixed(8), num_requests=10, seed=3))
    run = play_virtual(deployment, chip, workload)
    measured = MeasuredRun(
        name="1p1d",
        load="light",
        deployment=deployment,
        workload=workload,
        seen=Seen(summary=run.summary, stages=run.stages),
        steps=run.steps,
        drift=Slowdown(),
    )
    beside = simulate_beside(measured, chip, follows_drift=True)
    done = Validation(
        command=("transload", "validate"),
        started_at="2026-11-26T12:00:00+00:00",
        commit="a" * 40,
        machine=machine_facts(),
        versions=versions(),
        simulated_by=("transload", "validate"),
        simulated_commit="a" * 40,
        chip=measured_of(chip),
        comparisons=(beside.comparison,),
        measured=(run.summary,),
        measured_stages=(run.stages,),
        given_steps=(beside.given_steps.summary,),
        as_calibrated=(beside.as_calibrated.summary,),
        played=(load_of(deployment, workload, SPEED, run.steps),),
    )
    path = tmp_path / "validation.json"
    write_validation(done, str(path))
    return path


def test_the_same_chip_gives_the_same_simulation(saved: Path, chip: str) -> None:
    before = read_validation(str(saved))
    after = simulate_again(str(saved), chip, lambda _line: None, command=("again",))
    assert after.as_calibrated == before.as_calibrated
    assert after.given_steps == before.given_steps
    assert after.comparisons == before.comparisons
    (comparison,) = after.comparisons
    assert {figure.error for figure in (*comparison.figures, *comparison.stages) if figure.measured} == {0.0}
    assert {speed.times for speed in comparison.speeds} == {1.0}
    assert after.simulated_by == ("again",)
    assert after.command == before.command


def test_another_chip_changes_the_simulated_half_alone(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "slower"
    folder.mkdir()
    slower = chip_file(folder, step_gap_seconds=0.05, speed=SPEED)
    before = read_validation(str(saved))
    after = simulate_again(str(saved), slower, lambda _line: None, command=("again",))
    assert after.measured == before.measured
    assert after.chip.step_gap_seconds == 0.05
    found = {figure.name: figure for figure in after.comparisons[0].figures}
    assert found["TPOT p50"].error_as_calibrated is not None
    assert found["TPOT p50"].error_as_calibrated > 0.5
    assert found["TPOT p50"].error == pytest.approx(0.0, abs=0.05)  # its steps were seen


def test_a_machine_that_was_slower_at_the_load_is_simulated_so(saved: Path, tmp_path: Path) -> None:
    folder = tmp_path / "faster"
    folder.mkdir()
    faster = Speed(product_seconds=SPEED.product_seconds / 1.5)
    chip = chip_file(folder, speed=faster)
    follows, stays = (
        simulate_again(str(saved), chip, lambda _line: None, command=("again",), follows_drift=follows)
        for follows in (True, False)
    )
    errors = [
        {figure.name: figure.error_as_calibrated for figure in each.comparisons[0].figures} for each in (follows, stays)
    ]
    assert errors[0]["TPOT p50"] == pytest.approx(0.5, abs=0.05)
    assert errors[0]["TTFT p50"] is not None
    assert errors[0]["TTFT p50"] > 0.3
    assert errors[1]["TPOT p50"] == errors[1]["TTFT p50"] == 0.0
    for each in (follows, stays):
        assert each.comparisons[0].drift is not None
        assert each.comparisons[0].drift.decode == pytest.approx(1.5)


def test_what_users_felt_goes_into_no_simulation(saved: Path, chip: str) -> None:
    before = read_validation(str(saved))
    (summary,), (stages,) = before.measured, before.measured_stages
    assert summary.ttft_seconds is not None
    felt = msgspec.structs.replace(
        before,
        measured=(
            msgspec.structs.replace(
                summary,
                ttft_seconds=msgspec.structs.replace(summary.ttft_seconds, p50=9.0),
                tpot_seconds=summary.ttft_seconds,
                output_tokens_per_second=1.0,
            ),
        ),
        measured_stages=({"prefill": stages["decode"]},),
    )
    write_validation(felt, str(saved))
    after = simulate_again(str(saved), chip, lambda _line: None, command=())
    assert after.given_steps == before.given_steps
    assert after.as_calibrated == before.as_calibrated
    assert after.comparisons[0].speeds == before.comparisons[0].speeds
    assert after.comparisons[0].figures != before.comparisons[0].figures


def test_what_is_no_validation_is_refused(saved: Path, chip: str, tmp_path: Path) -> None:
    old = tmp_path / "old.json"
    old.write_bytes(saved.read_bytes().replace(b"transload-validation-4", b"transload-validation-3"))
    for path, words in ((str(old), "of this version wrote"), (str(tmp_path / "none.json"), "cannot read")):
        with pytest.raises(DeploymentError, match=words):
            simulate_again(path, chip, lambda _line: None, command=())


def test_a_page_needs_both_halves_to_be_played(saved: Path, chip: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--again", str(saved), "--chip", chip, "--html", "page.html"]) == 2
    assert "--html" in capsys.readouterr().err


def test_figures_survive_the_file(saved: Path) -> None:
    read = read_validation(str(saved))
    assert msgspec.json.decode(msgspec.json.encode(read), type=Validation) == read
    assert [load.as_workload().num_requests for load in read.played] == [10]
