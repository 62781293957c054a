"""FFN workers as the front end sees them: it starts them, starts them again, and tells attention workers of them.

The Controller knows nothing of all this: a decode worker whose feed-forwards are elsewhere is a decode worker. Nothing
of a request or a call passes here.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

import msgspec

from transload.control.messages import WorkerId
from transload.deploy.plan import HopPlan, WorkerPlan
from transload.runtime.remote import RemoteWorker
from transload.runtime.wire import ConnectFfn, DisconnectFfn, FfnCounted, FfnSwitched, HopState, OpenHop, SwitchFfn

FIRST_RESTART_SECONDS = 0.2
LONGEST_RESTART_SECONDS = 10.0
MOST_DOUBLINGS = 16

FfnWord = HopState | FfnSwitched | FfnCounted
FfnObserver = Callable[[WorkerId, Mapping[str, float], Sequence[int]], None]
"""Told what a worker has counted since it began, and how many hops took how long."""


class FfnPools:
    """`plans` and `remotes` are the runtime's own and change under our eyes. `restart` starts a worker's process again
    after some seconds; `changed` is set whenever something may have become ready; `counted` hears of all
    that workers count."""

    def __init__(
        self,
        plans: Mapping[WorkerId, WorkerPlan],
        remotes: Mapping[WorkerId, RemoteWorker],
        *,
        restart: Callable[[WorkerId, float], None],
        changed: asyncio.Event,
        counted: FfnObserver,
    ) -> None:
        self._plans = plans
        self._remotes = remotes
        self._restart = restart
        self._changed = changed
        self._counted = counted
        self._linked: dict[tuple[WorkerId, WorkerId], str] = {}  # (attention, FFN) -> transport
        self._is_remote: dict[WorkerId, bool] = {}  # of attention workers that have said so
        self._num_losses: dict[WorkerId, int] = {}
        self._counts: dict[WorkerId, dict[str, float]] = {}
        self._loads: dict[WorkerId, tuple[tuple[int, ...], ...]] = {}  # by layer and expert
        self.last_switch: dict[WorkerId, FfnSwitched] = {}

    # -- what is there ------------------------------------------------------------------------------------------------

    def is_complete(self) -> bool:
        """Every FFN worker is ready, and every attention worker that is ready can call each of its own."""
        for name, plan in self._plans.items():
            remote = self._remotes.get(name)
            if plan.role == "ffn" and (remote is None or remote.ready is None):
                return False
            if plan.hop is not None and remote is not None and remote.ready is not None:
                ffn_names = [ffn.name for ffn in self._ffn_workers(plan.hop)]
                if any((name, ffn) not in self._linked for ffn in ffn_names):
                    return False
        return True

    def describe(self, name: WorkerId) -> dict[str, object]:
        """For /health: what calling or being called has come to."""
        found: dict[str, object] = {}
        if name in self._counts:
            found["feed_forwards"] = self._counts[name]
        links = {str(ffn): transport for (attention, ffn), transport in self._linked.items() if attention == name}
        if links:
            found["ffn_links"] = links
        return found

    def with_loads(self, plan: WorkerPlan) -> WorkerPlan:
        """An FFN worker's plan with what is known of how often experts are chosen: it decides who has copies."""
        known = [loads for name, loads in self._loads.items() if self._plans[name].role != "prefill"]
        if plan.share is None or not known:
            return plan
        first, *others = known
        loads = tuple(tuple(map(sum, zip(*layers, strict=True))) for layers in zip(first, *others, strict=True))
        return msgspec.structs.replace(plan, share=msgspec.structs.replace(plan.share, loads=loads))

    def _ffn_workers(self, hop: HopPlan) -> list[RemoteWorker]:
        """Those of a pool that are ready."""
        return [
            remote
            for name, remote in self._remotes.items()
            if remote.ready is not None and name in self._plans and self._plans[name].pool == hop.target
        ]

    def _attention_workers(self, pool: str) -> list[tuple[RemoteWorker, HopPlan]]:
        """Those that are ready and call an ffn pool."""
        return [
            (remote, plan.hop)
            for name, remote in self._remotes.items()
            if remote.ready is not None
            and (plan := self._plans.get(name)) is not None
            and plan.hop is not None
            and plan.hop.target == pool
        ]

    # -- events -------------------------------------------------------------------------------------------------------

    def attention_ready(self, remote: RemoteWorker) -> None:
        """Before the Controller hears of it: it must know whom to call when its first request comes."""
        hop = self._plans[remote.name].hop
        self._unlink(remote.name)
        self._is_remote[remote.name] = remote.plan.hop is not None
        if hop is not None:
            self.open(remote)
            if remote.plan.hop is None:  # it was started before the split was changed
                remote.send(SwitchFfn(True))
        elif remote.plan.hop is not None:
            remote.send(SwitchFfn(False))

    def is_remote(self, name: WorkerId) -> bool:
        """Whether an attention worker has its feed-forwards computed elsewhere, as far as it has said."""
        return self._is_remote.get(name, False)

    def forget(self, name: WorkerId) -> None:
        """The worker will not come back."""
        self._unlink(name)
        self._counts.pop(name, None)
        self._num_losses.pop(name, None)

    def open(self, remote: RemoteWorker) -> None:
        """Tell an attention worker of its FFN workers."""
        hop = self._plans[remote.name].hop
        assert hop is not None, f"{remote.name} calls nobody"
        if not self._is_remote.get(remote.name, False):
            remote.send(OpenHop(hop))
        for ffn in self._ffn_workers(hop):
            self._connect(remote, ffn, hop)

    def ffn_ready(self, remote: RemoteWorker) -> None:
        self._num_losses.pop(remote.name, None)
        for attention, hop in self._attention_workers(remote.plan.pool):
            self._connect(attention, remote, hop)

    def ffn_gone(self, remote: RemoteWorker) -> None:
        """Nobody calls it any more; it is started again after a pause that grows."""
        for attention, _ in self._attention_workers(remote.plan.pool):
            attention.send(DisconnectFfn(remote.name))
        self._unlink(remote.name)
        self._counts.pop(remote.name, None)
        losses = self._num_losses[remote.name] = self._num_losses.get(remote.name, 0) + 1
        pause = FIRST_RESTART_SECONDS * 2.0 ** min(losses - 1, MOST_DOUBLINGS)
        self._restart(remote.name, min(pause, LONGEST_RESTART_SECONDS))

    def attention_gone(self, name: WorkerId) -> None:
        self._unlink(name)
        self._counts.pop(name, None)
        self._loads.pop(name, None)
        self._is_remote.pop(name, None)

    def said(self, remote: RemoteWorker, word: FfnWord) -> None:
        """A worker's own words."""
        match word:
            case HopState(peer, transport, problem):
                if problem is None:
                    self._linked[remote.name, peer] = transport
                    remote.link_problem = None
                else:
                    self._linked.pop((remote.name, peer), None)
                    remote.link_problem = f"{peer}: {problem}"
            case FfnSwitched():
                self.last_switch[remote.name] = word
                if word.problem is None:
                    self._is_remote[remote.name] = word.remote
            case FfnCounted(counts, hops, loads):
                if counts:
                    self._counts[remote.name] = counts
                    self._counted(remote.name, counts, hops)
                if loads:
                    self._loads[remote.name] = loads
        self._changed.set()

    def _connect(self, attention: RemoteWorker, ffn: RemoteWorker, hop: HopPlan) -> None:
        assert ffn.ready is not None
        attention.send(ConnectFfn(ffn.name, ffn.ready.address, hop.transport))

    def _unlink(self, name: WorkerId) -> None:
        for pair in [pair for pair in self._linked if name in pair]:
            del self._linked[pair]
