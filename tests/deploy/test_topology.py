"""The shorthand for pools."""

from __future__ import annotations

import pytest

from transload.deploy.load import loads, to_yaml
from transload.deploy.spec import PoolRole
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
        ("1a1f", [("aggregated", 1), ("ffn", 1)]),
        ("2a1f", [("aggregated", 2), ("ffn", 1)]),
        ("1p1a2f", [("prefill", 1), ("decode", 1), ("ffn", 2)]),
        ("1agg1p1d", [("aggregated", 1), ("prefill", 1), ("decode", 1)]),
    ],
)
def test_a_shorthand_becomes_a_pool_for_each_role(text: str, pools: list[tuple[PoolRole, int]]) -> None:
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
        ("1p1d1f", "f workers need a workers to work with, such as 1a1f or 1p1a1f"),
        ("1a", "a workers need f workers"),
        ("1p1f", "f workers need a workers"),
        ("1a1d1f", "a and d are one role with and without f workers"),
        ("1agg1a1f", "a and agg are one role"),
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


def test_attention_workers_are_decode_or_aggregated_workers_whose_feed_forwards_are_elsewhere() -> None:
    for text in ("1p1a1f", "1a1f"):
        *_, attention, ffn = parse_topology(text).pools
        assert attention.ffn is not None
        assert attention.ffn.pool == ffn.name == "ffn"
        assert ffn.ffn is None
    assert all(pool.ffn is None for pool in parse_topology("1p1d").pools)
