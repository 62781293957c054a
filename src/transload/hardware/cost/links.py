"""Collectives of one worker: which link they cross, and seconds as fixed + per byte. Moves nothing.

A message that leaves the scale-up domain (`scale_up.world_size`) pays the scale-out link for the part that does.
"""

from __future__ import annotations

import math

import msgspec

from transload.hardware.catalog import load_link
from transload.hardware.chip import Chip, ChipLink
from transload.hardware.cost.efficiency import Collective, Efficiency
from transload.hardware.cost.known import number


class Message(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds of a collective of `b` bytes per chip: fixed + b * per_byte."""

    fixed_seconds: float = 0.0
    seconds_per_byte: float = 0.0

    def seconds(self, num_bytes: float) -> float:
        return self.fixed_seconds + num_bytes * self.seconds_per_byte


class Reach(msgspec.Struct, frozen=True, kw_only=True):
    """How the chips of a worker are connected."""

    chips: int
    domain: int
    """Chips of the worker within one scale-up domain."""

    @property
    def domains(self) -> int:
        return math.ceil(self.chips / self.domain)


def reach_of(chip: Chip, num_chips: int) -> Reach:
    """World size unknown: the chips are taken to be in one domain (see `unknown_domain`)."""
    world = chip.scale_up.world_size
    return Reach(chips=num_chips, domain=num_chips if world is None else max(1, min(num_chips, int(world.value))))


def link_latency(chip: Chip, name: str, link: ChipLink) -> float:
    """The latency of a chip's link, or of its kind. Raises `DeploymentError` if neither is known."""
    if link.latency is not None:
        return link.latency.value
    if link.link:
        kind = load_link(link.link)
        return kind.need("latency").value
    return number(chip, f"{name}.latency")


def _fixed(chip: Chip, collective: Collective, reach: Reach) -> float:
    doublings = math.log2(reach.chips)
    fixed = collective.base_seconds + collective.doubling_seconds * doublings
    if collective.link_hops:
        fixed += collective.link_hops * doublings * link_latency(chip, "scale_up", chip.scale_up)
    return fixed + (collective.across_seconds if reach.domains > 1 else 0.0)


def all_reduce(chip: Chip, efficiency: Efficiency, num_chips: int) -> Message:
    """Every chip ends with the sum: 2 (n - 1) / n of the message goes through each chip's link; between domains the
    domain's chips share the work. Per byte of the message."""
    if num_chips == 1:
        return Message()
    reach = reach_of(chip, num_chips)
    share = efficiency.all_reduce.share
    inside = 2 * (reach.domain - 1) / reach.domain / (number(chip, "scale_up.bandwidth") * share)
    across = 0.0
    if reach.domains > 1:
        out = number(chip, "scale_out.bandwidth") * share
        across = 2 * (reach.domains - 1) / reach.domains / reach.domain / out
    return Message(fixed_seconds=_fixed(chip, efficiency.all_reduce, reach), seconds_per_byte=inside + across)


def all_to_all(
    chip: Chip, efficiency: Efficiency, num_chips: int, ranks_visited: float, domains_visited: float
) -> Message:
    """Every row goes to `ranks_visited` of the chips, spread evenly, and crosses into each of the `domains_visited`
    scale-up domains once, to be handed on inside. Per byte of one copy of what a chip has to send."""
    if num_chips == 1:
        return Message()
    reach = reach_of(chip, num_chips)
    collective = efficiency.all_to_all
    share = collective.share if reach.domains == 1 else collective.across_share or collective.share
    inside = ranks_visited * (reach.domain - 1) / reach.domain / (number(chip, "scale_up.bandwidth") * share)
    across = 0.0
    if reach.domains > 1:
        away = domains_visited * (reach.domains - 1) / reach.domains
        across = away / (number(chip, "scale_out.bandwidth") * share)
    return Message(fixed_seconds=_fixed(chip, collective, reach), seconds_per_byte=max(inside, across))


def hop(chip: Chip, efficiency: Efficiency, num_chips: int) -> Message:
    """From one stage of the pipeline to the next, per byte that one chip sends."""
    collective = efficiency.p2p
    reach = reach_of(chip, num_chips)
    name, link = ("scale_up", chip.scale_up) if reach.domains == 1 else ("scale_out", chip.scale_out)
    latency = collective.link_hops * link_latency(chip, name, link) if collective.link_hops else 0.0
    bandwidth = number(chip, f"{name}.bandwidth")
    return Message(fixed_seconds=collective.base_seconds + latency, seconds_per_byte=1 / (bandwidth * collective.share))
