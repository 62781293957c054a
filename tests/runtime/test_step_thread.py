"""Steps on their thread: what comes back of one that fails, or under which a peer's memory has gone."""

from __future__ import annotations

import queue
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from tests.control.feeding import D0, a_request
from transload.control.messages import Chunk, EngineEvent, LayersReady, PeerLost, PeerUp, RunStep, StepDone, StepFailed
from transload.runtime.step_thread import StepThread, StepWindows
from transload.transfer.arena import Window

WINDOW = 16
UP = PeerUp(D0, one_sided=True, window=WINDOW, window_blocks=8)


class Steps:
    """A thread with an executor that does what a test says."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.returned: queue.Queue[tuple[EngineEvent, Sequence[Window]]] = queue.Queue()
        self.layers: list[EngineEvent] = []
        self._action = action
        self.thread = StepThread(cast(Any, self), self.layers.append, lambda *came: self.returned.put(came))
        self.thread.start()

    def run_step(self, step: RunStep, layers_ready: Callable[[int, int], None]) -> StepDone:
        layers_ready(0, 2)
        self._action()
        return StepDone(step.step, (), 0.1)

    def run(self, windows: Sequence[Window] = ()) -> tuple[EngineEvent, Sequence[Window]]:
        self.thread.submit(a_step(), windows)
        came = self.returned.get(timeout=20)
        self.thread.stop()
        self.thread.join()
        return came


def a_step(block: int = WINDOW, *, streams: bool = True) -> RunStep:
    return RunStep(5, (Chunk(a_request(1, 4), 0, 4, (), (block,), samples=True, num_outputs=0, streams=streams),))


def a_window() -> Window:
    return Window(0, WINDOW, 8, 0)


def known(window: Window) -> StepWindows:
    windows = StepWindows(WINDOW)
    windows.link_changed(UP, [window])
    return windows


def test_a_step_comes_back_after_its_layers() -> None:
    steps = Steps(lambda: None)
    assert steps.run() == (StepDone(5, (), 0.1), [])
    assert steps.layers == [LayersReady(5, 0, 2)]


def test_an_exception_is_a_failed_step(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise MemoryError("no more")

    assert Steps(fail).run() == (StepFailed(5, "MemoryError: no more"), [])
    assert "no more" in capsys.readouterr().err


def test_a_window_that_was_closed_under_a_step_is_told() -> None:
    window = a_window()

    def close() -> None:
        window.is_open = False

    assert Steps(close).run([window]) == (StepDone(5, (), 0.1), [window])


def test_a_step_works_in_the_window_that_its_blocks_lie_in() -> None:
    window = a_window()
    windows = known(window)
    assert windows.of_step(a_step()) == [window]
    assert windows.of_step(a_step(WINDOW - 1)) == []
    assert windows.of_step(a_step(WINDOW + 8)) == []
    windows.link_changed(PeerLost(D0), [])
    assert windows.of_step(a_step()) == []


def test_what_was_drawn_under_a_closed_window_is_lost_unless_the_engine_drops_it_anyway() -> None:
    window = a_window()
    windows = known(window)
    done, reason = StepDone(5, (), 0.1), "lost the link to d0 while working in its blocks"
    assert windows.judge(done, []) == done
    assert windows.judge(done, [window]) == StepFailed(5, reason)
    assert windows.judge(StepFailed(5, "why"), [window]) == StepFailed(5, "why")
    windows.link_changed(PeerLost(D0), [])
    assert windows.judge(done, [window]) == done


def test_a_link_that_has_ended_before_the_engine_hears_of_it_has_a_closed_window() -> None:
    windows = StepWindows(WINDOW)
    windows.link_changed(UP, [])
    (window,) = windows.of_step(a_step())
    assert not window.is_open
