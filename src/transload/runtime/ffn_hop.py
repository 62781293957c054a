"""The attention worker's end of the front end's words about FFN workers: whom to call, and when to begin and to stop.

Nothing about a single call passes here. The source of feed-forwards changes on the step thread alone, between steps.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from transload.control.messages import Message, WorkerId
from transload.deploy.plan import HopPlan
from transload.errors import TransloadError
from transload.runtime.base import FfnSource
from transload.runtime.process_memory import resident_bytes
from transload.runtime.wire import ConnectFfn, DisconnectFfn, FfnSwitched, HopState, OpenHop, SwitchFfn
from transload.transfer.ffn_meeting import Party

HopWord = ConnectFfn | DisconnectFfn | OpenHop | SwitchFfn


class HopSide:
    """`between_steps` runs something on the step thread; `send` may be called from any thread."""

    def __init__(
        self,
        source: FfnSource,
        me: Party,
        between_steps: Callable[[Callable[[], None]], None],
        send: Callable[[Message], None],
    ) -> None:
        self._source = source
        self._me = me
        self._between_steps = between_steps
        self._send = send

    def begin(self, hop: HopPlan) -> None:
        """This worker has no feed-forwards of its own. Before the first step."""
        self._source.open_remote(hop, self._me, self._report)
        self._source.switch(remote=True)

    def take(self, word: HopWord) -> None:
        """Returns at once."""
        match word:
            case ConnectFfn(_, address, transport):
                self._source.connect(address, transport)
            case DisconnectFfn(peer):
                self._source.disconnect(peer)
            case OpenHop(hop):
                self._source.open_remote(hop, self._me, self._report)
            case SwitchFfn(remote=True):
                self._between_steps(self._go_remote)
            case SwitchFfn():
                threading.Thread(target=self._load, name="ffn-load", daemon=True).start()

    @property
    def is_loading(self) -> bool:
        return self._source.is_loading

    def counts(self) -> dict[str, float]:
        return self._source.counts()

    def loads(self) -> tuple[tuple[int, ...], ...]:
        return self._source.loads()

    def hops(self) -> tuple[int, ...]:
        return self._source.hops()

    def _load(self) -> None:
        """Steps go on while the weights are loaded."""
        try:
            self._source.load()
        except (TransloadError, MemoryError, RuntimeError) as error:
            self._send(FfnSwitched(True, resident_bytes(), f"{type(error).__name__}: {error}"))
            return
        self._between_steps(self._go_local)

    def _go_remote(self) -> None:
        self._source.switch(remote=True)
        self._send(FfnSwitched(True, resident_bytes()))

    def _go_local(self) -> None:
        self._source.switch(remote=False)
        self._send(FfnSwitched(False, resident_bytes()))

    def _report(self, peer: WorkerId, transport: str, problem: str | None) -> None:
        self._send(HopState(peer, transport, problem))
