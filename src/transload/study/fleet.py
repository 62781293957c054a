"""The chips and the model that a deployment to simulate names, with its assumptions in place, and each pool's worker as
a cost. Simulates nothing."""

from __future__ import annotations

import msgspec

from transload.deploy.spec import Deployment, Pool
from transload.errors import DeploymentError
from transload.hardware.catalog import load_chip, load_link, load_model
from transload.hardware.chip import Chip
from transload.hardware.cost.plan import Scope
from transload.hardware.cost.worker import WorkerCost
from transload.hardware.link import LinkKind
from transload.hardware.model_card import ModelCard
from transload.hardware.nearest import did_you_mean
from transload.hardware.precision import Precision, parse_dtype, with_kv, with_weights
from transload.hardware.quantity import Assumption
from transload.hardware.slots import parse_assumption

WEAKEST_FIRST = ("assumption", "estimate", "vendor claim", "measured", "datasheet")


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    card: ModelCard
    precision: Precision
    chips: dict[str, Chip]
    """By the name of the pool; pools of this machine's own device have none."""
    links: dict[frozenset[str], LinkKind]
    """By the names of the two pools; those whose kind is named."""

    def weakest(self, *paths: str) -> str:
        """The weakest class among the chips' first known number of these paths; `measured` where no chip is named."""
        classes = set()
        for chip in self.chips.values():
            found = next((quantity for path in paths if (quantity := chip.get(path)) is not None), None)
            if found is not None:
                classes.add(found.kind)
        return next((kind for kind in WEAKEST_FIRST if kind in classes), "measured")

    def worker(self, pool: Pool) -> WorkerCost:
        """A worker of the pool. Raises `DeploymentError` for a split that does not divide or an unknown number."""
        return WorkerCost(self.chips[pool.name], self.card, pool.parallel, self.precision, scope=scope_of(pool))


def scope_of(pool: Pool) -> Scope:
    """Which side of the model a pool computes."""
    if pool.role == "ffn":
        return "ffn"
    return "attention" if pool.ffn is not None else "all"


def fleet_of(deployment: Deployment) -> Fleet:
    """Raises `DeploymentError` for what the catalog does not have, and for an assumption that changes nothing."""
    assumptions = [parse_assumption(text) for text in deployment.assume]
    card = load_model(deployment.model.path)
    chips = {pool.name: load_chip(pool.chip) for pool in deployment.pools if pool.chip}
    links = {frozenset(link.between): load_link(link.kind) for link in deployment.links if link.kind}
    _check_subjects(assumptions, [*chips.values(), *links.values()])
    return Fleet(
        card=card,
        precision=_precision(deployment, card),
        chips={name: chip.assuming(assumptions) for name, chip in chips.items()},
        links={between: link.assuming(assumptions) for between, link in links.items()},
    )


def _precision(deployment: Deployment, card: ModelCard) -> Precision:
    spec = deployment.model.precision
    precision = card.precision
    if spec is not None and spec.weights is not None:
        precision = with_weights(precision, parse_dtype(spec.weights))
    if spec is not None and spec.kv is not None:
        precision = with_kv(precision, parse_dtype(spec.kv))
    return precision


def _check_subjects(assumptions: list[Assumption], things: list[Chip | LinkKind]) -> None:
    known = [name for thing in things for name in (thing.id, *thing.aliases)]
    for assumption in assumptions:
        if assumption.subject not in known:
            raise DeploymentError(
                f"assume: {assumption}: nothing in this deployment is called {assumption.subject}"
                f"{did_you_mean(assumption.subject, known)}"
            )
