"""Plain simulations over a chip file that `transload calibrate` wrote: what works, and what is refused and why."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from tests.study.calibrate.test_fit import section
from tests.study.validate.test_virtual import LINK
from transload.cli import main
from transload.deploy.resolve import resolve
from transload.deploy.spec import Deployment
from transload.errors import DeploymentError
from transload.hardware.measured import MeasuredSteps
from transload.study.calibrate.chip_file import write_chip_file
from transload.study.simulate import simulate
from transload.study.workload import Fixed, Poisson, Synthetic, synthetic

LOAD = synthetic(Synthetic(arrivals=Poisson(1.0), input=Fixed(128), output=Fixed(16), num_requests=12, seed=1))


def machine(folder: Path, measured: MeasuredSteps | None = None) -> str:
    path = folder / "machine.yaml"
    write_chip_file(measured or section(links=LINK), path, is_gpu=False)
    return str(path)


def on(topology: str, chip: str) -> Deployment:
    deployment = resolve(None, topology, [])
    pools = tuple(msgspec.structs.replace(pool, chip=chip) for pool in deployment.pools)
    return msgspec.structs.replace(deployment, pools=pools)


@pytest.mark.parametrize("topology", ["1agg", "1p1d", "2p2d"])
def test_a_measured_machine_is_a_chip_like_any_other(topology: str, tmp_path: Path) -> None:
    chip = machine(tmp_path)
    result = simulate(on(topology, chip), LOAD)
    assert result.summary.num_successful == 12
    assert result.summary.ttft_seconds is not None
    prompt = next(point.seconds for point in section().prefill if point.tokens == 128)
    assert 0.99 * prompt < result.summary.ttft_seconds.p50 < 2 * prompt


def test_the_command_takes_it_by_path(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chip, result = machine(tmp_path), tmp_path / "result.json"
    chips = [flag for pool in ("prefill", "decode") for flag in ("--set", f"pools.{pool}.chip={chip}")]
    load = ["--rate", "1", "--requests", "10", "--input", "64", "--output", "8"]
    assert main(["simulate", "deployments/1p1d.yaml", *chips, *load, "--json", str(result)]) == 0
    assert json.loads(result.read_text())["summary"]["num_successful"] == 10
    assert "steps as measured on a machine" in capsys.readouterr().out


def test_prompts_that_are_streamed_take_longer_by_what_that_costs(tmp_path: Path) -> None:
    found = []
    for number, streaming in enumerate((1.0, 1.5)):
        folder = tmp_path / str(number)
        folder.mkdir()
        plain = section(links=LINK)
        serving = msgspec.structs.replace(plain.serving, streaming=streaming)
        chip = machine(folder, msgspec.structs.replace(plain, serving=serving))
        for topology in ("1agg", "1p1d"):
            summary = simulate(on(topology, chip), LOAD).summary
            assert summary.ttft_seconds is not None
            found.append(summary.ttft_seconds.p50)
    alone, handed_over, alone_too, slower = found
    assert alone == alone_too
    assert slower / handed_over == pytest.approx(1.5, rel=0.03)


@pytest.mark.parametrize(
    ("topology", "changes", "words"),
    [
        ("1a1f", {"links": LINK}, "was measured as whole workers, so it is not one side of a split"),
        ("1agg", {"model": "llama-3.1-8b"}, "was measured with llama-3.1-8b, but this deployment serves smollm2-135m"),
        ("1p1d", {}, "scale_out"),
    ],
)
def test_what_the_file_does_not_tell_is_refused(
    topology: str, changes: dict[str, object], words: str, tmp_path: Path
) -> None:
    with pytest.raises(DeploymentError, match=words):
        simulate(on(topology, machine(tmp_path, section(**changes))), LOAD)


def test_an_endpoint_is_taken_by_its_own_name(tmp_path: Path) -> None:
    chip = machine(tmp_path, section(links=LINK, model="their-model", dtype="unknown"))
    assert simulate(on("1agg", chip), LOAD).summary.num_successful == 12


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DeploymentError, match=r"machine\.yaml"):
        simulate(on("1agg", str(tmp_path / "machine.yaml")), LOAD)
