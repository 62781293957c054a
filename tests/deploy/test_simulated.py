"""The keys of a deployment file that only a simulation uses: read, written back, refused where they make no sense."""

from __future__ import annotations

import pytest

from transload.deploy.check import check_can_be_served
from transload.deploy.load import loads, to_yaml
from transload.errors import DeploymentError
from transload.hardware.parallel import Parallel

FILE = """\
model: {path: llama-3.1-70b, precision: {weights: fp8, kv: fp8}}
pools:
  - {name: prefill, role: prefill, workers: 4, chip: b200_sxm, parallel: {tensor: 8}}
  - {name: decode, role: decode, workers: 4, chip: h100_sxm, parallel: {tensor: 8}}
links:
  - {between: [prefill, decode], kind: eth400, bandwidth: 400 Gbit/s, latency: 5 us, shared_bandwidth: 1.6 TB/s}
assume: ["eth400.latency=20 us"]
"""


def refusal(old: str, new: str) -> str:
    assert old in FILE
    with pytest.raises(DeploymentError) as error:
        loads(FILE.replace(old, new), "pd.yaml")
    return str(error.value)


def test_a_simulated_deployment_is_read_and_written_back() -> None:
    deployment = loads(FILE)
    link = deployment.links[0]
    assert deployment.pools[0].chip == "b200_sxm"
    assert deployment.pools[0].parallel == Parallel(tensor=8)
    assert link.bandwidth_bytes_per_second == 50e9
    assert link.latency_seconds == 5e-6
    assert link.shared_bandwidth_bytes_per_second == 1.6e12
    assert loads(to_yaml(deployment)) == deployment


def test_what_the_catalog_does_not_know_is_refused_where_it_stands() -> None:
    assert refusal("h100_sxm", "h100_smx").startswith("pd.yaml:4: pools[1].chip")
    assert "h100_sxm" in refusal("h100_sxm", "h100_smx")
    assert "pd.yaml:6: links[0].kind" in refusal("eth400,", "eth4000,")
    assert "pd.yaml:7: assume[0]" in refusal("eth400.latency=20 us", "latency")


def test_a_number_format_or_a_rate_that_does_not_exist_is_refused_with_what_is_allowed() -> None:
    assert "bf16" in refusal("weights: fp8", "weights: fp7")
    assert "wanted a rate such as" in refusal("400 Gbit/s", "400 Gb")
    assert "units: " in refusal("400 Gbit/s", "400 parsec/s")


def test_a_split_without_a_chip_would_mean_nothing_and_is_refused() -> None:
    assert "pools.prefill.chip" in refusal("chip: b200_sxm, parallel", "parallel")


def test_pools_to_simulate_are_not_served() -> None:
    with pytest.raises(DeploymentError, match=r'pool "prefill".*transload simulate'):
        check_can_be_served(loads(FILE))
