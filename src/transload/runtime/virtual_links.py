"""Frames between workers in virtual time: one at a time on each link, all links sharing the ports they go through."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transload.control.messages import (
    CancelSends,
    Frame,
    KvData,
    LinkMeasured,
    PeerFrame,
    PeerLost,
    PeerUp,
    SendFrame,
    SendsDrained,
    WorkerId,
)
from transload.runtime.cluster import FrameFault, KvContents, Link, LiveWorker, Watcher, faithful, is_intact
from transload.runtime.cost import CostModel
from transload.runtime.flows import Flow, Flows

FRAMES = 4 << 40
"""Their place in the order of what happens at the same time: after everything else."""

if TYPE_CHECKING:
    from transload.runtime.virtual import VirtualRuntime


def crosses(frame: Frame) -> bool:
    """Whether cells are copied: not those that lie where they belong."""
    return isinstance(frame, KvData) and not frame.in_place


class VirtualLinks:
    """The wires of a runtime, and what is on them."""

    def __init__(
        self,
        runtime: VirtualRuntime,
        cost: CostModel,
        frame_fault: FrameFault | None,
        contents: KvContents | None,
        watcher: Watcher | None,
    ) -> None:
        self._runtime = runtime
        self._cost = cost
        self._factors: dict[tuple[str, str], float] = {}
        self._frame_fault = frame_fault
        self._contents = contents
        self._watcher = watcher
        self._flows = Flows(self._foretell)
        self._num_met = 0

    # -- links come and go --------------------------------------------------------------------------------------------

    def link_up(self, one: LiveWorker, other: LiveWorker) -> None:
        """Two workers have met."""
        self._num_met += 1
        for here, there in ((one, other), (other, one)):
            wire = self._cost.wire(here.name, there.name)
            wire.factor = self._factors.get((here.spec.pool, there.spec.pool), 1.0)
            rank = FRAMES | here.index << 20 | there.index
            link = self._runtime.links[here.name, there.name] = Link(here, there, wire, rank, here.num_links)
            here.num_links += 1
            self.tell(here, self._up(link), link)
        source, target = (one, other) if one.spec.role == "prefill" else (other, one)
        self._measure(self._runtime.links[source.name, target.name])

    def _up(self, link: Link) -> PeerUp:
        here, there = link.source, link.target
        num_blocks = there.spec.engine.num_blocks
        most = here.spec.most_windows
        if here.spec.in_place and there.spec.in_place and (most is None or here.num_windows < most):
            here.num_windows += 1
            link.window, here.window_end = here.window_end, here.window_end + num_blocks
            if self._contents is not None:
                self._contents.window_opened(here.name, link.window, there.name)
        return PeerUp(there.name, here.spec.one_sided, link.number, link.window, num_blocks, self._num_met)

    def _measure(self, link: Link) -> None:
        rate, latency = link.wire.bytes_per_second, link.wire.latency_seconds
        transport = "direct" if link.window is not None else "virtual"
        self._runtime.tell_controller(LinkMeasured(link.source.name, link.target.name, transport, rate, latency))

    def scale_pools(self, source_pool: str, target_pool: str, factor: float) -> None:
        """From now on the wires from one pool to another give so much of what they should."""
        self._factors[source_pool, target_pool] = factor
        links = [
            link
            for link in self._runtime.links.values()
            if (link.source.spec.pool, link.target.spec.pool) == (source_pool, target_pool)
        ]
        for link in links:
            link.wire.factor = factor
        self._flows.changed([link.wire for link in links], self._runtime.now)
        for link in links:
            if link.source.spec.role == "prefill":
                self._measure(link)

    def tell(self, worker: LiveWorker, event: PeerUp | PeerLost, link: Link | None) -> None:
        """A link counts from when its engine hears of it: what the engine said before was meant for the one before."""
        if worker.backlog is not None:
            worker.backlog.append((self.tell, (worker, event, link)))
            return
        if link is not None:
            worker.links[event.peer] = link
        else:
            worker.links.pop(event.peer, None)
        self._runtime.tell_worker(worker, event)

    def cut(self, one: WorkerId, other: WorkerId, seconds: float) -> None:
        """Their link breaks and they live on; so much later one of them has dialed the other again."""
        links = self._runtime.links
        pairs = [pair for pair in ((one, other), (other, one)) if pair in links]
        broken = [links.pop(pair) for pair in pairs]
        for link in broken:
            self.break_link(link, source_died=False)
        for link in broken:  # only now: whoever hears of it gives blocks away that nothing may write into any more
            self.tell(link.source, PeerLost(link.target.name), None)
            if link.source.spec.role == "prefill":
                self._runtime.tell_controller(LinkMeasured(link.source.name, link.target.name, "", 0.0, 0.0))
        if pairs:
            here, there = (self._runtime.workers[worker] for worker in (one, other))
            self._runtime.outside(self._runtime.now + seconds, self._mend, here, there)

    def _mend(self, here: LiveWorker, there: LiveWorker) -> None:
        if here.is_alive and there.is_alive and (here.name, there.name) not in self._runtime.links:
            self.link_up(here, there)

    # -- frames -------------------------------------------------------------------------------------------------------

    def send(self, link: Link, send: SendFrame) -> None:
        """Put a frame in line."""
        link.queue.append(send)
        if link.current is None:
            self._next(link)

    def _next(self, link: Link) -> None:
        """Frames without bytes take no time on the wire."""
        while link.is_open and link.current is None and link.queue:
            send = link.current = link.queue.popleft()
            frame = send.frame
            num_bytes = frame.num_bytes if isinstance(frame, KvData) and crosses(frame) else 0
            if crosses(frame) and self._contents is not None:
                self._contents.send_started(link.source.name, send)
            if num_bytes:
                link.flow = self._flows.start(link, link.wire, num_bytes, self._runtime.now)
            else:
                self._end(link)

    def _foretell(self, at_seconds: float, flow: Flow, version: int) -> None:
        self._runtime.at_frame(at_seconds, flow.item, self._flow_ended, flow, version)

    def _flow_ended(self, flow: Flow, version: int) -> None:
        if version != flow.version:
            return
        link: Link = flow.item
        link.flow = None
        now = self._runtime.now
        if self._watcher is not None and link.current is not None and isinstance(link.current.frame, KvData):
            num_bytes = link.current.frame.num_bytes
            self._watcher.sent(link.source.name, link.target.name, flow.began, now, num_bytes)
        self._flows.end(flow, now)
        self._end(link)
        self._next(link)

    def _end(self, link: Link) -> None:
        """The frame has left the source. A paused source does not notice before it goes on."""
        if not link.is_open or link.current is None:
            return  # it ended with one of its ends
        if link.source.backlog is not None:
            link.source.backlog.append((self._end_late, (link,)))
            return
        send, link.current = link.current, None
        source, target, frame = link.source, link.target, send.frame
        arrivals = (self._frame_fault or faithful)(source.name, target.name, frame)
        if isinstance(frame, KvData):
            self._end_data(link, send, intact=all(map(is_intact, arrivals)))
        at = self._runtime.now + link.wire.latency_seconds
        for delay, arriving, arrived_checksum in arrivals:
            event = PeerFrame(source.name, arriving, arrived_checksum)
            self._runtime.at_frame(at + delay, link, self._arrive, target, send, event)
        if link.drains:
            drains, link.drains = link.drains, []
            for drain in drains:
                self.drained(source, drain)

    def _end_late(self, link: Link) -> None:
        self._end(link)
        self._next(link)

    def _end_data(self, link: Link, send: SendFrame, *, intact: bool) -> None:
        """The source has been read. A one-sided write is in place with that, whatever becomes of the frame: the
        receiver cannot refuse it, so it must hit blocks that are granted to this transfer or kept aside for it."""
        target = link.target
        if not crosses(send.frame):
            back = self._runtime.links[target.name, link.source.name]
            assert back.window is not None, f"{target.name} has not let the steps of {link.source.name} in"
        elif self._contents is not None:
            self._contents.send_ended(link.source.name, send)
        if target.spec.one_sided:
            transfer = send.frame.transfer
            granted = (transfer, send.frame.epoch) in target.permissions or target.engine.pool.is_quarantined(transfer)
            assert granted, f"{target.name}: a write of transfer {transfer} hits foreign blocks"
            if crosses(send.frame) and self._contents is not None:
                self._contents.landed(link.source.name, send, intact=intact)

    def _arrive(self, target: LiveWorker, send: SendFrame, event: PeerFrame) -> None:
        """A frame comes in. Where the receiver copies, it copies now, if it still may."""
        if not target.is_alive:
            return
        if target.backlog is not None:
            target.backlog.append((self._arrive, (target, send, event)))
            return
        frame = event.frame
        permitted = (frame.transfer, frame.epoch) in target.permissions and not target.spec.one_sided
        if self._contents is not None and isinstance(frame, KvData) and permitted:
            self._contents.landed(event.peer, send, intact=event.arrived_checksum == frame.checksum)
        self._runtime.tell_worker(target, event)

    def cancel(self, worker: LiveWorker, command: CancelSends) -> None:
        """Take back what waits of a transfer, and say when nothing of it is on the wire."""
        link = worker.links.get(command.peer)
        if link is not None and link.cancel(command):
            link.drains.append(command)
        else:
            self.drained(worker, command)

    def drained(self, worker: LiveWorker, command: CancelSends) -> None:
        """Nothing of the transfer is on the wire."""
        event = SendsDrained(command.transfer, command.epoch)
        self._runtime.at_step_end(self._runtime.now, worker, self._runtime.tell_worker, worker, event)

    def break_link(self, link: Link, *, source_died: bool) -> None:
        """What is on the wire is lost; a one-sided write has been torn in the middle."""
        link.is_open = False
        if link.flow is not None:
            self._flows.end(link.flow, self._runtime.now)
            link.flow = None
        if self._contents is not None and link.current is not None and crosses(link.current.frame):
            self._contents.send_ended(link.source.name, link.current)
            if source_died and link.target.spec.one_sided:
                self._contents.landed(link.source.name, link.current, intact=False)
        if link.window is not None and self._contents is not None:
            self._contents.window_closed(link.source.name, link.window)
        for drain in link.drains:
            self.drained(link.source, drain)
