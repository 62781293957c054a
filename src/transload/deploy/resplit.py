"""Another split of a deployment that runs: the same workers, with their feed-forwards here or elsewhere.

Computes a deployment from a deployment. Whether it fits is decided in `placement.py`, how it is reached in the runtime.
"""

from __future__ import annotations

from collections import Counter

import msgspec

from transload.deploy.check import check
from transload.deploy.spec import Deployment, FfnSplit, Pool
from transload.deploy.topology import parse_topology
from transload.errors import DeploymentError

DECODING = ("decode", "aggregated")


def resplit(running: Deployment, topology: str, origin: Deployment) -> Deployment:
    """`running` with its feed-forwards where `topology` (such as 1p1a1f) says. How they are split is taken from
    `origin`, the deployment that was started, if it says so. Raises `DeploymentError`."""
    wanted = parse_topology(topology)
    if _num_serving(wanted) != _num_serving(running):
        have, want = (_in_words(_num_serving(deployment)) for deployment in (running, wanted))
        raise DeploymentError(
            f"split {topology}: only feed-forwards move while a server runs; it has {have}, this split has {want}"
        )
    num_ffn = sum(pool.workers for pool in wanted.pools if pool.role == "ffn")
    deployment = _together(running) if num_ffn == 0 else _apart(running, origin, num_ffn, topology)
    check(deployment, lambda _path: f"split {topology}")
    return deployment


def _together(running: Deployment) -> Deployment:
    names = {pool.name for pool in running.pools if pool.role == "ffn"}
    pools = tuple(msgspec.structs.replace(pool, ffn=None) for pool in running.pools if pool.name not in names)
    links = tuple(link for link in running.links if not names.intersection(link.between))
    return msgspec.structs.replace(running, pools=pools, links=links)


def _apart(running: Deployment, origin: Deployment, num_ffn: int, topology: str) -> Deployment:
    ffn_pools = [pool for pool in origin.pools if pool.role == "ffn"]
    if len(ffn_pools) > 1:
        raise DeploymentError(f"split {topology}: the deployment has several ffn pools; which one is to change?")
    ffn = ffn_pools[0] if ffn_pools else Pool(name="ffn", role="ffn")
    splits = {pool.name: pool.ffn for pool in origin.pools if pool.ffn is not None}
    default = next(iter(splits.values()), FfnSplit(pool=ffn.name))
    now = sum(pool.workers for pool in running.pools if pool.role == "ffn")
    if now not in (0, num_ffn) and default.split != "replica":
        raise DeploymentError(
            f"split {topology}: {now} FFN workers have parts of each layer, {num_ffn} would have others; "
            "bring the feed-forwards together first"
        )
    pools = tuple(
        msgspec.structs.replace(pool, ffn=splits.get(pool.name, default)) if pool.role in DECODING else pool
        for pool in running.pools
        if pool.role != "ffn"
    )
    links = origin.links if ffn_pools else running.links
    return msgspec.structs.replace(running, pools=(*pools, msgspec.structs.replace(ffn, workers=num_ffn)), links=links)


def _num_serving(deployment: Deployment) -> Counter[str]:
    """Workers that hold requests, by role."""
    counted: Counter[str] = Counter()
    for pool in deployment.pools:
        if pool.role != "ffn":
            counted[pool.role] += pool.workers
    return counted


def _in_words(counted: Counter[str]) -> str:
    return ", ".join(f"{number} {role}" for role, number in sorted(counted.items()))
