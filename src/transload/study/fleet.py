"""The chips and the model that a deployment to simulate names, with its assumptions in place. Simulates nothing."""

from __future__ import annotations

import msgspec

from transload.deploy.spec import Deployment
from transload.hardware.catalog import load_chip, load_model
from transload.hardware.chip import Chip
from transload.hardware.model_card import ModelCard
from transload.hardware.slots import parse_assumption

WEAKEST_FIRST = ("assumption", "estimate", "vendor claim", "measured", "datasheet")


class Fleet(msgspec.Struct, frozen=True, kw_only=True):
    card: ModelCard
    chips: dict[str, Chip]
    """By the name of the pool; pools of this machine's own device have none."""

    def weakest(self, *paths: str) -> str:
        """The weakest class among the chips' first known number of these paths; `measured` where no chip is named."""
        classes = set()
        for chip in self.chips.values():
            found = next((quantity for path in paths if (quantity := chip.get(path)) is not None), None)
            if found is not None:
                classes.add(found.kind)
        return next((kind for kind in WEAKEST_FIRST if kind in classes), "measured")


def fleet_of(deployment: Deployment) -> Fleet:
    """Raises `DeploymentError` for a chip or a model that the catalog does not have."""
    assumptions = [parse_assumption(text) for text in deployment.assume]
    chips = {pool.name: load_chip(pool.chip).assuming(assumptions) for pool in deployment.pools if pool.chip}
    return Fleet(card=load_model(deployment.model.path), chips=chips)
