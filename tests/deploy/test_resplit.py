"""Another split of a deployment that runs."""

from __future__ import annotations

import pytest

from transload.deploy.overrides import parse_override
from transload.deploy.resolve import resolve
from transload.deploy.resplit import resplit
from transload.deploy.spec import Deployment
from transload.errors import DeploymentError


def deployment(topology: str, *changes: str) -> Deployment:
    return resolve(topology=topology, overrides=[parse_override(change) for change in changes])


@pytest.mark.parametrize(("before", "after"), [("1p1d", "1p1a1f"), ("2agg", "2a1f"), ("1p2d", "1p2a3f")])
def test_feed_forwards_move_out_and_back(before: str, after: str) -> None:
    together = deployment(before)
    apart = resplit(together, after, together)
    assert apart == deployment(after)
    assert resplit(apart, before, together) == together


def test_what_the_file_says_of_the_split_holds_again_after_it_was_undone() -> None:
    origin = deployment("1p1a1f", "pools.decode.ffn.micro_batches=3", "pools.ffn.threads=2")
    together = resplit(origin, "1p1d", origin)
    assert [pool.name for pool in together.pools] == ["prefill", "decode"]
    assert resplit(together, "1p1a1f", origin) == origin


def test_replicas_can_be_added_and_column_parts_cannot() -> None:
    replicas = deployment("1a1f")
    assert resplit(replicas, "1a2f", replicas).pools[-1].workers == 2
    columns = deployment("1a2f", "pools.aggregated.ffn.split=column")
    with pytest.raises(DeploymentError, match="2 FFN workers have parts of each layer, 3 would have others"):
        resplit(columns, "1a3f", columns)


@pytest.mark.parametrize("topology", ["2p1d", "1agg", "2p1a1f", "1a1f"])
def test_only_feed_forwards_move(topology: str) -> None:
    running = deployment("1p1d")
    with pytest.raises(
        DeploymentError, match="only feed-forwards move while a server runs; it has 1 decode, 1 prefill"
    ):
        resplit(running, topology, running)


def test_nonsense_is_refused_as_by_serve() -> None:
    running = deployment("1p1d")
    with pytest.raises(DeploymentError, match="no such role"):
        resplit(running, "1p1z", running)
