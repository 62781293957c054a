"""Shorthand for how many workers of which role: "1p1d", "2agg". All of them on CPU with the default model."""

from __future__ import annotations

import re

from transload.control.messages import Role
from transload.deploy.spec import Deployment, Pool
from transload.errors import DeploymentError

DEFAULT_TOPOLOGY = "1p1d"
ROLES: dict[str, Role] = {"agg": "aggregated", "p": "prefill", "d": "decode"}
EXAMPLES = "1agg, 2agg, 1p1d, 2p1d, 3p2d, 1agg1p1d"
MOST_WORKERS = 1024
_PARTS = re.compile(r"([0-9]+)([a-z]+)")


def parse_topology(text: str) -> Deployment:
    """A pool for each part, named after its role. Raises `DeploymentError`."""
    where = f"--topology {text}"
    parts = _PARTS.findall(text.lower())
    if not parts or "".join(count + letters for count, letters in parts) != text.lower():
        raise DeploymentError(f"{where}: wanted numbers of workers with their roles, such as {EXAMPLES}")
    counts: dict[Role, int] = {}
    for digits, letters in parts:
        if letters in ("f", "ffn", "a", "attn"):
            raise DeploymentError(
                f"{where}: splitting attention from FFN (roles a, f) is not available yet; {_known()}"
            )
        role = ROLES.get(letters)
        if role is None:
            raise DeploymentError(f'{where}: no such role "{letters}"; {_known()}; such as {EXAMPLES}')
        if role in counts:
            raise DeploymentError(f"{where}: {letters} is given twice; add the numbers up")
        number = int(digits) if len(digits) < 6 else MOST_WORKERS + 1
        if not 1 <= number <= MOST_WORKERS:
            raise DeploymentError(f"{where}: {digits}{letters} is not from 1 to {MOST_WORKERS} workers")
        counts[role] = number
    if ("prefill" in counts) != ("decode" in counts):
        has, lacks = ("p", "d") if "prefill" in counts else ("d", "p")
        raise DeploymentError(
            f"{where}: {has} workers need {lacks} workers to work with; say {text.lower()}1{lacks}, "
            "or agg for workers that do both"
        )
    pools = tuple(Pool(name=role, role=role, workers=number) for role, number in counts.items())
    return Deployment(pools=pools)


def _known() -> str:
    return "roles: p (prefill), d (decode), agg (aggregated: both)"
