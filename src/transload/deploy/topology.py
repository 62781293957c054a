"""Shorthand for how many workers of which role: "1p1d", "2agg". All of them on CPU with the default model."""

from __future__ import annotations

import re

from transload.deploy.spec import Deployment, FfnSplit, Pool, PoolRole
from transload.errors import DeploymentError

DEFAULT_TOPOLOGY = "1p1d"
ROLES: dict[str, PoolRole] = {"agg": "aggregated", "p": "prefill", "d": "decode", "f": "ffn"}
ATTENTION = "a"
"""Workers that decode with their feed-forwards elsewhere; without prefill workers they prefill too."""
EXAMPLES = "1agg, 2agg, 1p1d, 2p1d, 3p2d, 1agg1p1d, 1a1f, 1p1a1f"
MOST_WORKERS = 1024
_PARTS = re.compile(r"([0-9]+)([a-z]+)")


def parse_topology(text: str) -> Deployment:
    """A pool for each part, named after its role. Raises `DeploymentError`."""
    where = f"--topology {text}"
    parts = _PARTS.findall(text.lower())
    if not parts or "".join(count + letters for count, letters in parts) != text.lower():
        raise DeploymentError(f"{where}: wanted numbers of workers with their roles, such as {EXAMPLES}")
    counts: dict[str, int] = {}
    for digits, letters in parts:
        if letters not in ROLES and letters != ATTENTION:
            raise DeploymentError(f'{where}: no such role "{letters}"; {_known()}; such as {EXAMPLES}')
        if letters in counts:
            raise DeploymentError(f"{where}: {letters} is given twice; add the numbers up")
        number = int(digits) if len(digits) < 6 else MOST_WORKERS + 1
        if not 1 <= number <= MOST_WORKERS:
            raise DeploymentError(f"{where}: {digits}{letters} is not from 1 to {MOST_WORKERS} workers")
        counts[letters] = number
    _check_partners(counts, text.lower(), where)
    roles = {**ROLES, ATTENTION: ROLES["d" if "p" in counts else "agg"]}
    split = FfnSplit(pool=ROLES["f"])
    pools = tuple(
        Pool(name=roles[letters], role=roles[letters], workers=number, ffn=split if letters == ATTENTION else None)
        for letters, number in counts.items()
    )
    return Deployment(pools=pools)


def _check_partners(counts: dict[str, int], text: str, where: str) -> None:
    """No role comes without those it works with."""
    if ATTENTION in counts and ("d" in counts or "agg" in counts):
        other = "d" if "d" in counts else "agg"
        raise DeploymentError(f"{where}: {ATTENTION} and {other} are one role with and without f workers; give one")
    if ("f" in counts) != (ATTENTION in counts):
        has, lacks = ("f", ATTENTION) if "f" in counts else (ATTENTION, "f")
        raise DeploymentError(f"{where}: {has} workers need {lacks} workers to work with, such as 1a1f or 1p1a1f")
    decodes = "d" in counts or ATTENTION in counts
    if ("p" in counts or "d" in counts) and not ("p" in counts and decodes):
        has, lacks = ("p", "d") if "p" in counts else ("d", "p")
        raise DeploymentError(
            f"{where}: {has} workers need {lacks} workers to work with; say {text}1{lacks}, "
            "or agg for workers that do both"
        )


def _known() -> str:
    return "roles: p (prefill), d (decode), agg (aggregated: both), a (attention alone) with f (the feed-forwards of a)"
