"""How fast one worker's port to a link of the catalog is. Owns how a link's scope is read; moves nothing."""

from __future__ import annotations

import re

from transload.hardware.link import LinkKind
from transload.hardware.quantity import Quantity


def port_of(kind: LinkKind, num_chips: int) -> tuple[float, Quantity]:
    """Bytes a second of one worker's port, and the number it comes from: what software was measured to get out of the
    link where somebody has measured it. Raises `DeploymentError` if no rate is known."""
    quantity = kind.measured_bandwidth or kind.need("bandwidth")
    several = re.search(r"of (\d+) chips", kind.scope)
    if several is not None:
        return quantity.value * num_chips / int(several[1]), quantity
    if re.search(r"\b(node|system|cluster|sockets)\b", kind.scope):
        return quantity.value, quantity
    return quantity.value * num_chips, quantity
