"""Transfers that share ports, as fluids: each gets its max-min fair share, anew whenever one begins or ends.

A wire leads from one worker to another through ports: the sender's, the receiver's, and a trunk if there is one. What
several wires have in common they share. Owns rates and when a transfer ends; knows nothing of what is transferred.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


class Port:
    """Something that bytes go through, so many a second."""

    __slots__ = ("bytes_per_second", "flows")

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self.flows: dict[Flow, None] = {}


class Wire:
    """One direction between two workers."""

    __slots__ = ("factor", "latency_seconds", "ports")

    def __init__(self, ports: Sequence[Port], latency_seconds: float) -> None:
        self.ports = tuple(ports)
        self.latency_seconds = latency_seconds
        self.factor = 1.0
        """Of its rate when alone, for a link that is disturbed."""

    @property
    def bytes_per_second(self) -> float:
        """What a transfer gets that is alone on all its ports."""
        return self.factor * min(port.bytes_per_second for port in self.ports)


class Flow:
    """A transfer under way."""

    __slots__ = ("began", "item", "rate", "remaining_bytes", "since", "version", "wire")

    def __init__(self, item: Any, wire: Wire, num_bytes: float, now: float) -> None:
        self.item = item
        """What it stands for, for whoever started it."""
        self.wire = wire
        self.remaining_bytes = num_bytes
        self.rate = 0.0
        self.began = self.since = now
        self.version = 0
        """Goes up with every change of rate: an end that was foretold for an earlier one does not count."""


class Flows:
    """All transfers of a cluster. `foretell(at, flow, version)` is called when the end of one is known anew."""

    def __init__(self, foretell: Callable[[float, Flow, int], None]) -> None:
        self._foretell = foretell

    def start(self, item: Any, wire: Wire, num_bytes: float, now: float) -> Flow:
        """A transfer begins."""
        flow = Flow(item, wire, num_bytes, now)
        alone = True
        for port in wire.ports:
            if port.flows:
                alone = False
            port.flows[flow] = None
        if alone:
            self._set(flow, wire.bytes_per_second, now)
        else:
            self._share(self._component([flow]), now)
        return flow

    def end(self, flow: Flow, now: float) -> None:
        """A transfer has ended, or is broken off: the others share what it leaves."""
        flow.version += 1
        neighbours: dict[Flow, None] = {}
        for port in flow.wire.ports:
            port.flows.pop(flow, None)
            neighbours |= port.flows
        if neighbours:
            self._share(self._component(list(neighbours)), now)

    def changed(self, wires: Sequence[Wire], now: float) -> None:
        """The wires have got another factor."""
        flows = {flow: None for wire in wires for port in wire.ports for flow in port.flows}
        if flows:
            self._share(self._component(list(flows)), now)

    @staticmethod
    def _component(flows: list[Flow]) -> list[Flow]:
        """These and all that share a port with one of them, and so on."""
        found = dict.fromkeys(flows)
        waiting = list(flows)
        while waiting:
            for port in waiting.pop().wire.ports:
                for other in port.flows:
                    if other not in found:
                        found[other] = None
                        waiting.append(other)
        return list(found)

    def _share(self, flows: list[Flow], now: float) -> None:
        """Progressive filling: all rates grow together; who meets a full port stays at that."""
        room = {port: port.bytes_per_second for flow in flows for port in flow.wire.ports}
        users = {port: len(port.flows) for port in room}
        open_flows = dict.fromkeys(flows)
        while open_flows:
            limits = {
                flow: min(
                    flow.wire.bytes_per_second if flow.wire.factor < 1 else float("inf"),
                    *(room[port] / users[port] for port in flow.wire.ports),
                )
                for flow in open_flows
            }
            level = min(limits.values())
            for flow in [flow for flow, limit in limits.items() if limit <= level * (1 + 1e-12)]:
                del open_flows[flow]
                self._set(flow, level, now)
                for port in flow.wire.ports:
                    room[port] = max(0.0, room[port] - level)
                    users[port] -= 1

    def _set(self, flow: Flow, rate: float, now: float) -> None:
        if rate == flow.rate:
            return
        flow.remaining_bytes = max(0.0, flow.remaining_bytes - flow.rate * (now - flow.since))
        flow.since = now
        flow.rate = rate
        flow.version += 1
        self._foretell(now + flow.remaining_bytes / rate, flow, flow.version)
