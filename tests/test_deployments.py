"""Every deployment file that is shipped can be loaded, written and explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from transload.cli import main
from transload.deploy.load import load, loads, to_yaml
from transload.hardware.catalog import chip_names, load_chip, load_link
from transload.hardware.slots import parse_assumption
from transload.study.simulate import simulate
from transload.study.workload import Fixed, Poisson, Synthetic, synthetic

FOLDER = Path(__file__).parent.parent / "deployments"
FILES = sorted(FOLDER.glob("*.yaml"))
SIMULATED = [file for file in FILES if any(pool.chip for pool in load(file).pools)]
SHORT = Synthetic(arrivals=Poisson(20.0), input=Fixed(500), output=Fixed(20), sessions=None, num_requests=30,
                  duration_seconds=None, seed=0)  # fmt: skip
HERE = [file for file in FILES if file not in SIMULATED]


def test_there_are_deployments_for_each_way_to_split_on_one_machine() -> None:
    assert {"aggregated.yaml", "1p1d.yaml", "1p1d-tcp.yaml", "2p1d.yaml"} <= {file.name for file in HERE}
    assert sorted(FOLDER.iterdir()) == FILES


def test_there_is_a_deployment_for_each_system_of_the_article() -> None:
    assert {
        "b200-aggregated", "b200-pd", "cpx-r200", "trainium-cs3", "gpu-sn50", "rubin-lpx", "gb200-nvl72-pd",
    } <= {file.stem for file in SIMULATED}  # fmt: skip


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_deployment_loads_and_survives_being_written(file: Path) -> None:
    deployment = load(file)
    assert loads(to_yaml(deployment)) == deployment


@pytest.mark.parametrize("file", HERE, ids=lambda file: file.stem)
def test_a_shipped_deployment_is_explained(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(file), "--load-format", "dummy"]) in (0, 1)
    assert "what runs where" in capsys.readouterr().out


@pytest.mark.parametrize("file", SIMULATED, ids=lambda file: file.stem)
def test_a_shipped_deployment_to_simulate_fits_its_chips(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(file)]) == 0
    shown = capsys.readouterr().out
    assert "what runs where" in shown
    for assumption in load(file).assume:
        assert f"assumed  {assumption}" in shown


@pytest.mark.parametrize("file", SIMULATED, ids=lambda file: file.stem)
def test_every_assumption_of_a_shipped_deployment_is_about_a_number_that_nobody_published(file: Path) -> None:
    """An assumption must not hide behind a number that the catalog has."""
    deployment = load(file)
    for assumption in map(parse_assumption, deployment.assume):
        thing = (load_chip if assumption.subject in chip_names() else load_link)(assumption.subject)
        assert thing.get(assumption.quantity) is None, f"{assumption}: the catalog knows it"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_deployment_says_how_to_run_it(file: Path) -> None:
    verb = "simulate" if file in SIMULATED else "serve"
    assert f"#   transload {verb} deployments/{file.name}" in file.read_text()


@pytest.mark.parametrize("file", SIMULATED, ids=lambda file: file.stem)
def test_a_shipped_deployment_to_simulate_serves_a_short_workload_and_tells_its_assumptions(file: Path) -> None:
    deployment = load(file)
    result = simulate(deployment, synthetic(SHORT), name=file.stem)
    assert result.summary.num_successful == SHORT.num_requests
    assert result.summary.num_failed == 0
    assert result.summary.tpot_seconds is not None
    assert result.assumptions == deployment.assume
    assert {pool.name for pool in result.pools} == {pool.name for pool in deployment.pools}
    assert [link.crosses for link in result.links].count("kv") == sum(p.role == "prefill" for p in deployment.pools)
    assert result.cost is not None
    assert result.cost.usd is not None
    assert result.cost.energy_joules is not None


def test_the_default_is_one_prefill_and_one_decode_worker_as_in_the_file() -> None:
    roles = [(pool.role, pool.workers, pool.device) for pool in load(FOLDER / "1p1d.yaml").pools]
    assert roles == [("prefill", 1, "cpu"), ("decode", 1, "cpu")]
