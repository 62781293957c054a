"""The thread that a worker's steps run on, and what of a peer's memory they work in.

Owns the thread. Hands everything back to the event loop; decides nothing about a step but whether a peer's memory was
there until its end.
"""

from __future__ import annotations

import queue
import threading
import traceback
from collections.abc import Callable, Sequence

from transload.control.messages import EngineEvent, LayersReady, PeerLost, PeerUp, RunStep, StepFailed, WorkerId
from transload.runtime.base import Executor
from transload.transfer.arena import Window

HandBack = Callable[[EngineEvent], None]
StepReturned = Callable[[EngineEvent, Sequence[Window]], None]
"""What came of the step, and the windows that were closed under it."""


class StepThread(threading.Thread):
    """Runs one step after another, so that torch stays on one thread and the event loop stays free."""

    def __init__(self, executor: Executor, layers_ready: HandBack, returned: StepReturned) -> None:
        super().__init__(name="steps", daemon=True)
        self._executor = executor
        self._layers_ready = layers_ready
        self._returned = returned
        self._steps: queue.SimpleQueue[tuple[RunStep, Sequence[Window]] | Callable[[], None] | None] = (
            queue.SimpleQueue()
        )

    def submit(self, step: RunStep, windows: Sequence[Window]) -> None:
        """`windows`: those that the step works in."""
        self._steps.put((step, windows))

    def call(self, action: Callable[[], None]) -> None:
        """Do this between two steps. It must not raise."""
        self._steps.put(action)

    def stop(self) -> None:
        self._steps.put(None)

    def run(self) -> None:
        while (item := self._steps.get()) is not None:
            if callable(item):
                item()
                continue
            step, windows = item
            number = step.step
            try:
                event: EngineEvent = self._executor.run_step(
                    step,
                    lambda low, high, number=number: self._layers_ready(LayersReady(number, low, high)),  # type: ignore[misc]
                )
            except Exception as error:
                traceback.print_exc()
                event = StepFailed(number, f"{type(error).__name__}: {error}")
            # Looked at after the last access: a window that is open now was open all the time.
            closed = [window for window in windows if not window.is_open]
            for window in closed:
                window.forget()
            self._returned(event, closed)


class StepWindows:
    """The windows that the engine knows of, and what becomes of a step whose window has gone."""

    def __init__(self, num_blocks: int) -> None:
        """`num_blocks` are the worker's own."""
        self._num_blocks = num_blocks
        self._windows: dict[WorkerId, Window] = {}

    def link_changed(self, event: PeerUp | PeerLost, open_windows: Sequence[Window]) -> None:
        """The engine is told of a link now; `open_windows` are there."""
        if isinstance(event, PeerLost) or event.window is None:
            self._windows.pop(event.peer, None)
            return
        found = [window for window in open_windows if window.first_block == event.window]
        self._windows[event.peer] = found[0] if found else _gone(event.window, event.window_blocks)

    def of_step(self, step: RunStep) -> list[Window]:
        """Those that the step works in: a request's blocks all lie in one, or here."""
        blocks = [chunk.blocks[-1] for chunk in step.chunks if chunk.streams]
        if not blocks or max(blocks) < self._num_blocks:
            return []
        return [
            window
            for window in self._windows.values()
            if any(window.first_block <= block < window.first_block + window.num_blocks for block in blocks)
        ]

    def judge(self, event: EngineEvent, closed: Sequence[Window]) -> EngineEvent:
        """A step that has read from a closed window has computed nonsense. If the engine knows of the lost link, it
        drops what came of that; else the step has failed."""
        for peer, window in self._windows.items():
            if window in closed and not isinstance(event, StepFailed):
                assert hasattr(event, "step")
                return StepFailed(event.step, f"lost the link to {peer} while working in its blocks")
        return event


def _gone(first_block: int, num_blocks: int) -> Window:
    """A window that was closed before we could look."""
    window = Window(0, first_block, num_blocks, 0)
    window.is_open = False
    return window
