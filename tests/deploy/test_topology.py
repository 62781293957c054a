"""The shorthand for pools."""

from __future__ import annotations

import pytest

from transload.control.messages import Role
from transload.deploy.load import loads, to_yaml
from transload.deploy.topology import parse_topology
from transload.errors import DeploymentError


@pytest.mark.parametrize(
    ("text", "pools"),
    [
        ("1p1d", [("prefill", 1), ("decode", 1)]),
        ("1agg", [("aggregated", 1)]),
        ("2agg", [("aggregated", 2)]),
        ("2p1d", [("prefill", 2), ("decode", 1)]),
        ("3p2d", [("prefill", 3), ("decode", 2)]),
        ("2P1D", [("prefill", 2), ("decode", 1)]),
        ("1agg1p1d", [("aggregated", 1), ("prefill", 1), ("decode", 1)]),
    ],
)
def test_a_shorthand_becomes_a_pool_for_each_role(text: str, pools: list[tuple[Role, int]]) -> None:
    deployment = parse_topology(text)
    assert [(pool.role, pool.workers) for pool in deployment.pools] == pools
    assert all(pool.name == pool.role and pool.device == "cpu" for pool in deployment.pools)
    assert loads(to_yaml(deployment)) == deployment


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("", "wanted numbers of workers with their roles, such as 1agg"),
        ("p1d1", "wanted numbers of workers"),
        ("1p 1d", "wanted numbers of workers"),
        ("1p1d1f", "splitting attention from FFN (roles a, f) is not available yet"),
        ("1a1f", "not available yet"),
        ("1x", 'no such role "x"; roles: p (prefill), d (decode), agg'),
        ("2p", "p workers need d workers to work with; say 2p1d"),
        ("1d", "d workers need p workers"),
        ("1p1p1d", "p is given twice"),
        ("0agg", "not from 1 to 1024"),
        ("1025agg", "not from 1 to 1024"),
        ("99999999999999999agg", "not from 1 to 1024"),
    ],
)
def test_other_shorthands_are_refused(text: str, complaint: str) -> None:
    with pytest.raises(DeploymentError) as error:
        parse_topology(text)
    assert complaint in str(error.value)
    assert str(error.value).startswith(f"--topology {text}")
