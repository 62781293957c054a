"""Every deployment file that is shipped can be loaded, written and explained."""

from __future__ import annotations

from pathlib import Path

import pytest

from transload.cli import main
from transload.deploy.load import load, loads, to_yaml

FOLDER = Path(__file__).parent.parent / "deployments"
FILES = sorted(FOLDER.glob("*.yaml"))


def test_there_are_deployments_for_each_way_to_split_on_one_machine() -> None:
    assert {"aggregated.yaml", "1p1d.yaml", "1p1d-tcp.yaml", "2p1d.yaml"} <= {file.name for file in FILES}
    assert sorted(FOLDER.iterdir()) == FILES


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_deployment_loads_and_survives_being_written(file: Path) -> None:
    deployment = load(file)
    assert loads(to_yaml(deployment)) == deployment


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_deployment_is_explained(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(file), "--load-format", "dummy"]) in (0, 1)
    assert "what runs where" in capsys.readouterr().out


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_deployment_says_how_to_run_it(file: Path) -> None:
    assert f"#   transload serve deployments/{file.name}\n" in file.read_text()


def test_the_default_is_one_prefill_and_one_decode_worker_as_in_the_file() -> None:
    roles = [(pool.role, pool.workers, pool.device) for pool in load(FOLDER / "1p1d.yaml").pools]
    assert roles == [("prefill", 1, "cpu"), ("decode", 1, "cpu")]
