"""Moving the feed-forwards of a running server: to FFN workers, to more or fewer of them, or back.

    start FFN workers -> let attention workers reach them -> each switches between two of its steps -> stop FFN workers

Requests go on all the while: a worker computes its feed-forwards one way until it computes them the other way. Whatever
fails before the switch leaves all as it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping

from transload.control.messages import WorkerId
from transload.deploy.plan import WorkerPlan
from transload.errors import WorkerLost
from transload.runtime.ffn_pools import FfnPools
from transload.runtime.remote import RemoteWorker
from transload.runtime.wire import DisconnectFfn, SwitchFfn

START_SECONDS = 300.0
LINK_SECONDS = 30.0
SWITCH_SECONDS = 300.0
"""Loading weights takes as long as starting does."""

Launch = Callable[[WorkerId], Awaitable[None]]


class FfnMove:
    """One move. `plans` and `remotes` are the runtime's own."""

    def __init__(
        self,
        pools: FfnPools,
        plans: dict[WorkerId, WorkerPlan],
        remotes: dict[WorkerId, RemoteWorker],
        launch: Launch,
        changed: asyncio.Event,
    ) -> None:
        self._pools = pools
        self._plans = plans
        self._remotes = remotes
        self._launch = launch
        self._changed = changed

    async def run(self, wanted: Mapping[WorkerId, WorkerPlan]) -> None:
        """Reach the plans that are wanted. Raises `WorkerLost` with all as it was, or, once feed-forwards are loaded
        and cannot be, as it says."""
        before = dict(self._plans)
        added = [name for name, plan in wanted.items() if plan.role == "ffn" and name not in self._plans]
        removed = [name for name, plan in self._plans.items() if plan.role == "ffn" and name not in wanted]
        try:
            await self._start(added, wanted)
            self._plans.update({name: plan for name, plan in wanted.items() if plan.role != "ffn"})
            await self._go_remote(wanted)
            await self._go_local(wanted)
        except BaseException:
            self._plans.clear()
            self._plans.update(before)
            await self._stop(added)
            raise
        for name in removed:
            for remote in self._attention():
                remote.send(DisconnectFfn(name))
        await self._stop(removed)

    async def _start(self, names: list[WorkerId], wanted: Mapping[WorkerId, WorkerPlan]) -> None:
        plans = {name: self._pools.with_loads(wanted[name]) for name in names}  # all at once: they must agree
        for name in names:
            self._plans[name] = plans[name]
            await self._launch(name)

        def are_ready() -> bool:
            for name in names:
                failure = self._remotes[name].failure
                if failure is not None:
                    raise WorkerLost(f"worker {name} could not start: {failure}")
            return all(self._remotes[name].ready is not None for name in names)

        await self._until(are_ready, START_SECONDS, "the FFN workers did not get ready")

    async def _go_remote(self, wanted: Mapping[WorkerId, WorkerPlan]) -> None:
        """Every attention worker that is to call reaches all of its FFN workers first."""
        leaving = [
            remote
            for remote in self._attention()
            if wanted[remote.name].hop is not None and not self._pools.is_remote(remote.name)
        ]
        for remote in leaving:
            self._pools.open(remote)
        await self._until(self._pools.is_complete, LINK_SECONDS, "the attention workers did not reach the FFN workers")
        await self._switch(leaving, remote=True)

    async def _go_local(self, wanted: Mapping[WorkerId, WorkerPlan]) -> None:
        returning = [
            remote
            for remote in self._attention()
            if wanted[remote.name].hop is None and self._pools.is_remote(remote.name)
        ]
        await self._switch(returning, remote=False)

    async def _switch(self, workers: list[RemoteWorker], *, remote: bool) -> None:
        for worker in workers:
            self._pools.last_switch.pop(worker.name, None)
            worker.send(SwitchFfn(remote))

        def have_switched() -> bool:
            for worker in workers:
                said = self._pools.last_switch.get(worker.name)
                if said is not None and said.problem is not None:
                    raise WorkerLost(f"{worker.name} could not take its feed-forwards back: {said.problem}")
            live = [
                worker for worker in workers if self._remotes.get(worker.name) is worker and worker.ready is not None
            ]
            return all(self._pools.is_remote(worker.name) == remote for worker in live)  # a new one comes as it should

        await self._until(have_switched, SWITCH_SECONDS, "the attention workers did not switch")

    async def _stop(self, names: list[WorkerId]) -> None:
        stopping = [self._remotes.pop(name) for name in names if name in self._remotes]
        for name in names:
            self._plans.pop(name, None)
            self._pools.forget(name)
        await asyncio.gather(*(remote.stop() for remote in stopping))

    def _attention(self) -> list[RemoteWorker]:
        return [r for r in self._remotes.values() if r.plan.role in ("decode", "aggregated") and r.ready is not None]

    async def _until(self, condition: Callable[[], bool], seconds: float, problem: str) -> None:
        try:
            async with asyncio.timeout(seconds):
                while True:
                    self._changed.clear()
                    if condition():
                        return
                    await self._changed.wait()
        except TimeoutError:
            raise WorkerLost(f"{problem} within {seconds:g} s") from None
